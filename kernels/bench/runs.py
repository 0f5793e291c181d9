"""What was measured, one run per line: the format of results.jsonl, and of the file that `--record` names.

A line says how to repeat the run and what came out; null is what nobody wrote down. Sizes are bytes, times seconds but
for single ops. Lines typed from tables hold as many digits as the tables had. A file is in the order of measuring: of
two runs of one setting the later one counts.
"""

import argparse
import json
import shlex
import statistics
import subprocess
from collections.abc import Iterable, Sequence
from datetime import UTC, date, datetime
from importlib.metadata import PackageNotFoundError, version
from itertools import groupby, pairwise
from pathlib import Path
from platform import python_version
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from finemill.kernels.engine.plan import Level, Plan

RESULTS = Path(__file__).with_name("results.jsonl")
"""Runs that the tables of results.md and the README are made of, and that the planner is held to."""
PACKAGES = (
    *("finemill", "torch", "triton", "transformers", "peft", "trl", "bitsandbytes"),
    *("accelerate", "deepspeed"),
    *("nvidia-cudnn-frontend", "flash-attn-4"),
)


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Quantiles(_Model):
    """Median, and the bounds of the middle three fifths."""

    p20: float | None = None
    p50: float
    p80: float | None = None

    @classmethod
    def of(cls, values: Sequence[float]) -> "Quantiles":
        """Sum up repeated measurements."""
        low, *_, high = statistics.quantiles(values, n=5, method="inclusive") if len(values) > 1 else (*values, *values)
        return cls(p20=_digits(low), p50=_digits(statistics.median(values)), p80=_digits(high))


class _Run(_Model):
    """A run on one card at one commit.

    `machine` names the machine where it matters: of one kind they differ by up to 4 %.
    """

    kind: str
    date: date
    gpu: str | None
    driver: str | None
    machine: str | None = None
    commit: str | None
    versions: dict[str, str | None]
    command: str | None
    note: str | None = None


class PlanRecord(_Model):
    """A plan that ran: levels and host levels as (name, layers in a row), the rest as in `Plan`."""

    levels: list[tuple[str, int]]
    host_levels: list[tuple[str | None, int]]
    cached_layers: int
    head_chunk: int
    micro_batch: int | None
    embedding_on_host: bool
    eight_bit: bool
    stream_weights: bool
    in_flight: int
    key_heads: int | None
    mlp_tile: int | None = None

    @classmethod
    def of(cls, plan: Plan) -> "PlanRecord":
        """Describe a plan."""
        return cls(
            levels=_run_lengths(level.name for level in plan.levels),
            host_levels=_run_lengths(level if level is None else level.name for level in plan.host_levels),
            **{name: getattr(plan, name) for name in list(cls.model_fields)[2:]},
        )

    def plan(self, bytes_per_token: dict[Level, int]) -> Plan:
        """Make the plan again; predictions are left out."""
        settings = {name: getattr(self, name) for name in list(PlanRecord.model_fields)[2:]}
        levels = tuple(Level[name] for name, count in self.levels for _ in range(count))
        hosts = tuple(name if name is None else Level[name] for name, count in self.host_levels for _ in range(count))
        return Plan(levels, hosts, bytes_per_token=bytes_per_token, **settings)


class StepRun(_Run):
    """A training step: the bare loop's ("step") or one through a trainer ("trainer"), ours or a peer's.

    Args:
        shape: of the model, a name in model_shapes.py.
        seq: tokens per row; through a trainer rows are packed up to it.
        rows: per optimizer step.
        memory_gb: limit that was asked for, GiB; None for the card's.
        budget_gb: memory that was planned with, GiB.
        attention: that full rows run on: "fa4", "cudnn", "flash" or "plain".
        typical_length: length of the sequence that a token is in, on average; None for full rows.
        start_to_first_step_s: from the start of the process to the end of its first step.
    """

    kind: Literal["step", "trainer"]
    implementation: str
    shape: str
    quant: str | None = "nf4"
    rank: int | None = 16
    seq: int | None
    rows: int
    processes: int = 1
    memory_gb: float | None
    budget_gb: float | None = None
    attention: str | None = None
    typical_length: int | None = None
    tokens_per_step: int | None
    tokens_per_s: float | None
    step_s: Quantiles | None
    predicted_step_s: float | None = None
    peak_bytes: int | None
    predicted_peak_bytes: int | None = None
    start_to_first_step_s: float | None = None
    losses: list[float] | None = None
    plan: PlanRecord | None = None


class MixtureRun(_Run):
    """A training step of a mixture of experts on Qwen3-30B-A3B's widths: ours (moe.py) or a peer's.

    Args:
        layers: of the model's 48.
        seq: tokens per row.
        rows: per optimizer step.
        skew: whether one expert takes a fifth of all tokens.
    """

    kind: Literal["mixture"]
    implementation: str
    layers: int
    quant: str
    rank: int
    seq: int
    rows: int
    skew: bool = False
    tokens_per_s: float
    step_s: Quantiles
    peak_bytes: int
    losses: list[float]


class MixtureLosses(_Run):
    """Losses of a mixture's training on the engine and by transformers (`finemill bench moe losses`).

    Args:
        layers: of the model's 48.
        rows: per step.
        seeds: of adapters and batches.
        losses: by training (transformers with its attentions, transformers in float32, ours), of each seed and step.
        from_float32: root mean square of each training's differences from that in float32.
        spread: the same between transformers' two attentions.
        same: whether ours is as near to float32 as transformers' is.
    """

    kind: Literal["mixture-losses"]
    layers: int
    quant: str
    rank: int
    seq: int
    rows: int
    steps: int
    lr: float
    seeds: int
    losses: dict[str, list[list[float]]]
    from_float32: dict[str, float]
    spread: float
    same: bool


class PreferenceRun(_Run):
    """A training on preferences (`finemill bench dpo`): ours or TRL's own, on the same pairs in every step.

    Args:
        dtype: of the products.
        loss: "dpo", "kto" or "orpo".
        seq: tokens of a prompt with an answer.
        rows: pairs, or answers of "kto", per optimizer step.
        memory_gb: limit that was asked for, GiB; None for the card's.
    """

    kind: Literal["preferences"]
    implementation: str
    dtype: str
    loss: str
    shape: str
    seq: int
    rows: int
    memory_gb: float | None
    tokens_per_s: float
    step_s: Quantiles
    peak_bytes: int
    losses: list[float]


class SeedLosses(_Model):
    """One seed of two trainings on the same rows: means over the last steps, and mean difference of a step's loss."""

    end_hf: float
    end_ours: float | None
    end_difference: float | None
    step_difference: float | None


class LossRun(_Run):
    """Losses of a training against Hugging Face's, over seeds; spreads are those of Hugging Face's seeds (loss.py)."""

    kind: Literal["loss"]
    shape: str
    steps: int
    rows: int
    by_seed: dict[str, SeedLosses]
    step_spread: float | None
    end_spread: float | None
    inside: bool | None


class GradientRun(_Run):
    """Errors of LoRA gradients against fp64, relative to those of Hugging Face's in bf16 under autocast.

    Args:
        family: of the model.
        layout: of the batch, "uniform" or "ragged".
        tensors: how many gradients.
        seeds: draws of base, adapters and data.
        mean_ratio: of the root mean squares over the seeds, mean over the tensors.
        worst_ratio: of the tensors.
        draws_above: single draws whose ratio is above 1.1.
        worst_draw: the largest ratio of a single draw, None where none is above 1.1.
    """

    kind: Literal["gradients"]
    family: str
    layout: str
    tensors: int
    seeds: int
    mean_ratio: float
    worst_ratio: float
    draws_above: int
    worst_draw: float | None


class OpRun(_Run):
    """One op at one shape, with a cold L2 cache; times in microseconds.

    Args:
        op: op, variant and shape.
        bytes: that must be read and written once.
        reference_us: of the PyTorch code that the op replaces.
        copy_tb_per_s: what a copy reads and writes on this card.
    """

    kind: Literal["op"]
    op: str
    us: Quantiles
    bytes: int
    reference_us: float | None
    copy_tb_per_s: float


class ScaleRun(_Run):
    """A training on several GPUs of one host (`finemill bench scale`): ours, or Accelerate's and DeepSpeed's own.

    Args:
        layers: that the model was cut to; 0 for all.
        method: "qlora", "lora" or "full".
        strategy: what the GPUs share.
        context_parallel: GPUs that share each row.
        rows: per optimizer step in all GPUs together.
        memory_gb: limit of a GPU that was asked for, GiB; None for the card's.
        peak_bytes: of each GPU.
        recompute: whether layers were computed again in the backward pass; None where it was not recorded, or planned.
        waiting: share of a step in which nothing ran but communication.
        idle: share in which nothing ran at all: the time that Python takes to launch what runs.
    """

    kind: Literal["scale"]
    implementation: str
    shape: str
    layers: int = 0
    method: str
    strategy: str
    context_parallel: int = 1
    offload: bool
    recompute: bool | None = None
    processes: int
    seq: int
    rows: int
    memory_gb: float | None = None
    tokens_per_s: float
    step_s: Quantiles
    peak_bytes: list[int]
    losses: list[float]
    waiting: float | None
    idle: float | None = None


Run = StepRun | MixtureRun | MixtureLosses | PreferenceRun | ScaleRun | LossRun | GradientRun | OpRun
_LINE: TypeAdapter[Run] = TypeAdapter(Annotated[Run, Field(discriminator="kind")])


def read_runs(file: Path = RESULTS) -> list[Run]:
    """Read all lines of a file.

    Raises: ValueError: a line that is not of this format; the message names file, line and field.
    """
    runs = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            runs.append(_LINE.validate_json(line))
        except ValueError as error:
            raise ValueError(f"{file}, line {number}: {error}") from error
    return runs


def record_runs(file: Path, runs: Iterable[Run]) -> None:
    """Append lines to a file."""
    with file.open("a", encoding="utf-8") as lines:
        lines.writelines(json.dumps(run.model_dump(mode="json")) + "\n" for run in runs)


def add_record_argument(parser: argparse.ArgumentParser) -> None:
    """Add `--record FILE`."""
    parser.add_argument(
        "--record", type=_file, metavar="FILE", help="append the result to this file, as a line of JSON"
    )


def header(program: str, argv: Sequence[str]) -> dict[str, Any]:
    """What every run says of itself: when, on what, at which commit, by which command."""
    command = shlex.join(["finemill", "bench", program, *_without_places(argv)])
    return environment() | {"date": datetime.now(tz=UTC).date(), "command": command}


def environment() -> dict[str, Any]:
    """The card, its driver, the commit, and versions of what decides the speed."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"gpu": gpu, "driver": gpu and _driver(), "commit": _commit(), "versions": _versions()}


def _digits(value: float) -> float:
    """Six significant digits: more than any clock repeats."""
    return float(f"{value:.6g}")


def _run_lengths(names: Iterable[Any]) -> list[tuple[Any, int]]:
    return [(name, len(list(group))) for name, group in groupby(names)]


def _file(text: str) -> Path:
    file = Path(text)
    if not file.parent.is_dir():
        raise argparse.ArgumentTypeError(f"{file.parent} is not a folder")
    return file


def _without_places(argv: Sequence[str]) -> list[str]:
    """Leave out where the result was written to, and the folders of files that were read."""
    written = ("--record", "--json")
    kept = [
        word
        for before, word in pairwise(["", *argv])
        if word.partition("=")[0] not in written and before not in written
    ]
    return [",".join(part.rpartition("/")[2] for part in word.split(",")) for word in kept]


def _versions() -> dict[str, str | None]:
    cudnn = torch.backends.cudnn.version()
    found = {"python": python_version(), "cudnn": f"{cudnn // 10000}.{cudnn // 100 % 100}" if cudnn else None}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def _driver() -> str | None:
    return _answer("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")


def _commit() -> str | None:
    """The checkout's commit, marked where files differ from it; None for an installed package."""
    git = ("git", "-C", str(Path(__file__).resolve().parent))
    tracked = _answer(*git, "ls-files", Path(__file__).name)
    return tracked and _answer(*git, "describe", "--always", "--dirty", "--exclude=*")


def _answer(*command: str) -> str | None:
    """First line that a command prints, None where it cannot run."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
        return done.stdout.splitlines()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return None
