"""The other processes of a training: whether they train the same, are alive, and keep step.

Processes meet at the store of torch's rendezvous. Before anything is loaded each writes there what it is about to
train, and all compare. From then on a thread of each writes every few seconds how far it is and reads how far the
others are: a process that falls silent was killed or stopped, one that stays behind while the others wait hangs. Either
ends the training with the line that names it, where NCCL alone would wait on.
"""

import json
import os
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from importlib.metadata import version
from typing import Any

import torch
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from finemill.artifacts.ports import BASE_MODEL
from finemill.errors import TemporaryError, UserError
from finemill.models.base.resolve import resolve_base_model
from finemill.runtime.context import StepContext
from finemill.runtime.processes import num_processes, process_rank
from finemill.training.config import LoRATrainingConfig

BEAT_S = 2.0
"""Seconds between two signs of life."""
SILENCE_S = 30.0
"""Seconds without one after which a process counts as lost."""
GRACE_S = 60
"""Seconds that a collective may outlast `ddp_timeout`, so that the watch speaks before it."""
_PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "bitsandbytes")
_stores: list[Store] = []


def identity(config: LoRATrainingConfig, context: StepContext) -> dict[str, str]:
    """What must be the same in all processes, by the name that people know it by."""
    settings = {f"config.{name}": json.dumps(value) for name, value in config.model_dump(mode="json").items()}
    inputs = {f"input {port}": manifest.digest for port, manifest in context.manifests.items()}
    code = {"finemill's code": context.checkpoints.producer.code}
    base = {"base model": resolve_base_model(context.references[BASE_MODEL]).digest}
    return inputs | base | settings | code | {f"version of {name}": version(name) for name in _PACKAGES}


def compare(store: Store, mine: Mapping[str, str], rank: int, processes: int) -> None:
    """Wait for all processes' identities. Raises: UserError: one differs; TemporaryError: one did not come."""
    store.set(f"identity/{rank}", json.dumps(mine))
    try:
        theirs = [json.loads(store.get(f"identity/{other}")) for other in range(processes)]
    except torch.distributed.DistError as error:
        raise TemporaryError(
            f"{processes} processes should train, not all came: {' '.join(str(error).split())}"
        ) from None
    for other, found in enumerate(theirs):
        different = [name for name in theirs[0] | found if theirs[0].get(name) != found.get(name)]
        if different:
            name = different[0]
            raise UserError(
                f"process {other} trains something else than process 0: {name} is {found.get(name, 'none')}, there "
                f"{theirs[0].get(name, 'none')}; give all the same inputs, configuration and image"
            )


@dataclass
class _Beat:
    """How far a process is."""

    count: int = 0
    ticks: int = 0
    step: int = 0
    finished: bool = False


@dataclass
class _Peer:
    """What is known of another process, and since when."""

    beat: _Beat
    heard: float = field(default_factory=time.monotonic)


class Watch(TrainerCallback):  # type: ignore[misc]
    """Ends this process when another one is lost, or none has come further for too long.

    Args:
        store: where processes write how far they are.
        rank: of this process.
        processes: how many there are.
        patience: seconds without progress after which the one that is behind counts as hanging.
    """

    def __init__(self, store: Store, rank: int, processes: int, patience: float) -> None:
        self._store, self._rank, self._processes, self._patience = store.clone(), rank, processes, patience
        self._mine = _Beat()
        self._peers = {other: _Peer(_Beat()) for other in range(processes) if other != rank}
        self._progress: float | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="finemill-watch", daemon=True)

    def __enter__(self) -> "Watch":
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # Of one that fails the others hear nothing more, and end, too.
        self._mine.finished = kind is None
        self._stop.set()
        self._thread.join()

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Count."""
        self._mine.step = state.global_step + 1
        self._tick()

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Count."""
        self._tick()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Count."""
        self._tick()

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Count."""
        self._tick()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """What follows is the main process's."""
        self._progress = None

    def _tick(self) -> None:
        self._mine.ticks += 1
        self._progress = time.monotonic()

    def _run(self) -> None:
        while not self._stop.wait(BEAT_S):
            try:
                self._exchange()
            except RuntimeError:
                self._end("the process that keeps the others' addresses is gone")
            if problem := self._problem(time.monotonic()):
                self._end(problem)
        if self._mine.finished:
            with suppress(RuntimeError):  # the store may be closed already
                self._exchange()

    def _exchange(self) -> None:
        """Write how far this process is, and read how far the others are."""
        self._mine.count += 1
        self._store.set(f"beat/{self._rank}", json.dumps(vars(self._mine)))
        for other, peer in self._peers.items():
            key = f"beat/{other}"
            if not self._store.check([key]):
                continue
            beat = _Beat(**json.loads(self._store.get(key)))
            if beat.count != peer.beat.count:
                self._peers[other] = _Peer(beat)

    def _problem(self, now: float) -> str | None:
        """What is wrong with whom, None for nothing."""
        for other, peer in self._peers.items():
            if not peer.beat.finished and now - peer.heard > SILENCE_S:
                return (
                    f"process {other} was lost at step {peer.beat.step}: nothing was heard of it for {SILENCE_S:.0f} s"
                )
        if self._progress is None or now - self._progress < self._patience:
            return None
        ticks = {self._rank: self._mine.ticks} | {other: peer.beat.ticks for other, peer in self._peers.items()}
        behind = min(ticks, key=lambda rank: ticks[rank])
        step = self._mine.step if behind == self._rank else self._peers[behind].beat.step
        if ticks[behind] == max(ticks.values()):
            return f"no process has come further than step {step} for {self._patience:.0f} s"
        return f"process {behind} hangs at step {step}: the others have waited for it for {self._patience:.0f} s"

    def _end(self, problem: str) -> None:
        """End the process: its main thread waits in a collective, where no exception reaches it."""
        print(f"finemill: {problem}; run again to continue from the last checkpoint", file=sys.stderr, flush=True)
        os._exit(TemporaryError.exit_code)


@contextmanager
def together(config: LoRATrainingConfig, context: StepContext, device: torch.device) -> Iterator[Watch | None]:
    """Join the other processes, and watch over them for as long as the training lasts; None where there are none.

    Raises: UserError: another process trains something else.
        TemporaryError: a process did not come, or was lost in the middle of a collective.
    """
    processes, rank = num_processes(), process_rank()
    if processes == 1:
        yield None
        return
    store = _meet(config.ddp_timeout)
    compare(store, identity(config, context), rank, processes)
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group(
            "gloo" if device.type == "cpu" else "cuda:nccl,cpu:gloo",
            store=PrefixStore("group", store),
            rank=rank,
            world_size=processes,
            timeout=timedelta(seconds=config.ddp_timeout + GRACE_S),
        )
    try:
        with Watch(store, rank, processes, config.ddp_timeout) as watch:
            yield watch
    except RuntimeError as error:
        if not _is_lost_connection(error):
            raise
        line = " ".join(str(error).split())
        raise TemporaryError(
            f"another process ended in the middle of the training ({line:.120}): run again to continue from the last "
            "checkpoint"
        ) from None


def _meet(timeout: int) -> Store:
    """A store that all processes of this training share, and no training before it in the same processes."""
    if not _stores:
        store, _, _ = next(rendezvous("env://", timeout=timedelta(seconds=timeout)))
        _stores.append(store)
    _stores.append(PrefixStore(f"finemill/{len(_stores)}", _stores[0]))
    return _stores[-1]


def _is_lost_connection(error: RuntimeError) -> bool:
    text = str(error).lower()
    return isinstance(error, torch.distributed.DistError) or "gloo" in text or "connection closed by peer" in text
