"""The final answer of a worked solution, for exact-match scoring."""

import re

_MARKED = re.compile(r"(?:####|[Tt]he (?:final )?answer is:?)\s*(.+)")
_NUMBER = re.compile(r"[-+]?\d[\d,]*(?:\.\d+)?")


def final_answer(text: str) -> str | None:
    r"""The answer that `text` ends with, normalized, or None where there is none.

    Looked for after the thinking block, in this order: the last `\boxed{...}`; what follows the last `####` or
    "the answer is"; the last number. The last rule is deliberately kind: a model is not called wrong for leaving out a
    box. An unfinished thinking block holds no answer.
    """
    if "<think>" in text and "</think>" not in text:
        return None
    text = text.rpartition("</think>")[2]
    boxed = _last_boxed(text)
    if boxed is not None:
        return normalize_answer(boxed)
    marked = _MARKED.findall(text)
    numbers = _NUMBER.findall(marked[-1] if marked else text)
    if numbers:
        return normalize_answer(numbers[0] if marked else numbers[-1])
    return normalize_answer(marked[-1]) if marked else None


def normalize_answer(answer: str) -> str:
    """One spelling for equal answers: no outer spaces, dollar signs or full stop, `1,000` as 1000, `7.0` as 7."""
    answer = answer.strip().strip("$").rstrip(".").strip()
    if _NUMBER.fullmatch(answer):
        answer = answer.replace(",", "").removeprefix("+")
        if "." in answer:
            answer = answer.rstrip("0").rstrip(".")
    return answer


def _last_boxed(text: str) -> str | None:
    r"""Content of the last complete `\boxed{...}`, nested braces included."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    depth = 0
    for position in range(start + len("\\boxed"), len(text)):
        depth += {"{": 1, "}": -1}.get(text[position], 0)
        if depth == 0:
            return text[start + len("\\boxed{") : position]
    return None
