"""What a reasoning problem is, whichever family it comes from."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Problem:
    """A question, the equations that lead to its answer, and the unit the answer is given in ("" for a bare number)."""

    question: str
    equations: tuple[str, ...]
    answer: int
    unit: str = ""

    def row(self) -> dict[str, str]:
        """The problem as an OpenMathReasoning row; the thinking block holds one equation a line."""
        thinking = "\n".join(self.equations)
        solution = (
            f"<think>\n{thinking}\n</think>\n\nThe answer is \\boxed{{{self.answer}}}{self.unit and ' '}{self.unit}."
        )
        return {"problem": self.question, "generated_solution": solution, "expected_answer": str(self.answer)}


def product(a: int, b: int) -> str:
    """The equation a * b = ..."""
    return f"{a} * {b} = {a * b}"


def total(a: int, b: int) -> str:
    """The equation a + b = ..."""
    return f"{a} + {b} = {a + b}"


def rest(a: int, b: int) -> str:
    """The equation a - b = ..."""
    return f"{a} - {b} = {a - b}"


def part(a: int, b: int) -> str:
    """The equation a / b = ..., which must leave nothing over."""
    return f"{a} / {b} = {a // b}"
