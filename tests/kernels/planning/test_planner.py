"""The planner keeps to its budget, spends more memory on less time, and predicts the peaks that were measured."""

import shlex
from collections.abc import Iterable
from dataclasses import replace
from datetime import date
from itertools import pairwise

import pytest

from finemill.commands.estimate import workload
from finemill.kernels.bench.moe import make_parser, make_plan
from finemill.kernels.bench.results import H100, H200, WITHIN, Within, setting
from finemill.kernels.bench.runs import MixtureRun, StepRun, read_runs
from finemill.kernels.engine.plan import Level, Plan, streamed_layers
from finemill.kernels.ops.division import CUDNN_LENGTH, capacity
from finemill.kernels.planning.planner import (
    MARGIN,
    PATIENCE,
    NoPlanError,
    host_bytes,
    launch_bound,
    least_bytes,
    peak_bytes,
    plan_graphed_step,
    plan_step,
    step_seconds,
    workload_under,
)
from finemill.kernels.planning.rates import RATES, rates_of
from finemill.kernels.planning.workload import LONG_ROW, MLP_TILE, Workload

GIB = 1 << 30


def step(model: str = "qwen3-8b", rows: int = 8, row: int = 2048) -> Workload:
    return workload(model, rank=16, quantized=True, rows=rows, row=row)


INPUT, ATTENDED, ATTENTION, GATE_UP, ALL = Level
FIRST = date(2026, 11, 24)
MEASURED = [run for run in read_runs() if isinstance(run, StepRun) and run.implementation == "finemill"]


def latest(runs: Iterable[StepRun]) -> list[StepRun]:
    """The last run of each setting and backend of attention, among those whose peak was measured."""
    return list({(setting(run), run.attention): run for run in runs if run.peak_bytes is not None}.values())


GIVEN = latest(run for run in MEASURED if run.plan is not None)
CHOSEN = latest(run for run in MEASURED if run.budget_gb is not None and run.kind == "step")
TRAINED = latest(run for run in MEASURED if run.budget_gb is not None and run.kind == "trainer")


def named(run: StepRun) -> str:
    return f"{run.kind} {run.gpu} {run.shape} {run.rows}x{run.seq} {run.memory_gb} {run.attention}"


def work_of(run: StepRun) -> Workload:
    assert run.seq is not None
    flash = run.attention == "flash" and run.seq > CUDNN_LENGTH
    work = replace(step(run.shape, run.rows, run.seq), fa4=run.attention == "fa4", flash=flash)
    return replace(work, ragged=True, typical=run.typical_length) if run.kind == "trainer" else work


def given(run: StepRun) -> tuple[Workload, Plan]:
    """The plan that ran, and the workload under it."""
    assert run.plan is not None
    work = work_of(run)
    plan = run.plan.plan(work.host_bytes_per_token())
    return workload_under(work, plan), plan


def measured_peak(run: StepRun) -> int:
    """What was measured, without 4 bytes per adapter element that the first kernels did not free."""
    assert run.peak_bytes is not None
    return run.peak_bytes - (4 * work_of(run).adapter_elements if run.date == FIRST else 0)


def within(run: StepRun) -> Within:
    """Percent between prediction and measurement; more for the first kernels, which took some other ways."""
    return Within(3, 7) if run.date == FIRST else WITHIN[run.kind]


def assert_as_long(predicted: float, run: StepRun) -> None:
    """Hold a predicted time to the measured one; steps of under 20 ms may be predicted a fifth too slow."""
    if run.step_s is not None:
        share = within(run).seconds / 100
        slow = 0.25 if run.step_s.p50 < 0.02 else share
        assert (1 - share) * run.step_s.p50 <= predicted <= (1 + slow) * run.step_s.p50


@pytest.mark.parametrize("run", GIVEN, ids=named)
def test_the_prediction_for_a_plan_is_what_was_measured(run: StepRun) -> None:
    work, plan = given(run)
    assert peak_bytes(work, plan) == pytest.approx(measured_peak(run), rel=within(run).peak / 100)
    assert_as_long(step_seconds(work, rates_of(run.gpu or ""), plan), run)


@pytest.mark.parametrize("run", CHOSEN, ids=named)
def test_the_prediction_for_a_chosen_plan_is_what_was_measured(run: StepRun) -> None:
    assert run.budget_gb is not None
    # The host had its limits, too, where rows were long.
    host = host_bytes(*given(run)) if run.plan and (run.seq or 0) > LONG_ROW else None
    budget, rates = int(run.budget_gb * GIB), rates_of(run.gpu or "")
    plan = plan_step(work_of(run), budget, rates=rates, allow_stream=True, host=host)
    assert plan.peak == pytest.approx(measured_peak(run), rel=within(run).peak / 100)
    assert_as_long(plan.seconds, run)


@pytest.mark.parametrize("run", TRAINED, ids=named)
def test_the_prediction_for_a_trainers_step_is_what_was_measured(run: StepRun) -> None:
    assert run.budget_gb is not None
    card = max(other.budget_gb or 0 for other in TRAINED if other.gpu == run.gpu)
    plan, _ = plan_graphed_step(work_of(run), int(run.budget_gb * GIB), int(card * GIB), rates=rates_of(run.gpu or ""))
    assert 1 <= plan.peak / measured_peak(run) <= 1 + within(run).peak / 100
    assert_as_long(plan.seconds, run)


MIXTURE_STEPS = [
    (run, shlex.split(run.command)[3:])
    for run in read_runs()
    if isinstance(run, MixtureRun) and run.command is not None and not run.skew
]


@pytest.mark.parametrize(("run", "words"), MIXTURE_STEPS, ids=lambda value: getattr(value, "note", ""))
def test_the_prediction_for_a_mixture_is_what_was_measured(run: MixtureRun, words: list[str]) -> None:
    plan = make_plan(make_parser().parse_args(words), run.gpu or "")
    more, tokens = 0, plan.micro_batch or 0
    if run.commit in ("1fe2649", "2ad3d19", "78127ed"):  # rows were gathered beside down's gradients
        more += 2 * 2048 * (capacity(tokens, 8, 128, 128) - tokens)
    if run.commit in ("1fe2649", "2ad3d19") and not plan.cached_layers:  # a buffer for each of two stacks
        more += 2 * 128 * 2048 * 768
    assert plan.peak + more == pytest.approx(run.peak_bytes, rel=0.01)
    assert plan.seconds == pytest.approx(run.step_s.p50, rel=0.06)


def test_predictions_are_held_to_runs_of_both_cards() -> None:
    for runs, least in ((GIVEN, 9), (CHOSEN, 21), (TRAINED, 4)):
        assert len(runs) >= least
    assert {run.gpu for run in GIVEN} == {H100, H200}


def test_a_card_is_known_by_the_name_that_cuda_gives_it() -> None:
    assert rates_of("NVIDIA H100 80GB HBM3") == RATES["h100"]
    assert rates_of("NVIDIA H200") == rates_of("another") == RATES["h200"]


def test_no_plan_passes_its_budget_and_more_memory_is_never_slower() -> None:
    budgets = (3.5, 5, 7.2, 12, 24, 48, 96)
    plans = [plan_step(step(), int(budget * GIB), allow_stream=True) for budget in budgets]
    assert all(plan.peak <= budget * GIB for plan, budget in zip(plans, budgets, strict=True))
    seconds = [plan.seconds for plan in plans]
    assert seconds == sorted(seconds, reverse=True)


@pytest.mark.parametrize(("model", "gib"), [("qwen3-8b", 7.2), ("qwen3-8b", 24), ("qwen3-4b", 3.7)])
def test_room_that_is_left_is_too_small_for_another_layer(model: str, gib: float) -> None:
    work, budget = step(model), int(gib * GIB)
    plan = plan_step(work, budget, allow_stream=True)
    work = workload_under(work, plan)
    above = dict(pairwise(work.levels))
    for index, level in enumerate(plan.levels):
        if level < ALL:
            raised = (*plan.levels[:index], above[level], *plan.levels[index + 1 :])
            assert peak_bytes(work, replace(plan, levels=raised)) > MARGIN * budget


def test_the_bus_takes_as_much_as_it_can_while_layers_compute() -> None:
    short, long = step(row=2048), step(rows=1, row=16384)
    plans = plan_step(short, int(3.5 * GIB), allow_stream=True), plan_step(long, int(10.2 * GIB), allow_stream=True)
    for plan, levels in zip(plans, ({INPUT, ATTENTION}, {ATTENTION}), strict=True):
        assert {level for level in plan.host_levels if level is not None} == levels
        assert all(host is None or host <= level for host, level in zip(plan.host_levels, plan.levels, strict=True))


def test_graphs_leave_the_card_room_for_an_eager_pass_beside_them() -> None:
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


def test_short_sequences_get_larger_micro_batches_in_the_memory_of_the_longest() -> None:
    work, budget = replace(step("qwen3-0.6b"), ragged=True), int(1.1 * GIB)
    unknown, short = (plan_step(replace(work, typical=typical), budget) for typical in (None, 256))
    assert (short.micro_batch or 0) > (unknown.micro_batch or 0)
    assert short.seconds < unknown.seconds
    assert short.peak == peak_bytes(workload_under(work, short), short) <= budget
    assert plan_step(replace(work, typical=9999), budget) == unknown


def test_long_passes_are_captured_where_there_is_room_once_their_shape_has_come_often() -> None:
    assert plan_graphed_step(step(), 70 * GIB, 70 * GIB)[1] is None
    assert plan_graphed_step(step(), 70 * GIB, 200 * GIB)[1] == PATIENCE
    assert plan_graphed_step(step(), 70 * GIB, 200 * GIB, use_graphs=True)[1] == 0


def test_plenty_of_memory_keeps_everything_on_the_device() -> None:
    plan = plan_step(step(), 135 * GIB)
    assert set(plan.levels) == {Level.ALL}
    assert set(plan.host_levels) == {None}
    assert plan.cached_layers == 36
    assert not plan.embedding_on_host
    assert plan.micro_batch == 8 * 2048


def test_host_memory_is_used_only_where_it_is_allowed() -> None:
    alone = plan_step(step(), 12 * GIB, allow_host=False)
    assert set(alone.host_levels) == {None}
    assert not alone.embedding_on_host
    assert alone.host_bytes(2048) == 0
    assert not plan_step(step(), int(7.2 * GIB)).stream_weights


def test_rows_of_128k_tokens_fit_24_gib_beside_the_host_memory_there_is() -> None:
    work = replace(step(rows=1, row=131072), fa4=True)
    plan = plan_step(work, 24 * GIB, allow_stream=True, host=100 * GIB)
    assert host_bytes(workload_under(work, plan), plan) <= 100 * GIB
    assert {ATTENDED, MLP_TILE} <= {*plan.levels, plan.mlp_tile}
    with pytest.raises(NoPlanError, match=r"no plan fits 11\.82 GiB beside 1\.0 GiB of host memory"):
        plan_step(work, 12 * GIB, allow_stream=True, host=GIB)


def test_moments_have_the_bits_that_are_asked_for() -> None:
    for eight_bit in (False, True):
        assert plan_step(step(), 80 * GIB, eight_bit=eight_bit).eight_bit is eight_bit
    lean = [least_bytes(step(), allow_stream=True, eight_bit=eight_bit) for eight_bit in (None, True, False)]
    assert lean[0] == lean[1] < lean[2]


def test_too_little_memory_says_what_the_leanest_plan_needs() -> None:
    with pytest.raises(NoPlanError, match=r"no plan fits .* the leanest needs \d"):
        plan_step(step(), 2 * GIB, allow_stream=True)


def test_a_tied_embedding_stays_on_the_device() -> None:
    tied = replace(step(), tied=True)
    assert not plan_step(tied, 7 * GIB, allow_stream=True).embedding_on_host


def test_small_steps_are_bound_by_launches_and_large_ones_are_not() -> None:
    small, large = step("qwen3-0.6b", row=256), step()
    assert launch_bound(plan_step(small, 20 * GIB), small)
    assert not launch_bound(plan_step(large, 135 * GIB), large)


def test_weights_that_wait_in_host_memory_stay_there() -> None:
    assert plan_step(step(), 80 * GIB, streamed=True).stream_weights
    plan, _ = plan_graphed_step(step(), 80 * GIB, 90 * GIB, streamed=True)
    assert plan.stream_weights
    assert plan.cached_layers == 0


def test_layers_that_stay_while_others_stream_are_spread_and_begin_with_the_first() -> None:
    assert streamed_layers(6, 2) == (False, True, True, False, True, True)
    assert streamed_layers(3, 0) == (True,) * 3
    assert all(streamed_layers(36, number).count(False) == number for number in range(37))


def test_a_mixture_streams_some_layers_where_that_is_faster_than_all_or_none() -> None:
    args = make_parser().parse_args(["step", "--memory-gb", "9.1"])
    plan = make_plan(args, "NVIDIA H200")
    assert 0 < plan.resident_layers < args.layers
    assert plan.peak <= args.memory_gb * GIB
    work = workload_under(replace(step("qwen3-30b-a3b"), num_layers=args.layers), plan)
    everywhere, nowhere = (
        step_seconds(replace(work, resident_layers=number), RATES["h200"], plan) for number in (0, args.layers)
    )
    assert everywhere > 1.02 * nowhere
    assert plan.seconds == pytest.approx(nowhere, rel=0.01)


def test_loading_takes_the_base_and_a_matrix_on_its_way() -> None:
    work = step("qwen3-8b")
    tables = 2 * 2 * work.vocabulary * work.shape.hidden
    assert work.loading_bytes() - tables == pytest.approx(work.num_layers * work.nf4_bytes, rel=0.06)
    assert work.loading_bytes() < replace(work, quantized=False).loading_bytes()
    assert work.loading_bytes() - replace(work, tied=True).loading_bytes() == tables // 2
