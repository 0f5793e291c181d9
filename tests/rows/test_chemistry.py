import pytest

from finemill.rows.answers import final_answer
from finemill.rows.chemistry import chemical_spelling


@pytest.mark.parametrize("text", [r"\mathrm{Ca(OH)_2}", "Ca(OH)_{2}", r"\ce{Ca(OH)2}", r"\text{Ca}(\text{OH})_2"])
def test_a_substance_has_one_spelling(text: str) -> None:
    assert chemical_spelling(text) == "Ca(OH)2"


@pytest.mark.parametrize("text", ["CHF 10", "Paris", "x + 2", "12", "", "Ca(OH"])
def test_other_texts_have_none(text: str) -> None:
    assert chemical_spelling(text) is None


@pytest.mark.parametrize(
    ("text", "answer"),
    [("The gas is CO2.", "CO2"), ("It makes 44 g of CO2.", "44"), ("Let BC_1 = 5, so the sum is 7.", "7")],
)
def test_a_substance_is_an_answer_where_no_number_is(text: str, answer: str) -> None:
    assert final_answer(text) == answer
