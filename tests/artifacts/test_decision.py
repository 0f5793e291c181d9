from pathlib import Path

import pytest

from finemill.artifacts.decision import Decision, GateResult, read_decision, write_decision
from finemill.errors import UserError


def test_a_decision_survives_its_file(tmp_path: Path) -> None:
    decision = Decision(
        registered_model_name="math",
        version=2,
        champion_before=None,
        promoted=True,
        summary="@champion, the first",
        confidence=0.95,
        gates=(GateResult(metric="loss", rule="better than base", passed=True, value=0.5, other=2.0, num_rows=8),),
        evaluation="file:///e@sha256:0",
        champion_evaluation=None,
    )
    write_decision(tmp_path, decision)
    assert read_decision(tmp_path) == decision


def test_a_missing_decision_says_who_writes_it(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"decision\.json not found: promote writes it"):
        read_decision(tmp_path)
