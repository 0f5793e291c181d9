"""Tables of what was measured, made of results.jsonl.

    python -m finemill.kernels.bench.results            print results.md
    python -m finemill.kernels.bench.results --write    write both pages, and the README's figures between its marks

Of several runs of one setting the last line of the file is shown.
"""

import argparse
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from finemill.kernels.bench.runs import (
    RESULTS,
    GradientRun,
    LossRun,
    MixtureLosses,
    MixtureRun,
    PreferenceRun,
    Run,
    ScaleRun,
    StepRun,
    read_runs,
)
from finemill.kernels.planning.model_shapes import SHAPES

PAGE = RESULTS.with_suffix(".md")
MORE = PAGE.with_name("more_results.md")
MARKS = ("<!-- made by kernels/bench/results.py -->\n", "<!-- end -->\n")
"""Lines of the README that its figures stand between."""
H100, H200 = "NVIDIA H100 80GB HBM3", "NVIDIA H200"


class Within(NamedTuple):
    """How far predictions are from what was measured at most, in percent; tests hold the planner to it."""

    peak: int
    seconds: int


WITHIN = {"step": Within(1, 6), "trainer": Within(3, 10)}


class Setting(NamedTuple):
    """What two runs have in common that can be compared."""

    gpu: str | None
    kind: str
    shape: str
    seq: int | None
    rows: int
    memory_gb: float | None


def setting(run: StepRun) -> Setting:
    """Say what was run, without who ran it."""
    return Setting(run.gpu, run.kind, run.shape, run.seq, run.rows, run.memory_gb)


def latest(runs: Iterable[Run], implementation: str = "finemill") -> dict[Setting, StepRun]:
    """The last run of each setting whose speed is known."""
    steps = (run for run in runs if isinstance(run, StepRun) and run.implementation == implementation)
    steps = (run for run in steps if run.quant == "nf4" and run.rank == 16 and run.processes == 1)
    return {setting(run): run for run in steps if run.tokens_per_s is not None}


def scale_setting(run: ScaleRun) -> tuple[object, ...]:
    """Say what was run on several GPUs, and by whom: a later run of the same replaces it on the page."""
    what = run.shape, run.layers, run.method, run.implementation, run.strategy, run.processes
    return *what, run.context_parallel, run.rows, run.seq, run.memory_gb


def page(runs: Sequence[Run], path: Path = PAGE) -> str:
    """The text of results.md, or of the page with more."""
    ours = latest(runs)
    steps = [run for run in runs if isinstance(run, StepRun)]

    def share(run: StepRun) -> str:
        bare = ours.get(setting(run)._replace(kind="step"))
        return "-" if bare is None else f"{100 * _speed(run) / _speed(bare):.0f} %"

    environment = Environment(
        loader=FileSystemLoader(PAGE.parent), trim_blocks=True, undefined=StrictUndefined, autoescape=False
    )
    return environment.get_template(f"{path.name}.jinja").render(
        gpus=(H100, H200),
        ours=sorted(ours.values(), key=_order),
        peers=defaultdict(lambda: None, latest(runs, "unsloth")),
        starts=list({run.gpu: run for run in steps if run.start_to_first_step_s is not None}.values()),
        several=[run for run in steps if run.processes > 1],
        losses=[run for run in runs if isinstance(run, LossRun)],
        mixtures=[run for run in runs if isinstance(run, MixtureRun)],
        mixture_losses=[run for run in runs if isinstance(run, MixtureLosses)],
        preferences=[run for run in runs if isinstance(run, PreferenceRun)],
        scales=list({scale_setting(run): run for run in runs if isinstance(run, ScaleRun)}.values()),
        gradients=list({(run.family, run.layout): run for run in runs if isinstance(run, GradientRun)}.values()),
        within=WITHIN,
        setting=setting,
        limit=lambda run: "card's" if run.memory_gb is None else f"{run.memory_gb:g}",
        speed=_quantiles,
        share=share,
        peak=_peak,
        versus=_versus,
        measured=lambda run: f"{run.date} `{run.commit}`" if run.commit else f"{run.date}",
        five=lambda value: "-" if value is None else f"{value:.5f}",
    )


def _order(run: StepRun) -> tuple[float, ...]:
    shape = SHAPES[run.shape]
    return -shape.layers * shape.hidden, -run.rows, -(run.seq or 0), -(run.memory_gb or 1e9)


def _speed(run: StepRun) -> float:
    assert run.tokens_per_s is not None
    return run.tokens_per_s


def _quantiles(run: StepRun) -> str:
    """Tokens per second, and between which speeds the middle three fifths of the steps ran."""
    step, tokens = run.step_s, run.tokens_per_step
    if step is None or step.p20 is None or step.p80 is None or tokens is None:
        return f"{_speed(run):,.0f}"
    return f"{_speed(run):,.0f} ({tokens / step.p80:,.0f} to {tokens / step.p20:,.0f})"


def _peak(run: StepRun) -> str:
    predicted = "" if run.predicted_peak_bytes is None else f" ({_gib(run.predicted_peak_bytes)})"
    return "-" if run.peak_bytes is None else _gib(run.peak_bytes) + predicted


def _gib(size: int) -> str:
    return f"{size / 2**30:#.3g}"


def _versus(run: StepRun, peer: StepRun | None) -> str:
    """Cells of the peer's speed, its peak, and the ratio of both speeds."""
    if peer is None:
        return "- | | "
    mark = "" if peer.machine is not None and peer.machine == run.machine else " *"
    peak = "" if peer.peak_bytes is None else _gib(peer.peak_bytes)
    return f"{_speed(peer):,.0f}{mark} | {peak} | {_speed(run) / _speed(peer):.2f}"


ROWS = (
    ("8B, 2048 tokens", Setting(H100, "step", "qwen3-8b", 2048, 8, None)),
    ("8B, 2048 tokens", Setting(H100, "step", "qwen3-8b", 2048, 8, 7.2)),
    ("8B, 2048 tokens", Setting(H100, "step", "qwen3-8b", 2048, 8, 3.5)),
    ("8B, 256 tokens", Setting(H100, "step", "qwen3-8b", 256, 8, None)),
    ("8B, one row of 16,384 tokens", Setting(H100, "step", "qwen3-8b", 16384, 1, 10.2)),
    ("8B, Alpaca and GSM8K rows through the trainer, packed", Setting(H100, "trainer", "qwen3-8b", 2048, 8, 7.2)),
    ("4B, 2048 tokens", Setting(H100, "step", "qwen3-4b", 2048, 8, None)),
    ("0.6B, 2048 tokens", Setting(H100, "step", "qwen3-0.6b", 2048, 8, None)),
    ("0.6B, the same rows through the trainer", Setting(H100, "trainer", "qwen3-0.6b", 2048, 8, None)),
)
"""Rows of the README's table."""
ON_H200 = tuple(Setting(H200, "step", *rest) for rest in (("qwen3-8b", 2048, 8, None), ("qwen3-8b", 2048, 8, 7.2)))
ON_H200 += (Setting(H200, "step", "qwen3-4b", 2048, 8, None),)
"""Runs of the sentence below it."""


def readme_figures(runs: Sequence[Run]) -> str:
    """Write what stands between the README's marks."""
    ours, theirs = latest(runs), latest(runs, "unsloth")
    lines = ["| Qwen3, eight rows per step | memory | finemill | Unsloth |", "| --- | --- | --- | --- |"]
    for label, key in ROWS:
        memory = "80 GB card" if key.memory_gb is None else f"{key.memory_gb:g} GB"
        peer = _rounded(theirs[key]) if key in theirs else _absent(runs, key)
        lines.append(f"| {label} | {memory} | {_rounded(ours[key])} tok/s | {peer} |")
    most, least, four = (ours[key] for key in ON_H200)
    lines += [
        "",
        f"On an H200, 2048 tokens: 8B {_rounded(most)} in {(most.peak_bytes or 0) / 2**30:.0f} GB, {_rounded(least)}",
    ]
    lines[-1] += f" in {least.memory_gb:g} GB; 4B {_rounded(four)} against {_rounded(theirs[setting(four)])}."
    return "\n".join(lines) + "\n"


def _rounded(run: StepRun) -> str:
    """Tokens per second to hundreds, from 50,000 on to thousands: machines of one kind differ by more."""
    return f"{round(_speed(run), -2 if _speed(run) < 50_000 else -3):,.0f}"


def _absent(runs: Sequence[Run], key: Setting) -> str:
    """Say why a peer has no figure: nobody ran it, or all its runs take more memory."""
    peers = [run for run in runs if isinstance(run, StepRun) and run.implementation == "unsloth"]
    peaks = [run.peak_bytes for run in peers if setting(run)[:5] == key[:5] and run.peak_bytes is not None]
    return "does not fit" if key.memory_gb and peaks and min(peaks) > key.memory_gb * 2**30 else "-"


def with_figures(readme: str, runs: Sequence[Run]) -> str:
    """Put the figures between the README's marks."""
    begin, end = MARKS
    before, rest = readme.split(begin)
    return before + begin + readme_figures(runs) + end + rest.split(end)[1]


def main(argv: list[str] | None = None) -> int:
    """Run the command line. Returns: exit code."""
    parser = argparse.ArgumentParser(prog="python -m finemill.kernels.bench.results", description=__doc__)
    parser.add_argument("--write", action="store_true", help="write both pages and the README's figures")
    runs = read_runs()
    if not parser.parse_args(argv).write:
        print(page(runs), end="")
        return 0
    readme = Path(__file__).resolve().parents[2] / "README.md"
    for path in (PAGE, MORE):
        path.write_text(page(runs, path), encoding="utf-8")
    readme.write_text(with_figures(readme.read_text(encoding="utf-8"), runs), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
