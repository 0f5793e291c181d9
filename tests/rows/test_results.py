import pytest

from finemill.rows.answers import final_answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("So he has 5+99=104 games after 3 years.", "104"),
        ("You will save $4 + $2 = $6 for 2 tubs of ice cream and 4 packets of milk.", "6"),
        ("It would take 15 hours to clean 45 rooms.", "15 hours"),
        ("He can make 1600 sticks because 1600 > 1200", "1600"),
        ("5+3 = 8, and half of that is 4.", "4"),
        ("They have 5+3 = 8 apples but need 12.", "12"),
        ("She buys 2*4 = 8 eggs for $24.", "24"),
        ("They have 5*3 = 15 in the red box and 3 in the blue box.", "3"),
        ("That is 10*3 = 30 miles.\nIn 6 hours he walks 5 of them.", "5"),
    ],
)
def test_circumstances_after_a_result_are_no_answer_and_another_result_is(text: str, answer: str) -> None:
    assert final_answer(text) == answer
