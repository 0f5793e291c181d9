from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from finemill.artifacts.columns import to_column


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        (["a", "", "\u4f60\u597d", "e\u0301"], pa.string()),
        (["a", None, "", None, *("b" * n for n in range(20))], pa.string()),
        ([[1, 2], [], None, [3]], pa.list_(pa.int32())),
        ([[], []], pa.list_(pa.int32())),
        ([np.array([1, 2], np.int32), None, np.array([], np.int32), np.array([3], np.int64)], pa.list_(pa.int32())),
        ([np.array([1, 2], np.int32), [3, 4]], pa.list_(pa.int32())),
        ([3, -1, 2**40], pa.int64()),
        ([3, None], pa.int64()),
        ([0.5, None], pa.float64()),
        ([True, None, False], pa.bool_()),
        ([], pa.string()),
        ([], pa.list_(pa.int32())),
        ([], pa.int64()),
        ([], pa.bool_()),
        ([None] * 9, pa.bool_()),
        ([True] * 9, pa.bool_()),
    ],
)
def test_a_column_is_what_pyarrow_makes_of_the_values(values: list[Any], kind: pa.DataType) -> None:
    column = to_column(values, kind)
    column.validate(full=True)
    assert column.equals(pa.array(values, kind))
