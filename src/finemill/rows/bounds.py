"""Numbers that words around them make bounds or others: `at least 4`, `4 or more`, `至少4`, `half of 4` are not 4."""

import re

# "greater than or equal to" stands before the "greater than" that it holds.
_PREFIXES = {
    r"\ge ": (
        r"\\geq?(?![A-Za-z])|>=|(?:at\s+least|at\s+minimum|an?\s+minimum\s+of|(?:no|not)\s+(?:less|fewer|lower)\s+than"
        r"|(?:greater|more|larger|bigger|higher)\s+than\s+or\s+equal\s+to|mindestens|wenigstens|au\s+moins|al\s+menos"
        r"|por\s+lo\s+menos|como\s+mínimo|pelo\s+menos|almeno|не\s+менее|как\s+минимум|على\s+الأقل)\b"
        r"|至少[是有为]?|不少于|不小于|不低于|少なくとも|적어도|최소"
    ),
    r"\le ": (
        r"\\leq?(?![A-Za-z])|<=|(?:at\s+most|at\s+maximum|an?\s+maximum\s+of|up\s+to|(?:no|not)\s+(?:more|greater|larger|higher)\s+than"
        r"|(?:less|fewer|smaller|lower)\s+than\s+or\s+equal\s+to|höchstens|maximal|au\s+plus|au\s+maximum"
        r"|como\s+máximo|a\s+lo\s+sumo|no\s+máximo|al\s+massimo|не\s+более)\b|最多[是有为]?|至多|不超过|不大于|不多于"
        r"|多くても|최대"
    ),
    ">": (
        r"\\gt(?![A-Za-z])|(?<![=-])>|(?:(?:greater|more|larger|bigger|higher)\s+than|(?:(?:just|slightly)\s+)?(?:over|above)|mehr\s+als|größer\s+als|plus\s+de|más\s+de"
        r"|mais\s+de|più\s+di|более|أكثر\s+من)\b|大于|多于|超过"
    ),
    "<": (
        r"\\lt(?![A-Za-z])|<|(?:(?:less|fewer|smaller|lower)\s+than|(?:(?:just|slightly)\s+)?(?:under|below)|not\s+quite|nearly|almost|weniger\s+als|kleiner\s+als|fast|moins\s+de"
        r"|presque|menos\s+de|casi|meno\s+di|менее|почти|أقل\s+من)\b|小于|少于|不到|将近"
    ),
}
_SUFFIXES = {
    r"\ge ": r"\s+(?:or\s+(?:more|greater|higher|above|larger)"
    r"|oder\s+mehr|ou\s+plus|o\s+más|at\s+(?:least|minimum)|plus(?=\W*$))\b|以上|이상|\+",
    r"\le ": r"\s+(?:or\s+(?:less|fewer|lower|below|smaller)"
    r"|oder\s+weniger|ou\s+moins|o\s+menos|at\s+(?:most|maximum))\b|以下|以内|이하",
    "<": "未満|미만",
}
_FRONT = "|".join(f"(?P<f{place}>{phrases})" for place, phrases in enumerate(_PREFIXES.values()))
_BACK = "|".join(f"(?P<b{place}>{phrases})" for place, phrases in enumerate(_SUFFIXES.values()))
_BEFORE = re.compile(rf"(?:{_FRONT})\s*(?=[-$\\(]?[-\d\\.$])", re.IGNORECASE)
_ENDS_BEFORE = re.compile(rf"(?:(?<=\W)|(?<=[^\x00-\x7f])|^)(?:{_FRONT})[\s*_$(]*$", re.IGNORECASE)
_AFTER = re.compile(rf"(?:{_BACK})(?=[\s.,;!)*$]|$)", re.IGNORECASE)
# Of "over 4 weeks" and "up to 4" in a sentence the number is as often no answer at all.
_PLAIN = re.compile(r"(?:^|\b(?:is|are|was|were|be|takes?|needs?|costs?|[=:])|[:=])\W*$", re.IGNORECASE)
_LOOSE = re.compile(r"[\\<>]|over|above|under|below|up\s+to|fast", re.IGNORECASE)
_OTHER_BEFORE = re.compile(
    r"\b(?:half|twice|double|triple|thrice|log|(?:(?:square|cube)(?:\s+root)?|roots?|multiples?|factors?|divisors?"
    r"|powers?|reciprocal)\s+of|divisible\s+by)\s+(?:of\s+)?[*_$(]*$",
    re.IGNORECASE,
)
_OTHER_AFTER = re.compile(r"\s+(?:of\s+[a-z](?![A-Za-z])|factorial\b|(?:degrees\s+)?below\s+zero\b)", re.IGNORECASE)
_LONGEST = 48


def with_its_words(text: str, start: int, end: int) -> tuple[int, int]:
    """Where the number from `start` to `end` of a text and the words that make it another begin and end."""
    window = text[max(0, start - _LONGEST) : start]
    before = _ENDS_BEFORE.search(window)
    if before and (not _LOOSE.match(before[0]) or _PLAIN.search(window[: before.start()])):
        start -= len(window) - before.start()
    elif other := _OTHER_BEFORE.search(window):
        start -= len(window) - other.start()
    after = _AFTER.match(text, end) or _OTHER_AFTER.match(text, end)
    return start, after.end() if after else end


def spelled_bound(answer: str) -> str:
    r"""An answer that is a bound as a relation, `at least 4` and `4 or more` as `\ge 4`; any other as it is."""
    before = _BEFORE.match(answer)
    if before:
        place = next(place for place in range(len(_PREFIXES)) if before[f"f{place}"])
        return f"{list(_PREFIXES)[place]}{answer[before.end() :]}"
    after = re.search(rf"(?<=\w)(?:{_BACK})(?=\s*[A-Za-z]*$)", answer, re.IGNORECASE)
    if after and answer[:1].isdigit():
        place = next(place for place in range(len(_SUFFIXES)) if after[f"b{place}"])
        return f"{list(_SUFFIXES)[place]}{answer[: after.start()]}{answer[after.end() :]}"
    return answer
