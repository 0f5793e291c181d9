"""What `finemill run` shows: a line per step while it runs, and the results at the end."""

import time
from collections.abc import Mapping, Sequence
from typing import Any, TextIO, get_args

from finemill.artifacts.decision import read_decision
from finemill.artifacts.files import DATA_CARD_PAGE, IMATRIX_FILE, REPORT_PAGE
from finemill.artifacts.manifest import Manifest, Reference
from finemill.artifacts.metrics import (
    BROKEN,
    FIXED,
    FIXED_RATE,
    MODELS,
    is_total,
    metrics_of,
    mix_of,
    model_metric,
    stderr_of,
)
from finemill.artifacts.rows import MixBy
from finemill.storage.base import local_path
from finemill.storage.store import fetch_artifact, read_artifact

_MARKS = {"done": "done", "reused": "reused", "failed": "FAILED"}


class RunDisplay:
    """One line per finished step, its warnings above it; on a terminal the last line follows the running one."""

    def __init__(self, steps: Sequence[str], stream: TextIO) -> None:
        self._steps = list(steps)
        self._stream = stream
        self._width = max(map(len, self._steps))
        self._live = stream.isatty()
        self._last_plain_line = 0.0

    def show(self, event: Mapping[str, Any]) -> None:
        """Show an event of `finemill.tracking.progress`; those without a text are for recorders."""
        if "text" not in event:
            return
        position = self._steps.index(event["step"]) + 1
        head = f"[{position}/{len(self._steps)}] {event['step']:<{self._width}}"
        if event["event"] in _MARKS:
            self._print(f"{head}  {_MARKS[event['event']]:<6} {event['seconds']:6.1f} s  {_short(event['text'])}")
        elif event["event"] == "warning":
            self._print(f"{head}  warning: {event['text']}")
        elif self._live:
            self._stream.write(f"\r\033[2K{head}  {event['text'] or '...'}"[:200])
            self._stream.flush()
        elif event["text"] and time.monotonic() - self._last_plain_line > 10:
            self._last_plain_line = time.monotonic()
            print(f"{head}  {event['text']}", file=self._stream, flush=True)

    def _print(self, line: str) -> None:
        self._last_plain_line = time.monotonic()
        print(f"\r\033[2K{line}" if self._live else line, file=self._stream, flush=True)


def _short(text: str) -> str:
    """A reference without its digest: the run's log and the manifests have it in full."""
    return text.split("@sha256:")[0]


def print_results(references: Mapping[str, str], tracking_uri: str, stream: TextIO) -> None:
    """Print base against tuned, where the files are, what was registered, and how to look at it in MLflow."""
    parsed = {step: Reference.parse(text) for step, text in references.items()}
    manifests = {step: read_artifact(reference) for step, reference in parsed.items()}
    write = stream.write
    if "detect-change" in manifests and not manifests["detect-change"].metrics["detect_change/changed"]:
        write("\nunchanged: the data is that of the newest registered version\n")
    if "chat-format" in manifests and (sources := mix_of(manifests["chat-format"].metrics)):
        write(f"\n{mix_table(sources)}\n")
    if "eval" in manifests:
        write(f"\n{score_table(manifests['eval'].metrics)}\n")
    write("\n")
    for label, step, name in (
        ("data card", "chat-format", DATA_CARD_PAGE),
        ("adapter", "train-qlora", ""),
        ("adapter", "train-dpo", ""),
        ("merged model", "merge", ""),
        ("report", "eval", REPORT_PAGE),
    ):
        if step in parsed:
            write(f"{label:<14}{_place(parsed[step], manifests[step], name)}\n")
    if "gguf-quantize" in parsed:
        for name in _names(manifests["gguf-quantize"], ".gguf"):
            if name != IMATRIX_FILE:
                write(f"{'GGUF':<14}{_place(parsed['gguf-quantize'], manifests['gguf-quantize'], name)}\n")
    if "promote" in manifests:
        write(f"{'registry':<14}{_registry_line(parsed['promote'])}\n")
    warned = [(step, line) for step, manifest in manifests.items() for line in manifest.warnings]
    if warned:
        write("\nwarnings\n")
    for step, line in warned:
        write(f"{step:<14}{line}\n")
    write(f"\nLook at the run:  mlflow ui --backend-store-uri '{tracking_uri}'\n")


def mix_table(sources: Mapping[str, Mapping[str, float]]) -> str:
    """What the model was trained on: examples, tokens and learned tokens of each source, and the shares asked for."""
    width = max(len("trained on"), *map(len, sources))
    totals = {measure: sum(own[measure] for own in sources.values()) for measure in get_args(MixBy)}
    head = "".join(f"{measure.replace('_', ' '):>24}" for measure in totals)
    lines = [f"{'trained on':<{width}}{head}   asked for".rstrip()]
    for source, own in sources.items():
        cells = "".join(f"{own[m]:>15,.0f} {own[m] / max(1, total):>7.1%}" for m, total in totals.items())
        lines.append(f"{source:<{width}}{cells}" + (f"{own['share']:>12.1%}" if "share" in own else ""))
    return "\n".join(lines)


def score_table(metrics: Mapping[str, float]) -> str:
    """Base against tuned over all rows, with standard errors, and the rows that tuning fixed or broke."""
    base, tuned = (metrics_of(metrics, model) for model in MODELS)
    shown = [name for name in base if is_total(model_metric("base", name)) and not name.endswith("_tokens")]
    lines = [f"{'metric':<20}{'base':>9}{'tuned':>18}"]
    lines += [f"{name:<20}{_score(base, name)}{_score(tuned, name)}".rstrip() for name in shown]
    if FIXED_RATE in metrics:
        lines.append(
            f"tuning fixed {metrics[FIXED]:.0f} rows, {metrics[FIXED_RATE]:.1%} of what the base fails, "
            f"and broke {metrics[BROKEN]:.0f}"
        )
    return "\n".join(lines)


def _score(metrics: Mapping[str, float], name: str) -> str:
    value, error = metrics.get(name), metrics.get(stderr_of(name))
    number = "-" if value is None else f"{value:.4g}"
    return f"{number:>9} {'' if error is None else f'± {error:.2g}':<8}"


def _place(reference: Reference, manifest: Manifest, name: str) -> str:
    """A path that can be opened here; in a bucket, the object's URI."""
    uri = f"{manifest.files_uri(reference.uri)}/{name}".rstrip("/")
    return str(local_path(uri)) if uri.startswith("file:") else uri


def _names(manifest: Manifest, suffix: str) -> list[str]:
    return [name for name in manifest.files if name.endswith(suffix)]


def _registry_line(reference: Reference) -> str:
    decision = read_decision(fetch_artifact(reference)[0])
    return f"{decision.registered_model_name} version {decision.version}: {decision.summary}"
