"""The planner keeps to its budget, spends more memory on less time, and predicts the peaks that were measured."""

from dataclasses import dataclass, replace

import pytest

from finemill.kernels.engine.plan import Level, Plan
from finemill.kernels.planning.estimate import workload
from finemill.kernels.planning.planner import (
    MARGIN,
    NoPlanError,
    launch_bound,
    peak_bytes,
    plan_graphed_step,
    plan_step,
    spread,
    step_seconds,
    workload_under,
)
from finemill.kernels.planning.rates import RATES, rates_of
from finemill.kernels.planning.workload import Workload

GIB = 1 << 30


def step(model: str = "qwen3-8b", rows: int = 8, row: int = 2048):
    return workload(model, rank=16, quantized=True, rows=rows, row=row)


@dataclass(frozen=True)
class Run:
    """A plan that ran: layers by level, level and share of the parked, decoded weights kept, peak in GiB, seconds."""

    model: str
    row: int
    micro_batch: int
    head_chunk: int
    levels: list[Level]
    host: Level | None
    share: float
    cached: bool
    gib: float
    seconds: float
    in_flight: int = 1

    def plan(self) -> tuple[Workload, Plan]:
        work = replace(step(self.model, row=self.row), fa4=False)
        plan = Plan(
            levels=tuple(self.levels),
            host_levels=tuple(self.host if parked else None for parked in spread(len(self.levels), self.share)),
            cached_layers=len(self.levels) if self.cached else 0,
            head_chunk=self.head_chunk,
            bytes_per_token=work.host_bytes_per_token(),
            micro_batch=self.micro_batch,
            embedding_on_host=not self.cached and not work.tied,
            eight_bit=not self.cached,
            stream_weights=not self.cached,
            in_flight=self.in_flight,
            key_heads=4 if self.row == 2048 else None,
        )
        return workload_under(work, plan), plan


INPUT, ATTENTION, GATE_UP, ALL = Level
# An H100 80GB HBM3 on 2026-11-26 (results.md).
H100 = [
    Run("qwen3-8b", 2048, 16384, 4096, [ALL] * 36, ATTENTION, 0.75, True, 69.66, 0.951, in_flight=2),
    Run("qwen3-8b", 256, 2048, 512, [ALL] * 36, None, 0.0, True, 27.57, 0.1151),
    Run("qwen3-4b", 2048, 16384, 4096, [ALL] * 36, None, 0.0, True, 61.43, 0.586),
    Run("qwen3-0.6b", 2048, 16384, 2048, [ALL] * 28, None, 0.0, True, 19.31, 0.1343),
]
# On 2026-11-26: limit in GiB, and peak and seconds of the plan that is chosen under it.
CHOSEN = [
    ("h200", "qwen3-8b", 8, 2048, 130, 82.925, 0.9117),
    ("h200", "qwen3-8b", 8, 2048, 7.2, 6.932, 1.1104),
    ("h200", "qwen3-8b", 1, 16384, 10.2, 9.934, 1.4657),
    ("h200", "qwen3-4b", 8, 2048, 130, 60.883, 0.5437),
    ("h200", "qwen3-4b", 8, 2048, 3.7, 3.536, 0.6917),
    ("h200", "qwen3-0.6b", 8, 2048, 130, 19.022, 0.1178),
    ("h200", "qwen3-0.6b", 8, 2048, 1.1, 1.070, 0.1569),
    ("h100", "qwen3-8b", 8, 2048, 73.5, 69.695, 0.9372),
    ("h100", "qwen3-8b", 8, 2048, 7.2, 6.867, 1.1389),
    ("h100", "qwen3-8b", 8, 2048, 3.5, 3.365, 1.2557),
    ("h100", "qwen3-8b", 8, 256, 75.2, 27.572, 0.1124),
    ("h100", "qwen3-8b", 8, 256, 7.2, 7.045, 0.1403),
    ("h100", "qwen3-8b", 1, 16384, 10.2, 9.934, 1.5351),
    ("h100", "qwen3-4b", 8, 2048, 75.2, 60.883, 0.5725),
    ("h100", "qwen3-4b", 8, 2048, 3.7, 3.536, 0.7288),
    ("h100", "qwen3-0.6b", 8, 2048, 75.2, 19.022, 0.1307),
    ("h100", "qwen3-0.6b", 8, 2048, 1.1, 1.070, 0.1697),
    ("h100", "qwen3-0.6b", 8, 2048, 0.7, 0.672, 0.2110),
]
# An H200 or an H100 that day, before FlashAttention-4 took rows of 2048: limit and peak in GiB.
LEAST_ON_CUDNN = [
    ("qwen3-8b", 2048, 3.5, 3.417),
    ("qwen3-8b", 256, 7.2, 7.045),
    ("qwen3-0.6b", 2048, 0.7, 0.672),
]
# Rows of Alpaca and GSM8K through the trainer that day: limit, peak in GiB, seconds of a step.
TRAINED = [
    ("qwen3-8b", 75.2, 69.770, 0.9235),
    ("qwen3-8b", 7.2, 6.867, 1.1425),
    ("qwen3-0.6b", 75.2, 19.944, 0.1099),
    ("qwen3-0.6b", 1.1, 1.057, 0.1722),
]
# An H200 on 2026-11-24 (results.md); peaks less 4 bytes an adapter element that were not freed then.
H200 = [
    Run("qwen3-8b", 2048, 16384, 4096, [ALL] * 36, None, 0.0, True, 83.9 - 0.16, 0.934),
    Run("qwen3-8b", 256, 2048, 2048, [ALL] * 36, None, 0.0, True, 28.2 - 0.16, 0.1079),
    Run("qwen3-4b", 2048, 16384, 4096, [ALL] * 36, None, 0.0, True, 62.1 - 0.12, 0.567),
    Run("qwen3-0.6b", 2048, 16384, 1024, [ALL] * 28, None, 0.0, True, 19.8 - 0.04, 0.1229),
    Run("qwen3-0.6b", 256, 2048, 512, [ALL] * 28, None, 0.0, True, 3.93 - 0.04, 0.0190),
]


@pytest.mark.parametrize(("run", "within"), [*((run, 0.01) for run in H100), *((run, 0.03) for run in H200)])
def test_predicted_peaks_are_those_that_were_measured(run, within):
    assert peak_bytes(*run.plan()) / GIB == pytest.approx(run.gib, rel=within)


@pytest.mark.parametrize(
    ("run", "gpu", "within"), [*((run, "h100", 0.06) for run in H100), *((run, "h200", 0.07) for run in H200)]
)
def test_predicted_times_are_those_that_were_measured(run, gpu, within):
    work, plan = run.plan()
    assert step_seconds(work, RATES[gpu], plan) == pytest.approx(run.seconds, rel=within)


@pytest.mark.parametrize(("gpu", "model", "rows", "row", "limit", "gib", "seconds"), CHOSEN)
def test_what_is_predicted_of_a_chosen_plan_is_what_was_measured(gpu, model, rows, row, limit, gib, seconds):
    plan = plan_step(step(model, rows, row), int(limit * GIB), rates=RATES[gpu], allow_stream=True)
    assert plan.peak / GIB == pytest.approx(gib, rel=0.01)
    assert plan.seconds == pytest.approx(seconds, rel=0.06)


@pytest.mark.parametrize(("model", "row", "limit", "gib"), LEAST_ON_CUDNN)
def test_the_peak_of_a_chosen_plan_is_what_was_measured_without_flash_attention_4(model, row, limit, gib):
    work = replace(step(model, row=row), fa4=False)
    plan = plan_step(work, int(limit * GIB), rates=RATES["h200"], allow_stream=True)
    assert plan.peak / GIB == pytest.approx(gib, rel=0.01)


@pytest.mark.parametrize(("model", "limit", "gib", "seconds"), TRAINED)
def test_what_is_predicted_of_a_trainers_step_is_what_was_measured(model, limit, gib, seconds):
    work = replace(step(model), ragged=True, typical=283)
    plan, _ = plan_graphed_step(work, int(limit * GIB), int(75.2 * GIB), rates=RATES["h100"])
    assert gib <= plan.peak / GIB <= 1.03 * gib
    assert plan.seconds == pytest.approx(seconds, rel=0.1)


def test_a_card_is_known_by_the_name_that_cuda_gives_it():
    assert rates_of("NVIDIA H100 80GB HBM3") == RATES["h100"]
    assert rates_of("NVIDIA H200") == rates_of("another") == RATES["h200"]


def test_no_plan_passes_its_budget_and_more_memory_is_never_slower():
    budgets = (3.5, 5, 7.2, 12, 24, 48, 96)
    plans = [plan_step(step(), int(budget * GIB), allow_stream=True) for budget in budgets]
    assert all(plan.peak <= budget * GIB for plan, budget in zip(plans, budgets, strict=True))
    seconds = [plan.seconds for plan in plans]
    assert seconds == sorted(seconds, reverse=True)


@pytest.mark.parametrize(("model", "gib"), [("qwen3-8b", 7.2), ("qwen3-8b", 24), ("qwen3-4b", 3.7)])
def test_room_that_is_left_is_too_small_for_another_layer(model, gib):
    work, budget = step(model), int(gib * GIB)
    plan = plan_step(work, budget, allow_stream=True)
    work = workload_under(work, plan)
    for index, level in enumerate(plan.levels):
        if level < ALL:
            raised = (*plan.levels[:index], Level(level + 1), *plan.levels[index + 1 :])
            assert peak_bytes(work, replace(plan, levels=raised)) > MARGIN * budget


def test_the_bus_takes_as_much_as_it_can_while_layers_compute():
    short, long = step(row=2048), step(rows=1, row=16384)
    plans = plan_step(short, int(3.5 * GIB), allow_stream=True), plan_step(long, int(10.2 * GIB), allow_stream=True)
    for plan, levels in zip(plans, ({INPUT, ATTENTION}, {ATTENTION}), strict=True):
        assert {level for level in plan.host_levels if level is not None} == levels
        assert all(host is None or host <= level for host, level in zip(plan.host_levels, plan.levels, strict=True))


def test_graphs_leave_the_card_room_for_an_eager_pass_beside_them():
    work = replace(step("qwen3-0.6b"), ragged=True)
    roomy, patience = plan_graphed_step(work, 70 * GIB, 70 * GIB)
    assert patience == 0
    tight, patience = plan_graphed_step(work, 22 * GIB, 22 * GIB)
    assert patience == 0
    assert tight.peak < roomy.peak < 22 * GIB
    assert 2 * tight.peak - workload_under(work, tight).static_bytes() <= 22 * GIB
    least = int(1.1 * GIB)  # fits a step, and no second one beside it
    assert plan_graphed_step(work, least, least)[1] is None
    assert plan_graphed_step(work, 70 * GIB, 70 * GIB, use_graphs=False)[1] is None


def test_short_sequences_get_larger_micro_batches_in_the_memory_of_the_longest():
    work, budget = replace(step("qwen3-0.6b"), ragged=True), int(1.1 * GIB)
    unknown, short = (plan_step(replace(work, typical=typical), budget) for typical in (None, 256))
    assert short.micro_batch > unknown.micro_batch
    assert short.seconds < unknown.seconds
    assert short.peak == peak_bytes(workload_under(work, short), short) <= budget
    assert plan_step(replace(work, typical=9999), budget) == unknown


def test_long_passes_are_captured_where_there_is_room_once_their_shape_has_come_often():
    assert plan_graphed_step(step(), 70 * GIB, 70 * GIB)[1] is None
    assert plan_graphed_step(step(), 70 * GIB, 200 * GIB)[1] > 0
    assert plan_graphed_step(step(), 70 * GIB, 200 * GIB, use_graphs=True)[1] == 0


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
    with pytest.raises(NoPlanError, match=r"no plan fits .* the leanest needs \d"):
        plan_step(step(), 2 * GIB, allow_stream=True)


def test_a_tied_embedding_stays_on_the_device():
    tied = replace(step(), tied=True)
    assert not plan_step(tied, 7 * GIB, allow_stream=True).embedding_on_host


def test_small_steps_are_bound_by_launches_and_large_ones_are_not():
    small, large = step("qwen3-0.6b", row=256), step()
    assert launch_bound(plan_step(small, 20 * GIB), small)
    assert not launch_bound(plan_step(large, 135 * GIB), large)


def test_weights_that_wait_in_host_memory_stay_there() -> None:
    assert plan_step(step(), 80 * GIB, streamed=True).stream_weights
    plan, _ = plan_graphed_step(step(), 80 * GIB, 90 * GIB, streamed=True)
    assert plan.stream_weights
    assert plan.cached_layers == 0


def test_loading_takes_the_base_and_a_matrix_on_its_way() -> None:
    work = step("qwen3-8b")
    tables = 2 * 2 * work.vocabulary * work.shape.hidden
    assert work.loading_bytes() - tables == pytest.approx(work.num_layers * work.nf4_bytes, rel=0.06)
    assert work.loading_bytes() < replace(work, quantized=False).loading_bytes()
    assert work.loading_bytes() - replace(work, tied=True).loading_bytes() == tables // 2
