"""One spelling of an answer for comparing it: without looks and remarks, powers of habit as LaTeX has them."""

import re
import unicodedata

from finemill.rows.bounds import spelled_bound
from finemill.rows.characters import plain_characters
from finemill.rows.formulas import strip_delimiters
from finemill.rows.numerals import in_digits

_TEXT = r"\\(?:text|textbf|textrm|textit|textsf|textnormal|mathrm|mathbf|mbox)\s*"
# What only changes how a formula looks, with its argument where it has one.
_LOOKS = re.compile(
    r"\\(?:left|right|displaystyle|textstyle|limits|big|Big|bigg|Bigg|bf|rm|it|sf|tiny|small|normalsize|large|Large|LARGE"
    r"|huge|Huge|underline|bigl|bigr|Bigl|Bigr)(?![A-Za-z])|\\!\s*"
    r"|\\(?:hspace|vspace|hskip|phantom|hphantom|vphantom|label|tag)\*?\s*\{[^{}]*\}|\\(?:text)?color\s*\{\w+\}"
)
_SPACES = re.compile(r"(?<!\\)\\(?:[,;: ]|(?:q?quad|enspace|thinspace|space)(?![A-Za-z]))")
_CHOICE_BEFORE = re.compile(rf"^\s*(?:{_TEXT}\{{)?\s*\([A-J]\)\s*\}}?\s*(?=\S)")
_TEXT_AT_START = re.compile(rf"^{_TEXT}\{{(?P<inside>[^{{}}]*[^\W_][^{{}}]*)\}}")
_WHY = re.compile(r"\s*(?:\\text\{)?\s*\((?:since|because|as|i\.e\.)(?![A-Za-z]).*\)\s*\}?$", re.DOTALL)
# The counting number of a formula that has a value for each.
_FOR_INTEGERS = re.compile(
    rf"\s*[,;]?\s*\(?\s*(?:(?:{_TEXT}\{{)?\s*(?:where|for|with|for\s+all)\s*\}}?)?\s*[kmn]\s*\\in\s*"
    r"(?:\\mathbb\s*\{?[ZN]\}?(?:\^\{?[+*]\}?)?|[ZN])\s*\)?$"
)
_NUMBER = r"(?P<number>\d+(?:\.\d+)?)\s*(?:\\text\{\s*)?"
_SPOKEN = (
    (re.compile(rf"^{_NUMBER}squared\b\s*\}}?$"), r"\g<number>^2"),
    (re.compile(rf"^{_NUMBER}cubed\b\s*\}}?$"), r"\g<number>^3"),
    (re.compile(rf"^{_NUMBER}factorial\b\s*\}}?$"), r"\g<number>!"),
    (re.compile(rf"^{_NUMBER}(?P<unit>degrees\s+)?below\s+zero\b\s*\}}?$"), r"-\g<number> \g<unit>"),
)
# f(x) = x for all real x: what holds without a condition says so with or without these words.
_FOR_ALL = re.compile(
    r"\s*,?\s*(?:\\(?:text|mathrm|quad)\s*\{?\s*)?,?\s*for\s+(?:all|every|each|any)\b(?:\\(?:text|in|mathbb)(?![A-Za-z])"
    r"|real|positive|natural|rational|non-?negative|integers?|numbers?|values|of|[a-z](?![A-Za-z])|[RZNQ+^{}\s])*[.]?$"
)
_CHOOSE = re.compile(r"\{\s*(?P<above>[^{}]+?)\s*\\choose\s*(?P<below>[^{}]+?)\s*\}")
_COMBINATIONS = re.compile(
    r"(?:\\mathrm\{C\}|C)(?:_\{?(?P<one>\d+)\}?\^\{?(?P<other>\d+)\}?|\^\{?(?P<a>\d+)\}?_\{?(?P<b>\d+)\}?"
    r"|\(\s*(?P<n>\d+)\s*,\s*(?P<k>\d+)\s*\))"
)
_ORDINAL = re.compile(rf"^(?P<number>\d+)\s*(?:\^\s*\{{?\s*)?(?:{_TEXT}\{{\s*)?(?:st|nd|rd|th)\s*\}}*$")
_UNIT_FRACTION = re.compile(
    rf"(?<=[\d}} ])\\[dt]?frac\s*\{{\s*{_TEXT}\{{(?P<above>[A-Za-z]+)\}}\s*\}}"
    rf"\s*\{{\s*{_TEXT}\{{(?P<below>[A-Za-z]+)\}}(?P<power>\^\{{?[23]\}}?)?\s*\}}$"
)
_SYNONYMS = (("wedge", "land"), ("vee", "lor"), ("lnot", "neg"), ("to", "rightarrow"), ("gets", "leftarrow"))
# Set signs as they are typed: [1,2] U (3, inf).
_UNION_SIGN = re.compile(r"(?<=[\])}])\s*(?:U|union)\s*(?=\\?[\[({])")
_INFINITE_END = re.compile(r"(?<=[-(\[,+ ])(?:inf(?:ty|inity)?|oo)(?=\s*[,)\]])", re.IGNORECASE)
_HATTED = re.compile("[\u00ee\u0135]|[ijk]\u0302")
_TRANSPOSED = re.compile(r"^(?P<row>[\[(][^\[\]()]*[\])])\s*\^\s*\{?\s*(?:T|\\top|\\mathrm\{T\})\s*\}?$")


def prepared(text: str) -> str:
    """`text` in the spelling that answers are compared in, the letter of its choice left out: `(A) 5` as `5`."""
    text = re.sub(r"\bper\s+cent\b", "percent", strip_delimiters(plain_characters(text)))
    text = re.sub(r"(?<=[\w)])\s?\*\*\s?(?=[\w(-])", "^", text)
    for pattern, replacement in _SPOKEN:
        text = pattern.sub(replacement, text)
    text = _SPACES.sub(" ", _LOOKS.sub("", text)).strip().rstrip(",;").strip()
    text = _TEXT_AT_START.sub(lambda match: f"{match['inside'].strip()} ", text).strip()
    text = spelled_bound(_FOR_INTEGERS.sub("", _FOR_ALL.sub("", in_digits(_WHY.sub("", text)))))
    text = re.sub(r"^\s*(?:\\(?:approx|sim)(?![A-Za-z])|~)", "", text)
    text = re.sub(r"^(?:\+|positive|plus)?\s*inf(?:inity)?$", r"\\infty", text.strip(), flags=re.IGNORECASE)
    text = re.sub(r"^(?:-|negative|minus)\s*inf(?:inity)?$", r"-\\infty", text, flags=re.IGNORECASE)
    text = _INFINITE_END.sub(r"\\infty", _UNION_SIGN.sub(r" \\cup ", text))
    text = re.sub(r"\\([lr])angle(?![A-Za-z])", lambda match: "(" if match[1] == "l" else ")", text)
    text = re.sub(r"\+\s?/\s?-|\+-(?=\s?\d)", r"\\pm ", text)
    text = re.sub(r"\s*(?:\.\.\.|\\[lc]?dots(?![A-Za-z]))\s*(?=,)", r"\\ldots", text)
    text = re.sub(r"\\([lg]e)qslant(?![A-Za-z])", r"\\\1", text)
    text = _CHOOSE.sub(r"\\binom{\g<above>}{\g<below>}", text)
    text = re.sub(r"\\[dt]binom(?![A-Za-z])", r"\\binom", text)
    text = _COMBINATIONS.sub(_as_binomial, text)
    text = re.sub(r"\\(?:hat|vec|mathbf|bm|boldsymbol)\s*\{?\\?([ijk])(?:math)?\}?(?![A-Za-z])", r"\\mathbf{\1}", text)
    text = re.sub(r"\\mathbf\{\\mathbf\{([ijk])\}\}", r"\\mathbf{\1}", _HATTED.sub(_as_unit_vector, text))
    text = re.sub(r"(?<!\\log)_\{(\d+)\}", r"_\1", text)
    for one, other in _SYNONYMS:
        text = re.sub(rf"\\{one}(?![A-Za-z])", rf"\\{other}", text)
    text = re.sub(r"\\text\{\s*\(mod\s*\}", r"(mod ", text)
    text = _UNIT_FRACTION.sub(r" \\text{\g<above>/\g<below>}\g<power>", text)
    text = re.sub(r"(?<![\w})])\+\s*(?=\\infty)", "", text)
    text = re.sub(r"\\(?:lbrace|rbrace)(?![A-Za-z])", lambda match: "\\{" if match[0] == "\\lbrace" else "\\}", text)
    text = re.sub(r"(?<=[^.])\.$", "", text.strip()).strip()
    return _TRANSPOSED.sub(r"\g<row>", _ORDINAL.sub(r"\g<number>", text.replace("{,}", ",")))


def without_choice(text: str) -> str:
    """`text` without the letter of a choice in brackets before the answer."""
    return _CHOICE_BEFORE.sub("", text)


def _as_unit_vector(match: re.Match[str]) -> str:
    return f"\\mathbf{{{unicodedata.normalize('NFD', match[0])[0]}}}"


def _as_binomial(match: re.Match[str]) -> str:
    # Some write the larger number below, some above; which one it is leaves no doubt.
    numbers = sorted(int(number) for number in match.groups() if number)
    return f"\\binom{{{numbers[1]}}}{{{numbers[0]}}}"
