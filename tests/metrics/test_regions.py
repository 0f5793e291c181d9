import pytest

from finemill.metrics.regions import same_region


def order(one: str, other: str) -> int | None:
    """Of plain numbers."""
    try:
        return (float(one) > float(other)) - (float(one) < float(other))
    except ValueError:
        return None


@pytest.mark.parametrize(
    ("gold", "said", "same"),
    [
        ("[1,3]", r"[1,2] \cup [2,3]", True),
        ("[1,3]", r"[1,2) \cup (2,3]", False),
        (r"(0,1) \cup (1,\infty)", r"x > 0, x \ne 1", True),
        ("(0,2)", r"(-1,2) \cap (0,3)", True),
        ("(1,2)", "(1,2)", None),
        ("(a,b)", r"(a,c] \cup [c,b)", None),
        (r"x < 1 \text{ or } x > 3", "x < 1, x > 3", None),
        (r"[1,2] \cup [4,3]", "[1,2]", None),
    ],
)
def test_sets_are_compared_by_what_they_hold_where_that_is_certain(gold: str, said: str, same: bool | None) -> None:
    assert same_region(gold, said, order) is same
