"""Choices and labels: which of the known ones a text gives, accuracy per row, and the F1 of all rows."""

import re
from collections.abc import Iterable, Sequence

from finemill.metrics.letters import read_letter
from finemill.rows.answers import after_thinking, find_answer
from finemill.rows.formulas import tidy
from finemill.rows.repeats import shorter_repeats

_DENIED = re.compile(r"(?:\b(?:not|never|neither|nor|cannot be|rather than)|n['\u2019]t|不是|并非|不)(?:\s+be)?\s*$")
# The no of "no idea" is no answer.
_NO_NOUN = r"(?!\s+(?!(?:it|they|he|she|there|this|because)\b)\w)"
# The whole of a scale: 4 out of 5, 4/5.
_OUT_OF = re.compile(r"(?<=\d)\s*(?:out\s+of|/)\s*\d+")
_MARKED = re.compile(r"(?i)\b(?:answer|label|category|class|sentiment)\s*(?:is|:)\s*(?P<said>[^.,;!]+)")
_LETTER = re.compile(r"\(?([A-Za-z])(?:\)|[.:)](?=\s|$)|$)")


def read_label(text: str, labels: Sequence[str]) -> str | None:
    """The one of `labels` that `text` gives as its answer, without regard to case; None if it gives none or several.

    Letters by `read_letter`. Other labels are looked for in the final answer, then at the start; otherwise it is the
    only one that occurs as a word and is not denied.
    """
    if all(re.fullmatch("[A-J]", label) for label in labels):
        choice = read_letter(text)
        return choice if choice in labels else None
    by_name = {_plain(label): label for label in labels}
    text = shorter_repeats(text)
    if all(label.isdigit() for label in labels):
        text = _OUT_OF.sub("", text)
    found = find_answer(text)
    body = _plain(after_thinking(text))
    line = after_thinking(text).split("\n")[0]
    openings = [body, _plain(line), _plain(re.split(r"[.!](?=\s)", line)[0])]
    marked = _MARKED.search(line)
    if marked:
        openings.append(_plain(marked["said"]))
    for said in [_plain(found.text), *openings] if found else openings:
        letter = _LETTER.match(said)
        for name in (said, letter[1] if letter else said):
            if name in by_name:
                return by_name[name]
    words = _said_names(by_name, body)
    return by_name[words[0]] if len(words) == 1 else None


def _said_names(names: Iterable[str], body: str) -> list[str]:
    """The names that occur in `body` outside longer ones and without being denied."""
    # A letter alone is as often an article or a name as a choice. Longer names first, and then not seen again.
    found = []
    for name in sorted((name for name in names if len(name) > 1), key=len, reverse=True):
        # Words of scripts without spaces end anywhere.
        edges = (r"(?<!\w)", r"(?!\w)") if name.isascii() else ("", "")
        pattern = re.compile(f"{edges[0]}{re.escape(name)}{edges[1]}{_NO_NOUN if name == 'no' else ''}")
        said = [match for match in pattern.finditer(body) if not _DENIED.search(body[: match.start()])]
        found += [name] if said else []
        body = pattern.sub(" ", body)
    return found


def _plain(text: str) -> str:
    inner = re.fullmatch(r"\(\s*(.*?)\s*\)", tidy(text), re.DOTALL)
    return (inner[1] if inner else tidy(text)).casefold().replace("_", " ").strip(" .*_\"'`[]")


def macro_f1(gold: Sequence[str], said: Sequence[str | None]) -> float:
    """Mean over the labels in `gold` of the F1 of each: 2 hits / (times right + times said)."""
    return sum(_f1(*counts) for counts in _counts(gold, said).values()) / len(set(gold))


def macro_f1_rows(gold: Sequence[str], said: Sequence[str | None]) -> list[float]:
    """A value per row whose mean estimates the macro F1 and whose spread its standard error.

    F1 is no mean over rows. These are the jackknife's pseudo-values, n F1 - (n - 1) F1 without the row (Efron &
    Tibshirani, An Introduction to the Bootstrap, 1993, chapter 11): with them it is compared like any other metric.
    """
    counts = _counts(gold, said)
    total, size = macro_f1(gold, said), len(gold)
    if size < 2:
        return [total] * size
    scores = {label: _f1(*count) for label, count in counts.items()}
    values = []
    for right, other in zip(gold, said, strict=True):
        changed = {label for label in (right, other) if label in counts}
        left_out = dict(scores)
        for label in changed:
            hits, golds, saids = counts[label]
            hit, is_gold, is_said = right == other == label, right == label, other == label
            left_out[label] = _f1(hits - hit, golds - is_gold, saids - is_said)
        if counts[right][1] == 1:
            del left_out[right]
        without = sum(left_out.values()) / len(left_out) if left_out else total
        values.append(size * total - (size - 1) * without)
    return values


def _counts(gold: Sequence[str], said: Sequence[str | None]) -> dict[str, tuple[int, int, int]]:
    """Per label: hits, times right, times said."""
    pairs = list(zip(gold, said, strict=True))
    return {
        label: (
            sum(right == other == label for right, other in pairs),
            sum(right == label for right, _ in pairs),
            sum(other == label for _, other in pairs),
        )
        for label in sorted(set(gold))
    }


def _f1(hits: int, golds: int, saids: int) -> float:
    return 2 * hits / (golds + saids) if golds + saids else 0.0
