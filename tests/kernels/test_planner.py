"""Plans stay within their budget, get no slower with more of it, and say what would fit where nothing does."""

import re

import pytest

from finemill.kernels.decoder_layer import LayerShape, Level
from finemill.kernels.planner import MARGIN, Workload, plan_step

QWEN3_8B = Workload(
    shape=LayerShape(hidden=4096, intermediate=12288, num_heads=32, num_kv_heads=8, head_dim=128, eps=1e-6),
    num_layers=36,
    vocabulary=151936,
    tied=False,
    rank=16,
    quantized=True,
    tokens=16384,
    row=2048,
)
BUDGETS = [6, 8, 12, 24, 48, 90]


def test_plans_fit_their_budget_and_get_no_slower_with_more():
    plans = [plan_step(QWEN3_8B, budget << 30) for budget in BUDGETS]
    assert all(plan.peak <= (budget << 30) * MARGIN for plan, budget in zip(plans, BUDGETS, strict=True))
    seconds = [plan.seconds for plan in plans]
    assert seconds == sorted(seconds, reverse=True)


def test_with_memory_to_spare_nothing_is_computed_twice_or_parked():
    plan = plan_step(QWEN3_8B, 130 << 30)
    assert set(plan.levels) == {Level.ALL}
    assert set(plan.host_levels) == {None}
    assert plan.cached_layers == QWEN3_8B.num_layers


def test_micro_batches_are_whole_rows_that_make_up_the_step():
    for budget in BUDGETS:
        plan = plan_step(QWEN3_8B, budget << 30)
        assert plan.micro_batch % QWEN3_8B.row == 0
        assert QWEN3_8B.tokens % plan.micro_batch == 0


def test_without_host_memory_nothing_is_parked_there():
    plan = plan_step(QWEN3_8B, 12 << 30, allow_host=False)
    assert set(plan.host_levels) == {None}
    assert not plan.embedding_on_host


def test_streaming_the_base_makes_smaller_budgets_possible():
    budget = 4 << 30
    with pytest.raises(ValueError, match="no plan fits"):
        plan_step(QWEN3_8B, budget)
    plan = plan_step(QWEN3_8B, budget, allow_stream=True)
    assert plan.stream_weights
    assert plan.peak <= budget


def test_a_budget_too_small_names_the_size_that_would_do():
    with pytest.raises(ValueError, match="no plan fits") as error:
        plan_step(QWEN3_8B, 1 << 30)
    least = float(re.search(r"leanest needs ([\d.]+) GiB", str(error.value)).group(1))
    assert plan_step(QWEN3_8B, int((least + 0.02) / MARGIN * 2**30)).peak <= (least + 0.02) * 2**30
