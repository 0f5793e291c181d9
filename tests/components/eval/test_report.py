"""The page needs nothing but itself, and shows what a model wrote as text."""

import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from finemill.artifacts.adapter import TrainingRecord, write_training
from finemill.artifacts.chain import ChainLink
from finemill.artifacts.evaluation import Sample
from finemill.artifacts.metrics import ModelName
from finemill.components.eval.chart import nice_ticks, training_chart
from finemill.components.eval.config import EvalConfig
from finemill.components.eval.metrics import summarize
from finemill.components.eval.others import summarize_others
from finemill.components.eval.report import segments, write_reports
from finemill.runtime.context import StepContext

HOSTILE = '<script>alert("x")</script><img src=https://example.org/x onerror=alert(1)>" data-x="'


def make_sample(model: ModelName, right: bool, text: str = HOSTILE) -> Sample:
    return Sample(
        id=HOSTILE, source=f"src{HOSTILE}", model=model, prompt=HOSTILE, completion=text, reference=HOSTILE, answer="7",
        final_answer=text, exact_match=right, loss=1.0, num_tokens=3, num_generated_tokens=5, finished=True,
        format_ok=True,
    )  # fmt: skip


def history(*entries: dict[str, float]) -> TrainingRecord:
    return TrainingRecord(max_steps=5, log_history=entries)


def link(name: str, against: str) -> ChainLink:
    return ChainLink(
        name=name, against=against, kl=0.03, kl_error=0.001, perplexity=2.8, loss_change=-0.01, loss_change_error=0.001,
        same_token=0.94, same_token_error=0.01, positions=90,
    )  # fmt: skip


@pytest.fixture
def page(tmp_path: Path, step_context: StepContext) -> str:
    base = [make_sample("base", right) for right in (False, False, True)]
    tuned = [make_sample("tuned", right) for right in (True, False, True)]
    write_training(tmp_path, history(*({"step": step, "loss": 3 / step} for step in range(1, 6))))
    references = {**step_context.references, "base_model": f"hf://org/{HOSTILE}"}
    write_reports(
        tmp_path,
        base,
        tuned,
        {"merged-q4": base[1:]},
        summarize(base, tuned) | summarize_others(base, {"merged-q4": base[1:]}),
        tmp_path,
        EvalConfig(),
        replace(step_context, references=references),
        [link("merged", HOSTILE), link("Q4_K_M", "merged")],
    )
    return (tmp_path / "report.html").read_text()


class Elements(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_requests_nothing(page: str) -> None:
    elements = Elements()
    elements.feed(page)
    assert not {"link", "img", "iframe", "object", "base"} & set(elements.tags)
    assert not {"src", "href", "srcset", "action"} & {name for name, _ in elements.attributes}
    style = page[page.index("<style>") : page.index("</style>")]
    assert not re.search(r"url\(|@import", style)
    assert elements.tags.count("script") == 1


def test_hostile_text_stays_text(page: str) -> None:
    elements = Elements()
    elements.feed(page)
    assert HOSTILE in elements.text
    assert not any(name.startswith("on") for name, _ in elements.attributes)


def test_a_fixed_problem_is_marked_as_such(page: str) -> None:
    elements = Elements()
    elements.feed(page)
    changes = [value for name, value in elements.attributes if name == "data-change"]
    assert changes == ["fixed", "right", "wrong", "wrong", "fixed", "right"]


def test_the_way_from_training_to_the_file_is_a_table_with_intervals(page: str) -> None:
    elements = Elements()
    elements.feed(page)
    text = " ".join(elements.text.split())
    assert "Q4_K_Magainst merged0.03 ± 0.002" in text
    assert "\N{MINUS SIGN}0.01 ± 0.002" in text


def test_an_answer_that_repeats_the_tuned_model_is_not_written_again(page: str) -> None:
    elements = Elements()
    elements.feed(page)
    assert elements.text.count("word for word as tuned") == 3


def test_the_page_has_the_training_curve(page: str) -> None:
    assert page.count("<polyline") == 1
    assert "<svg" in page


def test_turns_thinking_and_other_marks_are_told_apart() -> None:
    prompt = "<|im_start|>user\nHi\n\nyou<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    assert segments(prompt) == [
        ("role", "user"),
        ("text", "Hi\n\nyou"),
        ("role", "assistant"),
        ("mark", "<think></think>"),
    ]
    assert segments("a<think>b</think>\n\nc<|endoftext|>") == [
        ("text", "a"),
        ("think", "<think>b</think>"),
        ("text", "c"),
        ("mark", "<|endoftext|>"),
    ]
    assert segments("<think>never closed") == [("think", "<think>never closed")]
    llama = "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
    assert segments(llama) == [("mark", "<|begin_of_text|>"), ("role", "user"), ("text", "Hi")]


def test_the_chart_needs_two_finite_losses() -> None:
    assert training_chart(history({"step": 1, "loss": 2.0}, {"step": 2, "loss": float("nan")})) is None
    chart = training_chart(history({"step": 1, "loss": 2.0}, {"step": 4, "loss": 1.0}, {"step": 4, "eval_loss": 1.5}))
    assert chart is not None
    assert [(curve.name, curve.last_value) for curve in chart.curves] == [
        ("training loss", 1.0),
        ("validation loss", 1.5),
    ]
    assert chart.curves[0].last_x == chart.right
    assert chart.top <= chart.curves[0].last_y <= chart.bottom


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0, 7.2, [0, 2, 4, 6, 8]), (0, 153, [0, 50, 100, 150, 200]), (0, 0.03, [0, 0.01, 0.02, 0.03])],
)
def test_ticks_are_round_numbers(low: float, high: float, expected: list[float]) -> None:
    assert nice_ticks(low, high, 5) == expected
