"""The letter of a choice in an answer, said in any of the ways that models say it."""

import re
import unicodedata

from finemill.rows.answers import after_thinking
from finemill.rows.formulas import boxed, tidy
from finemill.rows.repeats import shorter_repeats

# Words before a letter, in the languages that questions with choices are most often in.
_ANSWER = (
    r"answer|\bans\b|respuesta|réponse|antwort|risposta|resposta|ответ|الجواب|الإجابة|उत्तर|cevap|odpowiedź|đáp án|"
    "jawaban|答案|答え|解答|回答|正解|정답|답|คำตอบ|ตอบ|lösung|solution"
)
# Not the A of l'A, nor the C of C++ or of a C's.
_LETTER = r"(?<![A-Za-z0-9])(?<![A-Za-z]['\u2019])(?P<letter>[A-J])(?!['\u2019]?[A-Za-z0-9])(?![+#])"
# What follows is looked at and not taken, as it may say "answer" again.
_AFTER_ANSWER = re.compile(
    rf"(?i:{_ANSWER})(?=(?P<rest>(?:\s+(?i:is|was))?[^\w\n]{{0,6}}\n\s*[^\n]{{0,20}}|[^\n]{{0,60}}))"
)
_SMALL = re.compile(
    r"(?i:\s+is|\s+was)?[^\w\n]{0,6}(?:(?i:option|choice)\W{1,3})?(?P<letter>[a-j])[)\]}\"'*.]*(?=\s*$|\s*\n)"
)
_IN_REST = re.compile(_LETTER)
_NAMED = (
    # B is the correct answer; option B is best
    re.compile(
        rf"{_LETTER}\W{{0,4}}\s*(?i:is|are|seems|(?:must|should|would|has\s+to)\s+be)\s+(?:the\s+|most\s+)*"
        r"(?i:correct|right|best|true|answer|likely|plausible|accurate|appropriate)"
    ),
    re.compile(
        rf"(?i:\b(?:choose|chose|pick|select|go with|opt for|choice is|option is)\b|[选選](?:择|擇)?(?:选项)?)"
        rf"[^\w\n]{{0,4}}{_LETTER}"
    ),
    re.compile(rf"{_LETTER}\s*(?:选?[项項])?\s*(?:[是为])?\s*最?(?:正确|正確|对的|對的|符合题意)"),
    re.compile(rf"(?:正确|正確)(?:的|选项|選項)?\s*(?:是|为|為)[^\w\n]{{0,4}}{_LETTER}"),
    re.compile(rf"(?:選択肢|선택지)[^\w\n]{{0,4}}{_LETTER}"),
    re.compile(
        rf"(?i:\b(?:opción|alternativa|letra|opzione|variante|вариант)\b(?:\s+correcta)?(?:\s+(?:es|é|è))?(?:\s+la)?)"
        rf"[^\w\n]{{1,4}}{_LETTER}"
    ),
    re.compile(rf"(?i:\bleav(?:es|ing)(?:\s+(?:us\s+with|only|option))*)\s+\W{{0,3}}{_LETTER}(?=\W*$|[.,;])"),
    re.compile(rf"^{_LETTER}\s+it\s+is\b"),
    re.compile(rf"\bI(?i:['\u2019]d|\s+would)?\s+(?i:say|guess)\s+\W{{0,3}}{_LETTER}(?=\W*$|[.,;:)\n])"),
    re.compile(rf"(?i:\b(?:option|choice|letter))[\s\"':]+\W{{0,3}}{_LETTER}"),
    re.compile(r"(?i:\b(?:option|choice|letter))\s+\W{0,3}(?P<letter>[a-j])(?=[)\].:,*]*(?:\s*$|\s*\n))"),
)
_AT_START = re.compile(
    r"\W{0,5}(?P<letter>[A-Ja-j])(?:[)\]}>]|[.:,](?=\s|$|[^\x00-\x7f])|\u3001|[^\w+#]{0,5}$"
    r"|\s+[-\u2013\u2014]\s|\s+(?i:because|since)\b)"
)
_AT_END = re.compile(
    rf"(?:\b(?i:is|be|was|therefore|thus|hence|so)\b,?|['\u2019]s\b|[:=]|->|\u2192)[\s*_(\[\"'`$]{{0,5}}{_LETTER}[^\w]*$"
)
# A letter as the last line, or the last sentence.
_CLOSING = re.compile(r"(?:\n|[.!?]\s)\s*[*_(\[]{0,3}(?P<letter>[A-J])[)\].*_]{0,3}\s*$")
_LISTED = re.compile(r"(?:^|(?<=[\s*]))\(?(?P<letter>[A-J])(?:[.:]|\)|(?=\s*$))(?=[\s*]|$)", re.MULTILINE)
_NEGATED = re.compile(
    r"(?i)(?:\b(?:not|cannot|never|neither|nor|rather than|except)\b|n['\u2019]t|不是|不选)\W*(?:\w+\s+)?\W*$"
)
_DENIED_AFTER = re.compile(
    r"\W{0,4}\s*(?:选?[项項])?\s*(?i:(?:(?:is|are|was|could|would|does|do|ca)n['\u2019]t|cannot)\b"
    r"|(?:is|are|was|could|would|does|do|can)\s+(?:not|incorrect|wrong|false|ruled\s+out|impossible)\b"
    r"|incorrect|wrong|不|错|錯)"
)
# A letter that is part of a name: vitamin C, 5 C.
_NAMED_BY_IT = re.compile(
    r"(?i:\d\s*|\b(?:vitamin|hepatitis|plan|grade|type|group|class|point|figure|table|part|section|step|case|vector|angle"
    r"|set|event|circle|matrix|team|line|block|schedule)\s+)$"
)
_LONGEST_BEFORE = 100
"""Characters before a letter in which it may be denied."""
_JOINED_BEFORE = re.compile(r"(?<![A-Za-z0-9])[A-J]\W{0,3}\s*(?:\bor\b|\band\b|或|和|/|&|,|\u3001)\W{0,3}$")
_JOINED = re.compile(r"\W{0,3}\s*(?:\bor\b|\band\b|或|和|/|&|,|\u3001)\W{0,3}[A-J](?![A-Za-z0-9'\u2019])")


def read_letter(text: str) -> str | None:
    """The letter, A to J, that `text` gives as its answer; None if it gives none, or several.

    A box counts first, then what follows the word for answer, then other phrases; a letter alone in a sentence is as
    often an article or a name.
    """
    body = unicodedata.normalize("NFKC", after_thinking(shorter_repeats(text)))
    box = boxed(body)
    if box is not None:
        inside = tidy(box)
        return _alone(inside) or (read_letter(inside) if len(inside) > 1 and boxed(inside) is None else None)
    for mark in reversed(list(_AFTER_ANSWER.finditer(body))):
        small = _SMALL.match(mark["rest"])
        found = small["letter"].upper() if small else _first_said(mark["rest"])
        if found is not None:
            return found or None
    for pattern in _NAMED:
        said = [match for match in pattern.finditer(body) if _is_meant(match, body)]
        if said and not _JOINED.match(body, said[-1].end("letter")):
            if _JOINED_BEFORE.search(body[: said[-1].start("letter")]):
                return None
            return said[-1]["letter"].upper()
    last = _AT_END.search(body)
    lines = body.strip().split("\n")
    if [match["letter"] for match in _LISTED.finditer(body)][:2] == ["A", "B"]:
        # The question's own choices, and perhaps one of them below.
        alone = re.fullmatch(r"\W*([A-J])\W*", lines[-1])
        return alone[1] if alone and not lines[-2].strip() else None
    closing = _CLOSING.search(body)
    first = _alone(tidy(body)) or _alone(tidy(lines[0])) or (closing["letter"] if closing else None)
    return first or (last["letter"] if last and _is_meant(last, body) else None)


def read_letters(text: str) -> frozenset[str] | None:
    """The letters of a question with several right choices: `A, C`, `(A, C)`, `A and C`, `AC` in their order."""
    plain = text.strip(" ().")
    parts = re.split(r"\s*(?:,|;|\u3001|&|/|\band\b|和|\s)\s*", plain)
    if len(parts) == 1 and re.fullmatch("[A-J]{2,}", plain) and list(plain) == sorted(set(plain)):
        return frozenset(plain)
    letters = [part.strip("()") for part in parts if part]
    return frozenset(letters) if len(letters) > 1 and all(re.fullmatch("[A-J]", one) for one in letters) else None


def _is_meant(match: re.Match[str], text: str) -> bool:
    """Whether the letter of `match` is neither denied nor a part of a name."""
    before = text[max(0, match.start("letter") - _LONGEST_BEFORE) : match.start("letter")]
    return not (
        _NEGATED.search(before) or _NAMED_BY_IT.search(before) or _DENIED_AFTER.match(text, match.end("letter"))
    )


def _alone(text: str) -> str | None:
    """The letter that a text is or begins with, as a list's mark is written."""
    match = _AT_START.match(text.strip())
    end = match.end("letter") if match else 0
    denied = _JOINED.match(text.strip(), end) or _DENIED_AFTER.match(text.strip(), end)
    several = read_letters(text)
    return match["letter"].upper() if match and not denied and not several else None


def _first_said(rest: str) -> str | None:
    """The first letter that is not denied; "" for several in a row, None for none."""
    for match in _IN_REST.finditer(rest):
        if _JOINED.match(rest, match.end()):
            return ""
        article = match["letter"] in "AI" and re.match(r"\s+[a-z]", rest[match.end() :])
        if not article and _is_meant(match, rest):
            return match["letter"]
    return None
