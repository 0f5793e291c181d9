r"""Chemical formulas, `H2O` or `\mathrm{Ca(OH)_2}`: where they stand in a text, and one spelling for each."""

import re
from collections.abc import Iterator

_ELEMENTS = (
    "He Li Be Ne Na Mg Al Si Cl Ar Ca Sc Ti Cr Mn Fe Co Ni Cu Zn Ga Ge As Se Br Kr Rb Sr Zr Nb Mo Tc Ru Rh Pd Ag Cd In "
    "Sn Sb Te Xe Cs Ba La Ce Pr Nd Pm Sm Eu Gd Tb Dy Ho Er Tm Yb Lu Hf Ta Re Os Ir Pt Au Hg Tl Pb Bi Po At Rn Fr Ra Ac "
    "Th Pa Np Pu Am Cm H B C N O F P S K V Y I W U"
).split()
_ELEMENT = rf"(?:(?:{'|'.join(_ELEMENTS)})(?![a-z]))"
_UNIT = rf"{_ELEMENT}(?:[1-9]\d{{0,2}})?"
_GROUP = rf"\((?:{_UNIT})+\)(?:[1-9]\d{{0,2}})?"
_COMPLEX = rf"\[(?:{_UNIT}|{_GROUP})+\](?:[1-9]\d{{0,2}})?"
_BODY = rf"(?:{_UNIT}|{_GROUP}|{_COMPLEX})+"
_CHARGE = r"(?:\^\d?[+-]|\^[+-]\d|[+-](?=$|[\s.,;)]))"
_SUBSTANCE = re.compile(rf"\d{{0,2}}{_BODY}(?:\*\d{{0,2}}{_BODY})?{_CHARGE}?")
# What no word is: a number behind an element or a group, a charge, a capital behind a small letter.
_CERTAIN = re.compile(rf"[A-Za-z)\]]\d|{_CHARGE}|[a-z][A-Z]")
_ARROW = re.compile(r"\s*(?:-+>|=+>?|\\(?:long)?rightarrow|\\to(?![A-Za-z])|\\rightleftharpoons|\u2192|\u21cc)\s*")
# Between substances, not the charge at one's end.
_PLUS = re.compile(r"(?<=[\s\d}])\+(?=\s*[\\\dA-Z(\[])")
_ATOM = re.compile(rf"(?P<name>{_ELEMENT})(?P<charge>\d[+-])")
_STATE = re.compile(r"\((?:s|l|g|aq)\)")
_WRAPPED = re.compile(r"\\(?:ce|mathrm|text|textrm|mathit|operatorname|rm)\s*\{((?:[^{}]|\{[^{}]*\})*)\}")
_SUB = r"(?:_?\{?\d{1,3}\}?)?"
_RAW_GROUP = rf"\((?:{_ELEMENT}{_SUB}){{1,12}}\){_SUB}"
_IN_TEXT = re.compile(
    rf"(?<![\w\\^.=+*/-])(?:\\(?:ce|mathrm|text)\{{)?(?={_ELEMENT}[\w{{}}]{{0,12}}(?:{_ELEMENT}|\())(?:{_ELEMENT}{_SUB}|{_RAW_GROUP}){{1,24}}"
    r"(?:\^\{?\d?[+-]\}?)?\}*(?!\s*[=<>^*/(]|[\w-])"
)


def chemical_formulas(text: str) -> Iterator[tuple[int, int]]:
    """Where each formula of two elements or more begins and ends; `CO` and `NO` may be words."""
    for match in _IN_TEXT.finditer(text):
        spelling = chemical_spelling(match[0])
        if spelling and is_certain(spelling):
            yield match.start(), match.end()


def chemical_spelling(text: str) -> str | None:
    """One spelling for a substance or a reaction, `Ca(OH)2` or `2H2 + O2 > 2H2O`; None for any other text."""
    text = re.sub(
        r"\\(?:rm|left|right|displaystyle)(?![A-Za-z])|\\[,;: !]|~", " ", text.replace("\\cdot", "*").strip(" $.")
    )
    for _ in range(4):
        text = _WRAPPED.sub(r"\1", text)
    text = re.sub(r"\^\{([^{}]*)\}", lambda match: "^" + match[1].replace(" ", ""), text)
    raw = [[part.strip() for part in _PLUS.split(side)] for side in _ARROW.split(text)]
    if any(re.search(r"[A-Za-z)\]]\s+\d", part) for side in raw for part in side):
        # CHF 10 is a sum of money.
        return None
    sides = [sorted(_STATE.sub("", re.sub(r"[_{}\s]", "", part)) for part in side) for side in raw]
    if len(sides) > 2 or not all(_SUBSTANCE.fullmatch(part) for side in sides for part in side):
        return None
    if len(sides) == 1 and len(sides[0]) > 1:
        return None
    return " > ".join(" + ".join(map(_with_charge, side)) for side in sides)


def _with_charge(substance: str) -> str:
    """A charge behind `^`, its number first: `Fe3+`, `Fe^+3` and `Fe^3+` are one, and so are `NH4+` and `NH4^+`."""
    raised = re.sub(r"\^(\d?)([+-])(\d?)$", r"^\1\3\2", substance)
    if raised != substance or "^" in substance or substance[-1] not in "+-":
        return raised
    atom = _ATOM.fullmatch(substance)
    return f"{atom['name']}^{atom['charge']}" if atom else f"{substance[:-1]}^{substance[-1]}"


def is_certain(spelling: str) -> bool:
    """Whether a spelling of `chemical_spelling` can be nothing but chemistry, as `CO2` and `NaCl`."""
    return _CERTAIN.search(spelling) is not None
