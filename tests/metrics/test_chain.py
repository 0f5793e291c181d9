"""Links of the chain from training to a file."""

import math

import pytest

from finemill.artifacts.chain import chain_metrics, chain_table
from finemill.metrics.chain import AnsweredProblem, Position, chain_link


def test_errors_are_of_rows_not_of_positions() -> None:
    alike = [Position(row, kl, 1.0, 1.5, agrees=True) for row, kl in enumerate((0.1, 0.3)) for _ in range(50)]
    link = chain_link("Q4_K_M", "merged", alike)
    assert (link.kl, link.positions) == (pytest.approx(0.2), 100)
    assert link.kl_error == pytest.approx(0.1 / math.sqrt(2))
    assert (link.loss_change, link.loss_change_error) == (0.5, 0.0)
    assert link.perplexity == pytest.approx(math.exp(1.5))
    # All agree, and the next one need not.
    assert link.same_token == 1.0
    assert link.same_token_error > 0
    assert link.same_answer is link.points_change is None


@pytest.mark.parametrize(("lost", "surely"), [(0, False), (1, False), (40, True)])
def test_points_are_surely_lost_only_beyond_chance(lost: int, surely: bool) -> None:
    problems = [AnsweredProblem(same=number >= lost, right_before=True, right=number >= lost) for number in range(100)]
    link = chain_link("Q4_0", "merged", [Position(0, 0.1, 1.0, 1.0, agrees=True)], problems)
    assert link.points_change == -lost
    assert link.same_answer == 1 - lost / 100
    assert (link.points_surely_lost > 0) is surely
    assert link.points_surely_lost < max(lost, 1)


def test_a_table_has_an_interval_for_each_value() -> None:
    problems = [AnsweredProblem(same=True, right_before=None, right=None)]
    (row,) = chain_table([chain_link("F16", "merged", [Position(0, 0.1, 1.0, 1.0, agrees=True)], problems)]).values()
    assert row["against"] == "merged"
    assert "exact match, points" not in row
    assert all("±" in row[name] for name in ("KL, nats per token", "change of loss", "same answer"))


def test_metrics_have_the_names_of_links_and_answers_only_where_there_were_any() -> None:
    positions = [Position(row, 0.1 * row, 1.0, 1.5, agrees=True) for row in range(3)]
    problems = [AnsweredProblem(True, True, False), AnsweredProblem(False, False, False)]
    metrics = chain_metrics(
        [chain_link("16-bit base + adapter", "x", positions), chain_link("Q4_K_M", "merged", positions, problems)]
    )
    assert metrics["chain/16_bit_base_adapter/kl"] == pytest.approx(0.1)
    assert metrics["chain/16_bit_base_adapter/loss_change"] == 0.5
    assert "chain/16_bit_base_adapter/same_answer" not in metrics
    assert metrics["chain/q4_k_m/points_change"] == -50.0
    assert metrics["chain/q4_k_m/points_change_error"] > 0
