from finemill.components.eval.regression import read_regression_set, score_regression
from finemill.models.base.resolve import BUILTIN_MODELS
from finemill.models.generation import Answer

RIGHT = {
    "instructions-05": '{"name": "Ada"}',
    "instructions-11": "Rain falls in May. Rain fills the barrel.",
    "instructions-13": "B",
    "arithmetic-12": "It is 5/6.",
    "reading-01": "Lisbon.",
    "reading-10": "No, nobody does.",
}
WRONG = {
    "instructions-05": '{"name": "Bob"}',
    "instructions-13": "The horse",
    "arithmetic-12": "2/5",
    "reading-10": "Yes.",
}


def test_each_question_knows_right_from_wrong() -> None:
    from transformers import AutoTokenizer

    questions = read_regression_set(AutoTokenizer.from_pretrained(BUILTIN_MODELS["builtin:tiny-qwen3"]))
    by_id = {row.id: row for row in questions.rows}
    assert len(by_id) == 45
    assert {key: by_id[key].is_right("", Answer(said, 3, True)) for key, said in RIGHT.items()} == dict.fromkeys(
        RIGHT, True
    )
    assert not any(by_id[key].is_right("", Answer(said, 3, True)) for key, said in WRONG.items())
    assert not by_id["instructions-05"].is_right("", Answer(RIGHT["instructions-05"], 3, False))
    answers = [Answer(RIGHT.get(row.id, "no idea"), 3, True) for row in questions.rows]
    silent = [Answer("", 1, True)] * 45
    metrics = score_regression(questions, {"base": answers, "tuned": silent})
    assert metrics["eval/base/regression/accuracy"] == 6 / 45
    assert metrics["eval/delta/regression/reading"] == -2 / 15
