import pytest

from finemill.metrics.unit_vectors import components, read_unit_vector


def test_components_are_read_by_their_axes() -> None:
    assert read_unit_vector(r"2i - \sqrt{3}j") == {"i": "2", "j": r"-\sqrt{3}"}
    assert read_unit_vector(r"-\mathbf{k}") == {"k": "-1"}


@pytest.mark.parametrize("text", ["5i", "2i + 3", "2i + 3i", "2ij + k", "i^2 + j", ""])
def test_other_formulas_are_no_vectors(text: str) -> None:
    assert read_unit_vector(text) is None


def test_a_vector_with_a_height_does_not_lie_in_the_plane() -> None:
    assert components({"i": "1", "k": "2"}, 3) == ("1", "0", "2")
    assert components({"i": "1", "k": "2"}, 2) is None
