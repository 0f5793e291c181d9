r"""Matrices and vectors, `\begin{pmatrix}...\end{pmatrix}` or `[[1, 2], [3, 4]]`, by their cells."""

import re

_ENVIRONMENT = re.compile(
    r"(?:\\?[\[(]\s*)?\\begin\{(?:[pbB]?|small)(?:matrix|array)\*?\}(?:\{[clr|\s]*\})?(?P<cells>.*?)"
    r"\\end\{(?:[pbB]?|small)(?:matrix|array)\*?\}(?:\s*\\?[\])])?",
    re.DOTALL,
)
_NESTED = re.compile(r"\[\s*(?P<rows>\[[^\[\]]*\](?:\s*,\s*\[[^\[\]]*\])*)\s*\]")

Matrix = tuple[tuple[str, ...], ...]


def read_matrix(text: str) -> Matrix | None:
    """The cells of a matrix, row by row; None for any other text, a determinant among them."""
    environment = _ENVIRONMENT.fullmatch(text.strip())
    if environment:
        rows = [row for row in re.split(r"\\\\(?:\[[^\]]*\])?|\\cr(?![A-Za-z])", environment["cells"]) if row.strip()]
        return _matrix([row.split("&") for row in rows])
    nested = _NESTED.fullmatch(text.strip())
    if nested:
        return _matrix([row.split(",") for row in re.findall(r"\[([^\[\]]*)\]", nested["rows"])])
    return None


def as_vector(matrix: Matrix) -> tuple[str, ...] | None:
    """The cells of a matrix with one column or one row; None for a larger one."""
    if len(matrix) == 1:
        return matrix[0]
    return tuple(row[0] for row in matrix) if len(matrix[0]) == 1 else None


def _matrix(rows: list[list[str]]) -> Matrix | None:
    cells = tuple(tuple(cell.strip() for cell in row) for row in rows)
    return cells if cells and len({len(row) for row in cells}) == 1 and all(map(all, cells)) else None
