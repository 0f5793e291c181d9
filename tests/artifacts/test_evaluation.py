from dataclasses import fields
from pathlib import Path

import pytest

from finemill.artifacts.evaluation import (
    SCORES,
    Sample,
    SampleScores,
    read_metrics,
    read_sample_scores,
    read_samples,
    write_metrics,
    write_samples,
)
from finemill.artifacts.files import METRICS_FILE
from finemill.artifacts.metrics import MEANS
from finemill.errors import UserError

SAMPLE = Sample(
    id="r", source="s", model="tuned", prompt="p", completion="c", reference="r", loss=0.5, num_tokens=3,
    num_generated_tokens=4, finished=True, format_ok=False,
)  # fmt: skip


def test_samples_survive_the_file_and_their_scores_are_read_alone(tmp_path: Path) -> None:
    write_samples(tmp_path, [SAMPLE])
    assert read_samples(tmp_path) == [SAMPLE]
    (scores,) = read_sample_scores(tmp_path)
    assert scores == SampleScores(**{field.name: getattr(SAMPLE, field.name) for field in fields(SampleScores)})


def test_scores_are_numbers_and_verdicts_not_counts() -> None:
    assert {*MEANS, "loss"} == SCORES


def test_metrics_survive_the_file(tmp_path: Path) -> None:
    write_metrics(tmp_path, {"eval/rows": 8, "eval/base/loss": 1.25})
    assert read_metrics(tmp_path) == {"eval/rows": 8, "eval/base/loss": 1.25}


@pytest.mark.parametrize("text", [None, "[]", "{", '{"eval/rows": "many"}'])
def test_unusable_metrics_are_said_in_a_line(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / METRICS_FILE).write_text(text)
    with pytest.raises(UserError, match="no list of metrics: eval writes it; run eval again"):
        read_metrics(tmp_path)
