"""The process behind `symbolic.py`: a question about two formulas per line in, a word out. Imports no finemill."""

import json
import logging
import re
import resource
import sys
from typing import Any

_MEMORY_BYTES = 4 << 30


def main() -> None:
    """Answer until standard input ends."""
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
    logging.disable(logging.CRITICAL)
    from math_verify import verify  # noqa: F401 loaded before the first question

    print("ready", flush=True)
    for line in sys.stdin:
        what, one, other = json.loads(line)
        try:
            answer = order(one, other) if what == "order" else "equal" if proven(one, other) else "unequal"
        except Exception:
            answer = "unknown"
        print(answer, flush=True)


def order(one: str, other: str) -> str:
    """Which of two numbers is less."""
    values = _parse(one), _parse(other)
    if any(value is None or value.free_symbols or not value.is_real for value in values):
        return "unknown"
    difference = values[0] - values[1]
    if _is_zero(difference):
        return "equal"
    return "less" if difference.evalf(30) < 0 else "more"


def proven(gold: str, said: str) -> bool:
    """Whether two formulas are equal: Math-Verify says so, and SymPy's difference of the two is zero.

    Math-Verify alone rounds: it takes 1/3 for 0.333333 and one tiny number for another.
    """
    from math_verify import verify
    from sympy import Expr, MatrixBase, MatrixExpr, nsimplify
    from sympy.core.relational import Relational

    if _confuses_cases(gold, said):
        return False
    one, other = _parse(gold), _parse(said)
    if one is None or other is None:
        return False
    one, other = _with_imaginary_unit(one, other)
    if isinstance(one, Relational) and isinstance(other, Relational):
        return one.free_symbols == other.free_symbols and bool(
            verify([one], [other], float_rounding=15, timeout_seconds=None)
        )
    one, other = (value.doit() if isinstance(value, MatrixExpr) else value for value in (one, other))
    if isinstance(one, MatrixBase) and isinstance(other, MatrixBase):
        return one.shape == other.shape and all(
            _is_zero(nsimplify(a - b, rational=True)) for a, b in zip(one.doit(), other.doit(), strict=True)
        )
    if not isinstance(one, Expr) or not isinstance(other, Expr):
        return False
    if not verify([one], [other], float_rounding=15, timeout_seconds=None):
        return False
    return _is_zero(nsimplify(one.doit() - other.doit(), rational=True))


def _with_imaginary_unit(one: Any, other: Any) -> tuple[Any, Any]:
    """Both with i as the imaginary unit where it is the only letter; else it may be an index."""
    from sympy import I

    letters = {symbol for value in (one, other) for symbol in getattr(value, "free_symbols", ())}
    if {str(letter) for letter in letters} != {"i"}:
        return one, other
    return tuple(value.subs(dict.fromkeys(letters, I)) for value in (one, other))


def _confuses_cases(gold: str, said: str) -> bool:
    """Whether one has a variable where the other has the same letter in another case: the parser takes both for one."""
    one, other = (set(re.findall(r"[A-Za-z]", re.sub(r"\\[A-Za-z]+", " ", text))) for text in (gold, said))
    return any(letter.swapcase() in other - one for letter in one - other)


def _is_zero(difference: Any) -> bool:
    from sympy import simplify

    return difference == 0 or simplify(difference) == 0 or difference.equals(0) is True


def _parse(text: str) -> Any:
    from latex2sympy2_extended import NormalizationConfig
    from math_verify import LatexExtractionConfig, parse

    config = NormalizationConfig(basic_latex=True, units=False, malformed_operators=True, nits=False, boxed="none")
    # Letters side by side are a product for LaTeX, and a name only where a command says so.
    text = re.sub(r"(?<![\\A-Za-z])(pi|sqrt|sin|cos|tan|ln|log|exp|infty)(?![A-Za-z])", r"\\\1", text)
    text = re.sub(r"\\sqrt\s*\(([^()]*)\)", r"\\sqrt{\1}", text)
    text = re.sub(r"\\log_(\d{2,})(?=[\s({])", r"\\log_{\1}", re.sub(r"\\lg(?![A-Za-z])", r"\\log_{10}", text))
    found = parse(
        f"${text}$",
        [LatexExtractionConfig(normalization_config=config)],
        fallback_mode="no_fallback",
        parsing_timeout=0,
    )
    return found[0] if found else None


if __name__ == "__main__":
    main()
