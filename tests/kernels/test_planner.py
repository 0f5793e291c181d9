"""The planner keeps to its budget, spends more memory on less time, and predicts the peaks that were measured."""

from dataclasses import replace

import pytest

from finemill.kernels.decoder_layer import Level
from finemill.kernels.estimate import workload
from finemill.kernels.planner import OPTIMIZER_BYTES, launch_bound, peak_bytes, plan_step

GIB = 1 << 30


def step(model: str = "qwen3-8b", rows: int = 8, row: int = 2048):
    return workload(model, rank=16, quantized=True, rows=rows, row=row)


# Plans that ran on an H200 on 2026-11-24 and their peaks in GiB (results.md): shape, tokens a row, tokens a
# micro-batch, head chunk, levels, parked, decoded weights kept, embedding and base on the host with 8-bit moments.
ATTENTION, GATE_UP, ALL = Level.ATTENTION, Level.GATE_UP, Level.ALL
MEASURED = [
    ("qwen3-8b", 2048, 16384, 4096, [ALL] * 36, False, True, False, 83.9),
    ("qwen3-8b", 256, 2048, 2048, [ALL] * 36, False, True, False, 28.2),
    ("qwen3-8b", 2048, 4096, 1024, [ATTENTION] * 15 + [GATE_UP] * 20 + [ALL], True, False, True, 7.256),
    ("qwen3-8b", 2048, 4096, 1024, [ATTENTION] * 34 + [GATE_UP] * 2, True, False, True, 3.581),
    ("qwen3-4b", 2048, 16384, 4096, [ALL] * 36, False, True, False, 62.1),
    ("qwen3-0.6b", 2048, 16384, 1024, [ALL] * 28, False, True, False, 19.8),
    ("qwen3-0.6b", 256, 2048, 512, [ALL] * 28, False, True, False, 3.93),
]


@pytest.mark.parametrize(("model", "row", "tokens", "chunk", "levels", "parked", "cached", "lean", "gib"), MEASURED)
def test_predicted_peaks_are_within_five_percent_of_measured_ones(
    model, row, tokens, chunk, levels, parked, cached, lean, gib
):
    work = step(model, row=row)
    if lean:
        work = replace(work, optimizer_bytes=OPTIMIZER_BYTES[1], embedding_on_host=True, stream_weights=True)
    hosts = [Level.ATTENTION if parked and index < len(levels) - 2 else None for index in range(len(levels))]
    assert peak_bytes(work, tokens, chunk, levels, hosts, cached=cached) / GIB == pytest.approx(gib, rel=0.05)


def test_no_plan_passes_its_budget_and_more_memory_is_never_slower():
    plans = [plan_step(step(), int(budget * GIB), allow_stream=True) for budget in (3.5, 5, 7.2, 12, 24, 48, 96)]
    budgets = (3.5, 5, 7.2, 12, 24, 48, 96)
    assert all(plan.peak <= budget * GIB for plan, budget in zip(plans, budgets, strict=True))
    seconds = [plan.seconds for plan in plans]
    assert seconds == sorted(seconds, reverse=True)


def test_plenty_of_memory_keeps_everything_on_the_device():
    plan = plan_step(step(), 135 * GIB)
    assert set(plan.levels) == {Level.ALL}
    assert set(plan.host_levels) == {None}
    assert plan.cached_layers == 36
    assert not plan.embedding_on_host
    assert plan.micro_batch == 8 * 2048


def test_host_memory_is_used_only_where_it_is_allowed():
    alone = plan_step(step(), 12 * GIB, allow_host=False)
    assert set(alone.host_levels) == {None}
    assert not alone.embedding_on_host
    assert alone.host_bytes(2048) == 0
    assert not plan_step(step(), int(7.2 * GIB)).stream_weights


def test_too_little_memory_says_what_the_leanest_plan_needs():
    with pytest.raises(ValueError, match=r"no plan fits .* the leanest needs \d"):
        plan_step(step(), 2 * GIB, allow_stream=True)


def test_a_tied_embedding_stays_on_the_device():
    tied = replace(step(), tied=True)
    assert not plan_step(tied, 7 * GIB, allow_stream=True).embedding_on_host


def test_small_steps_are_bound_by_launches_and_large_ones_are_not():
    small, large = step("qwen3-0.6b", row=256), step()
    assert launch_bound(plan_step(small, 20 * GIB), small)
    assert not launch_bound(plan_step(large, 135 * GIB), large)
