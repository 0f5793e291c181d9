"""Units of the SI by their symbols, whose capitals matter: an mW is no MW."""

from fractions import Fraction

_PREFIXES = {
    "p": ("pico", Fraction(1, 10**12)),
    "n": ("nano", Fraction(1, 10**9)),
    "\u03bc": ("micro", Fraction(1, 10**6)),
    "m": ("milli", Fraction(1, 1000)),
    "k": ("kilo", Fraction(1000)),
    "M": ("mega", Fraction(10**6)),
    "G": ("giga", Fraction(10**9)),
}
_NAMES = {
    "A": "ampere", "V": "volt", "W": "watt", "N": "newton", "J": "joule", "Pa": "pascal", "Hz": "hertz", "F": "farad",
    "\u03a9": "\u03c9", "s": "second", "m": "meter", "g": "gram", "mol": "mole", "Wh": "watt hour",
}  # fmt: skip
# Without those that name points and lines, as MN and GA do.
_SYMBOLS = (
    "pA nA \u03bcA mA kA nV \u03bcV mV kV \u03bcW mW kW MW GW mN kN mJ kJ MJ kPa MPa GPa kHz MHz GHz pF nF \u03bcF mF "
    "k\u03a9 M\u03a9 m\u03a9 kWh MWh GWh ps ns \u03bcs ms nm \u03bcm \u03bcg mmol \u03bcmol"
).split()

SI_UNITS = {symbol: f"{_PREFIXES[symbol[0]][0]}{_NAMES[symbol[1:]]}" for symbol in _SYMBOLS}
"""The name of each symbol."""
SI_SCALES = {SI_UNITS[symbol]: (_NAMES[symbol[1:]], _PREFIXES[symbol[0]][1]) for symbol in _SYMBOLS}
"""What each is of the unit without its prefix, by name."""
