"""Numbers and formulas in running text, plain or LaTeX: where each begins and ends, and one spelling for it."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from finemill.rows.characters import plain_characters
from finemill.rows.si_units import SI_UNITS

UNITS = frozenset(
    """percent percentage degree degrees radian radians dollar dollars cent cents euro euros pound pounds yuan yen rupee
    rupees usd eur gbp inr jpy krw cny rmb chf brl cad aud won franc francs peso pesos ruble rubles celsius fahrenheit
    kelvin kwh wh ohm
    ohms ha \u03c9 k\u03c9 \u03bcm \u03bcg \u03bcs
        cm mm m km dm um nm inch inches ft feet foot yd yard yards mile miles mi g kg mg gram grams kilogram kilograms
    lb lbs oz ounce ounces ton tons l ml liter liters litre litres gallon gallons cup cups s ms sec secs second seconds
    min mins minute minutes h hr hrs hour hours day days week weeks month months year years mph kph hz khz mhz ghz
    kb mb gb tb n j kj w kw v a k mol pa kpa meter meters metre metres kilometer kilometers kilometre kilometres
    centimeter centimeters centimetre centimetres millimeter millimeters square cubic squared cubed per""".split()
)
"""Words that a number's meaning depends on; a letter alone is one only where it cannot be a variable."""
MAGNITUDES = {
    "dozen": 12,
    "hundred": 10**2,
    "thousand": 10**3,
    "million": 10**6,
    "billion": 10**9,
    "trillion": 10**12,
    "lakh": 10**5,
    "crore": 10**7,
}

CURRENCIES = {
    **dict.fromkeys(("US$", "$", "USD"), "dollar"),
    **dict.fromkeys(("€", "EUR"), "euro"),
    **dict.fromkeys(("£", "GBP"), "pound sterling"),
    **dict.fromkeys(("₹", "INR", "Rs.", "Rs"), "rupee"),
    **dict.fromkeys(("₩", "KRW"), "won"),
    **dict.fromkeys(("R$", "BRL"), "real"),
    **dict.fromkeys(("CNY", "RMB"), "yuan"),
    **dict.fromkeys(("₽", "RUB"), "ruble"),
    **dict.fromkeys(("₺", "TRY"), "lira"),
    "\u00a2": "cent",
    "\u00a5": "\u00a5",
    "JPY": "yen",
    "CHF": "franc",
    "A$": "australian dollar",
    "AUD": "australian dollar",
    "C$": "canadian dollar",
    "CAD": "canadian dollar",
    "\u20ab": "dong",
    "\u20b1": "peso",
    "\u0e3f": "baht",
    "\u20aa": "shekel",
}
"""Signs and codes of currencies, and their names; \u00a5 is the sign of two."""

_GROUPS = (
    r"\d{1,3}(?:,\d{3})+(?![\d,]*\d)",
    r"\d{1,3}(?:(?:\{,\}|,?\\!)[ ]?\d{3})+(?!\d)",
    r"\d{1,3}(?:['\u2019_]\d{3})+(?!\d)",
    r"\d{1,3}(?:\.\d{3}){2,}(?:,\d+)?(?![\d.,]*\d)",
    r"\d{1,3}(?:\.\d{3})+,\d{1,2}(?![\d.,]*\d)",
    r"[1-9]\d{0,2}(?:[ ]\d{3})+(?![ ,.]?\d)",
)
# 0.(3), and 0.1666... where the digits repeat.
_REPEATED = r"\d+\.\d*\(\d+\)|\d+\.\d*?(?P<period>\d+?)(?P=period)+\d*(?:\.\.\.|\s?\\[lc]?dots(?![A-Za-z]))"
_NUMBER = (
    rf"{_REPEATED}|\d+\.\d*(?=\\(?:overline|dot|bar)(?![A-Za-z]))|(?:{'|'.join(_GROUPS)}|\d+)(?:\.\d+)?|(?<![\d.])\.\d+"
)
_EXPONENT = r"(?:[eE][-+]?\d+(?![A-Za-z]))?"
# A dollar sign with no other behind it that closes a formula.
_DOLLAR = r"\\\$|\$(?=\d)(?!\d[^$\n]*\$(?!\d))"
_MARKS = "|".join(re.escape(mark) for mark in sorted(set(CURRENCIES) - {"$"}, key=len, reverse=True))
_RELATIONS = r"le|leq|ge|geq|lt|gt|ne|neq|approx|in|to|cup|cap|setminus|equiv"
_OPERATORS = r"times|cdot|div|pm|mp|ast|land|lor"
_TOKEN = re.compile(
    rf"""(?x)
    (?P<delimiter> \\[()\[\],;:!\ ] | \\(?:left|right|q?quad|displaystyle|[bB]igg?|limits)(?![A-Za-z])
        | (?!{_DOLLAR})\$ | ~ )
    | (?P<bracket> \\[{{}}|] | [()\[\]{{}}|] | \\(?:lbrace|rbrace|langle|rangle|lvert|rvert)(?![A-Za-z]) )
    | (?P<operator> [-+*/^=<>_,;&!'] | :(?=\d) | (?<=\d[ ]):(?=[ ]\d) | \\(?:{_OPERATORS}|{_RELATIONS})(?![A-Za-z]) )
    | (?P<number> (?:(?:(?<![A-Za-z])(?:{_MARKS})|{_DOLLAR})\s?)? (?:{_NUMBER}){_EXPONENT}
        (?:\s?\\?%|\s?(?:{_MARKS})(?![A-Za-z]))? )
    | (?P<command> \\[A-Za-z]+ | \\% )
    | (?P<join> (?<![A-Za-z])(?:and|or)(?![A-Za-z]) )
    | (?P<word> [^\W\d_]+ )
    """
)
_BETWEEN_NUMBERS = re.compile(r"\s*(?:[A-Za-z]+\s+){0,2}[A-Za-z]+\s*[-+*/=]\s*[$\\(.]?\d")
CONDITION = re.compile(
    r"[\s$*_)\]]*,?\s*(?:for|when|if|where|with|at|given(?:\s+that)?|für|bei|wenn|pour|si|quand|para|cuando)"
    r"\s+[$\\(]*[A-Za-z](?:_\{?\w\}?)?\s*=\s*"
)
"""Between a result and the value for which it is one: 24 for n = 4, 3 at x = 2."""
# After "or" the next answer: a number, a formula, or what is said of a letter.
_AFTER_JOIN = re.compile(r"\s*\$?[-+]?(?:[\d.(\[]|\\[a-z({]|[A-Za-z]\s*(?:[=<>]|\\(?:[lg](?:eq?|t)|neq?)(?![A-Za-z])))")
_AND_A_HALF = re.compile(r"\s+and\s+(?:a|one)\s+(?:half|third|quarter)\b")
# 2 h 30 min.
_SMALLER_UNIT = re.compile(r"\s+\d+\s*(?:min|sec|cm|mm|in|oz|ml|[ms])(?![A-Za-z])")
_INCHES = re.compile(r"\d in(?:\^\{?[23]\}?)?[.,;!?)*]*\s*$", re.MULTILINE)
_FRACTION = re.compile(r"\d+\s*/\s*\d+")
_COMPARED = re.compile(r"\\(?:[lg](?:eq?|t)|neq?|in)(?![A-Za-z])")
_FUNCTIONS = ("ln", "log", "exp", "sqrt", "sin", "cos", "tan")
# Units of one letter: after a number, a space, and before the end of what is said.
_LETTER_UNITS = ("m", "g", "l", "L", "s", "h", "N", "J", "W", "V", "K", "A")
_SAID_END = re.compile(r"(?:\^\{?[23]\}?)?(?:/[A-Za-z]+\^?\{?\d?\}?)?\s*(?:[.,;:!?)*]|$)", re.MULTILINE)
_TAIL = re.compile(
    r"\s+(?:a\.?m\.?|p\.?m\.?|o['\u2019]clock|in the (?:morning|afternoon|evening))(?![a-z])", re.IGNORECASE
)
_MOST_TOKENS = 600
"""Tokens of a formula that are looked at."""
_BRACE = re.compile(r"(?<!\\)[{}]")
_LONGEST_GROUP = 2000
"""Characters of what braces hold."""
_LONGEST_NAME = 32
_MOST_BOXES = 8
"""Boxes inside of each other."""
_TEXT_COMMANDS = r"text|textbf|textit|textrm|textsf|mathrm|mathbf|mathit|mathsf|mbox|hbox|operatorname|bm|boldsymbol"
_WITHOUT_VALUE = frozenset("text textbf textit textrm mathrm mathbf mbox operatorname begin end hspace quad".split())

# A number in another typeface.
_STYLED = re.compile(r"\\(?:mathbf|mathrm|textbf|mathit|bm|boldsymbol)\{[^{}A-Za-z]*\d[^{}A-Za-z]*\}")


@dataclass(frozen=True)
class Span:
    """Characters `start` to `end` of a text."""

    start: int
    end: int


@dataclass(frozen=True)
class _Token:
    kind: str
    start: int
    end: int
    text: str


def boxed(text: str) -> str | None:
    r"""Content of the last `\boxed{...}`, nested braces included; None where there is none or it was cut off.

    Boxes that nothing but a comma or "and" parts are one answer: `\boxed{1} and \boxed{2}` holds `1, 2`.
    """
    found: list[tuple[int, int, str]] = []
    for match in re.finditer(r"(?:\\(?:boxed|fbox)|(?<![\\A-Za-z])boxed(?=\{))\s*(?P<group>\{)?", text):
        if match["group"]:
            end = _group_end(text, match.end() - 1)
            if end is None:
                return None
            found.append((match.start(), end, text[match.end() : end - 1]))
        elif plain := re.compile(r"[^\s{}$\\]+").match(text, match.end()):
            found.append((match.start(), plain.end(), plain[0].rstrip(".")))
    outer: list[tuple[int, int, str]] = []
    for box in found:
        # In the order of their beginnings, so that the last outer one is the only one that may hold the next.
        if not outer or box[1] >= outer[-1][1]:
            outer.append(box)
    joined: list[str] = []
    follows = len(text)
    for start, end, content in reversed(outer):
        if joined and not re.fullmatch(r"[\s$.]*(?:,|and|or|,\s*and|,\s*or)[\s$]*", text[end:follows]):
            break
        joined.insert(0, _inner_box(content))
        follows = start
    return ", ".join(joined) if joined else None


def _inner_box(content: str) -> str:
    # A model that says nothing but boxes says nothing.
    inner = boxed(content) if 0 < content.count("\\boxed") <= _MOST_BOXES else None
    return content if inner is None else inner


def _group_end(text: str, start: int) -> int | None:
    """The position after the group whose opening brace is at `start`, None for one that is never closed."""
    depth = 0
    for brace in _BRACE.finditer(text, start, start + _LONGEST_GROUP):
        depth += 1 if brace[0] == "{" else -1
        if depth == 0:
            return brace.end()
    return None


def strip_delimiters(text: str) -> str:
    r"""`text` without emphasis and without the `$...$`, `\(...\)`, `\[...\]` around all of it."""
    text = text.strip()
    while True:
        for left, right in (("**", "**"), ("$$", "$$"), ("\\(", "\\)"), ("\\[", "\\]"), ("$", "$")):
            inner = text[len(left) : -len(right)]
            if len(text) > len(left + right) and text.startswith(left) and text.endswith(right) and right not in inner:
                text = inner.strip()
                break
        else:
            return text


def formulas(text: str) -> Iterator[Span]:
    """Every number or formula of `text` in order, each as long as it can be; of an equation the last side."""
    text = re.sub(r"\$\$(.*?)\$\$", lambda match: f"\\[{match[1]}\\]", text, flags=re.DOTALL)
    run: list[_Token] = []
    for token in _tokens(text):
        if run and not _continues(text, run, token):
            yield from _finished(text, run)
            run = []
        if run or token.kind not in ("word", "join"):
            run.append(token)
    yield from _finished(text, run)


def _tokens(text: str) -> Iterator[_Token]:
    position = 0
    while match := _TOKEN.search(text, position):
        kind, end = str(match.lastgroup), match.end()
        if kind == "command":
            end = _arguments_end(text, end)
        elif kind == "operator" and match[0] in "^_" and text[end : end + 1] == "{":
            end = _group_end(text, end) or end
        elif kind == "word":
            kind = _word_kind(text, match)
        yield _Token(kind, match.start(), end, text[match.start() : end])
        position = end


def _word_kind(text: str, match: re.Match[str]) -> str:
    """`letter` of a variable, `unit`, or `word`."""
    word, before = match[0], text[match.start() - 1 : match.start()]
    if word in SI_UNITS:
        return "unit"
    if not word.isascii():
        return "unit" if re.fullmatch("\u03bc[A-Za-z]|[kM]?\u03a9", word) else "word"
    if word == "pi":
        return "letter"
    if word in _FUNCTIONS and text[match.end() : match.end() + 1] == "(":
        return "function"
    if before.isdigit():
        if word.lower() in UNITS and len(word) > 1:
            return "unit"
        return "letter" if len(word) <= 2 and word.lower() not in ("st", "nd", "rd", "th") else "tail"
    if len(word) == 1:
        return "letter"
    if word == "in" and match.start() > 1 and _INCHES.match(text, match.start() - 2):
        return "unit"
    return "unit" if word.lower() in UNITS or word.lower() in MAGNITUDES else "word"


def _arguments_end(text: str, end: int) -> int:
    r"""After the arguments of a LaTeX command: braces, `\sqrt[3]`, the two digits of `\frac12`."""
    name = re.search(r"\\([A-Za-z]*)$", text[max(0, end - _LONGEST_NAME) : end])
    if name and name[1] == "begin":
        environment = re.compile(r"(\{[A-Za-z]+\*?\})(?:(?!\\end\1).){0,4000}\\end\1", re.DOTALL).match(text, end)
        return environment.end() if environment else end
    if name and name[1] in ("frac", "dfrac", "tfrac", "cfrac"):
        short = re.compile(r"\s*(?:\d(?=[\d{\s])|(?=\{))").match(text, end)
        for _ in range(2 if short else 0):
            match = re.compile(r"\s*(\d|\{)").match(text, end)
            if match:
                end = (_group_end(text, match.end() - 1) or match.end()) if match[1] == "{" else match.end()
        return end
    option = re.compile(r"\[[^\]]*\]").match(text, end)
    end = option.end() if option and name and name[1] == "sqrt" else end
    while text[end : end + 1] == "{":
        close = _group_end(text, end)
        if close is None:
            break
        end = close
    return end


def _continues(text: str, run: Sequence[_Token], token: _Token) -> bool:
    last = run[-1]
    gap = text[last.end : token.start]
    if gap.strip() or ("\n" in gap and last.text != "\\[" and token.text != "\\]"):
        return False
    if token.kind == "word":
        between = _BETWEEN_NUMBERS.match(text, last.end) and not CONDITION.match(text, last.end)
        return last.kind in ("number", "unit", "word") and bool(between)
    if token.kind == "unit":
        return last.kind in ("number", "unit", "letter", "command") or last.text == "/"
    if token.kind == "join":
        # As in 1, 2, and 3: of two things with a comma between them the second may be another sentence's.
        listed = last.text == "," and sum(one.text == "," for one in run) > 1
        following = _AFTER_JOIN.match(text, token.end)
        return bool(following) and (listed or last.kind not in ("operator", "join", "word"))
    if token.kind == "letter":
        return _is_variable(text, last, token, gap)
    if last.kind == "letter" and token.kind == "number":
        return not gap or (last.text in _LETTER_UNITS and bool(_SMALLER_UNIT.match(text, last.end)))
    if last.kind == "word":
        return token.kind == "operator"
    if token.kind == "number" and last.text == "per":
        return False
    if token.kind == "number" and last.kind == "number":
        # A mixed number, 2 3/4; two numbers in a row otherwise are not one thing.
        return bool(_FRACTION.match(text, token.start))
    return not (token.kind == "operator" and token.text in ("!", "'") and gap)


def _is_variable(text: str, last: _Token, token: _Token, gap: str) -> bool:
    """Whether a single letter belongs to the formula before it rather than to a sentence."""
    if gap == " " and last.kind == "number" and token.text in _LETTER_UNITS:
        raised = text[token.end : token.end + 2] in ("^2", "^3", "^{")
        return bool(raised or _SAID_END.match(text, token.end) or _SMALLER_UNIT.match(text, token.end))
    if not gap:
        return last.kind in ("number", "command", "operator", "bracket", "letter", "delimiter", "tail")
    after = text[token.end : token.end + _LONGEST_NAME].lstrip()
    if last.kind in ("operator", "bracket", "delimiter") and last.text != ",":
        return not after[:1].isalpha()
    return last.kind == "command" or after[:1] in (*"=<>+*/^)",) or _COMPARED.match(after) is not None


def _finished(text: str, run: list[_Token]) -> Iterator[Span]:
    if len(run) > _MOST_TOKENS:
        # Of a long chain of equations the end counts; all else of that length is no answer, nor is a piece of it.
        run = run[-_MOST_TOKENS:]
        if not any(token.text == "=" for token in run):
            return
    run = _last_side(_trimmed(text, run))
    run = _trimmed(text, run)
    if not any(_has_value(token) for token in run):
        return
    start, end = run[0].start, run[-1].end
    for tail in (_AND_A_HALF, _TAIL):
        extra = tail.match(text, end)
        end = extra.end() if extra else end
    yield Span(start, end)


def _has_value(token: _Token) -> bool:
    if token.kind == "command":
        matrix = token.text.startswith("\\begin") and "\\end" in token.text
        return (
            matrix
            or bool(_STYLED.fullmatch(token.text))
            or (token.text[1:].partition("{")[0] not in _WITHOUT_VALUE and token.text != "\\%")
        )
    return token.kind in ("number", "tail", "function")


def _trimmed(text: str, run: Sequence[_Token]) -> list[_Token]:
    """Without what a formula neither begins nor ends with: glue, punctuation, brackets of the sentence around it."""
    kept = list(run)
    while kept and _is_loose_start(text, kept):
        kept.pop(0)
    while kept and _is_loose_end(kept):
        kept.pop()
    return kept


def _is_loose_start(text: str, run: Sequence[_Token]) -> bool:
    first = run[0]
    if first.kind == "operator":
        before = text[first.start - 1 : first.start]
        sign = len(run) > 1 and (first.text == "\\pm" or (first.text in "-+" and first.end == run[1].start))
        # Letters that are no part of a formula, as in 是-5, hold no sign back.
        return not sign or (before.isascii() and before.isalnum())
    if first.kind == "bracket":
        if first.text == "|":
            return sum(token.text == "|" for token in run) % 2 == 1
        return not _is_opening(first) or not _closes(run)
    return first.kind in ("delimiter", "join", "word", "unit")


def _is_loose_end(run: Sequence[_Token]) -> bool:
    last = run[-1]
    if last.kind == "bracket":
        return _is_opening(last) or sum(map(_is_opening, run)) < sum(t.kind == "bracket" for t in run) / 2
    if last.kind == "operator":
        return last.text[0] not in "^_" or len(last.text) == 1
    return last.kind in ("delimiter", "join", "word") or last.text == "per"


def _is_opening(token: _Token) -> bool:
    return token.kind == "bracket" and token.text in ("(", "[", "{", "\\{", "\\lbrace", "\\langle", "\\lvert")


def _closes(run: Sequence[_Token]) -> bool:
    brackets = [token for token in run if token.kind == "bracket"]
    return sum(map(_is_opening, brackets)) * 2 <= len(brackets)


def _last_side(run: Sequence[_Token]) -> list[_Token]:
    """What follows the last equals sign, unless the run is a list of equations."""
    depth, cuts, separators = 0, [], []
    for index, token in enumerate(run):
        if token.kind == "bracket":
            # A bracket that closes none belongs to the sentence around.
            depth = max(0, depth + (1 if _is_opening(token) else -1))
        elif depth == 0 and (token.text == "=" or (token.text == "\\approx" and not any(map(_has_value, run[:index])))):
            cuts.append(index)
        elif depth == 0 and (token.kind == "join" or token.text in (",", ";")):
            separators.append(index)
    if not cuts:
        return list(run)
    # Of sums one after another the last result counts; x = 1, y = 2 is one answer.
    named = any(token.kind in ("letter", "command", "function") for token in run[: cuts[-1]])
    if named and any(cuts[0] < separator < cuts[-1] for separator in separators):
        return list(run)
    return list(run[cuts[-1] + 1 :])


def tidy(answer: str) -> str:
    """One spelling for an answer, LaTeX or not: no delimiters, dollar signs, thousands separators or full stop."""
    answer = strip_delimiters(plain_characters(answer))
    answer = re.sub(r"\\(?:left|right|displaystyle|big|Big|bigg|Bigg)(?![A-Za-z])|\\!\s*", "", answer)
    answer = re.sub(r"\\(?:text)?color\s*\{\w+\}|\\underline(?![A-Za-z])", "", answer)
    answer = re.sub(r"\\(?:q?quad)(?![A-Za-z])|(?<!\\)\\[,;: ]|~", " ", answer)
    answer = re.sub(r"\\([dtc])frac(?![A-Za-z])", r"\\frac", answer)
    answer = re.sub(rf"\\(?:{_TEXT_COMMANDS})\s*\{{([^{{}}]*)\}}", r" \1 ", answer)
    answer = re.sub(r"\\[$]|[$]", "", answer.replace("{,}", ",")).replace("\\%", "%").replace("**", "")
    answer = re.sub(r"\s+", " ", answer).strip()
    answer = re.sub(r"(?<=[^.])\.$", "", answer).strip()
    answer = re.sub(r"(?<![\d,.])(\d{1,3}(?:,\d{3})+)(?![\d,]*\d)", lambda match: match[1].replace(",", ""), answer)
    if re.fullmatch(r"[-+]?\d*\.?\d+", answer):
        answer = answer.removeprefix("+")
        sign, digits = ("-", answer[1:]) if answer.startswith("-") else ("", answer)
        whole, _, decimals = digits.partition(".")
        decimals = decimals.rstrip("0")
        answer = f"{sign}{whole.lstrip('0') or '0'}{'.' if decimals else ''}{decimals}"
    return answer
