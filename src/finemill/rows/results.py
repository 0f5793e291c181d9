"""The result of a calculation that a sentence tells, and the circumstances it tells around it.

GSM8K's own solutions end as `So he has 5+99=104 games after 3 years.`: the last number is not always the answer.
"""

import re
from collections.abc import Sequence

from finemill.rows.formulas import Span

_WORDS = r"(?:\s+[^\W\d]['\u2019\w-]*)"
_NEAR = _WORDS.replace(r"\s+", r"\s+(?!(?:and|or)\b)")
_OF = (
    r"(?:after|for|in|of|off|from|per|every|each|at|on|by|during|within|between|with|before|across|among|until|that|to"
    r"|over|than|nach|pro|für|pour|par|après|dans|para|por|en|después|tras)"
)
_AMOUNT = r"\s+\$?\d[\d.,/]*(?:%|[A-Za-z]{1,3}\b|(?:-[A-Za-z]+)+)?"
# Words between a result and a circumstance, `liters of water out of the 24 liters`; and one more, `and 4 packets`.
# Which of several prepositions a circumstance begins with changes nothing of its end: no second try, or n numbers take
# 2^n of them.
_CIRCUMSTANCES = re.compile(
    rf"(?>{_WORDS}{{0,9}}?(?:\s+{_OF}{_NEAR}{{0,4}}(?<!\sto){_AMOUNT}|{_AMOUNT}\s+\w+\s+(?:from\s+now|ago|later|earlier)))"
    rf"(?>{_WORDS}{{0,6}}\s+(?:and|or|{_OF}){_NEAR}{{0,3}}(?<!\sto){_AMOUNT}(?!\s+{_OF}\b))*+{_WORDS}{{0,12}}+\s*[.!]?\s*",
    re.IGNORECASE,
)
# A word that has something else be the result.
_ANOTHER = re.compile(
    r"(?i)(?<!\bto\s)\b(?:is|are|was|were|be|becomes?|leaving|leaves|so|then|thus|therefore|but|however|needs?|gets?"
    r"|equals?|makes|(?:plus|minus|times)(?=\s+\$?\d)|half|twice|which|while|because|since|if|has|have|had|giving|gives"
    r"|total(?:s|\s+of)|totall?ing|means|costs|takes|not|enough|ist|sind|est|sont|es|son)\b"
)
# Eight eggs for $24: either may be asked for.
_PRICE = re.compile(r"\b(?:for|at|costing)\W+\$")
_SENTENCE_END = re.compile(r"[.!?]\s+\S|\n\s*\S")
# It takes 15 hours to clean 45 rooms.
_TAKEN = re.compile(
    r"\b(?:takes?|took|needs?|needed|requires?|required)\s+(?P<result>\$?\d[\d.,]*)"
    rf"(?P<tail>{_WORDS}{{1,6}}\s+to\s+(?!get\b|reach\b).*)$",
    re.IGNORECASE,
)
_BECAUSE = re.compile(r"(?i)(?<=[^\s.!?:])(?:,?[ \t]+because|,[ \t]+since)\b[^\n]*$")
_LONGEST = 240


def without_circumstances(text: str, found: Sequence[Span]) -> list[Span]:
    """The formulas of a text up to its result: without those that only say when, for whom or of what it is one.

    The result follows an equals sign in the last sentence, or is what something takes. What follows must be no more
    than words, a preposition and a number; any verb or comma that might begin another result leaves all as it is.
    """
    kept = list(found)
    because = _BECAUSE.search(text[-_LONGEST:])
    if because:
        start = max(0, len(text) - _LONGEST) + because.start()
        before = [span for span in kept if span.end <= start]
        if before and not _SENTENCE_END.search(text[before[-1].end : start]):
            return before
    for place in reversed(range(len(kept))):
        span = kept[place]
        if len(text) - span.end > _LONGEST:
            break
        if not text[max(0, span.start - _LONGEST) : span.start].rstrip().endswith("="):
            continue
        tail = text[span.end :]
        if _SENTENCE_END.search(tail):
            break
        return kept[: place + 1] if place + 1 < len(kept) and _is_circumstance(tail) else kept
    taken = _TAKEN.search(text[-_LONGEST:])
    if taken and _is_circumstance(taken["tail"]):
        start = max(0, len(text) - _LONGEST) + taken.start("result")
        return [span for span in kept if span.start <= start] or kept
    return kept


def _is_circumstance(tail: str) -> bool:
    """Whether a sentence goes on without another result."""
    return not _ANOTHER.search(tail) and not _PRICE.search(tail) and _CIRCUMSTANCES.fullmatch(tail) is not None
