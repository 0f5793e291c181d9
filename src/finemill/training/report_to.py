"""Training curves in Weights & Biases and TensorBoard, beside MLflow or in its place."""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from finemill.errors import UserError
from finemill.runtime.context import Recorder, StepContext
from finemill.runtime.processes import is_main_process
from finemill.training.config import LoRATrainingConfig
from finemill.training.system import system_metrics

PROJECT = "finemill"
"""Project in Weights & Biases where WANDB_PROJECT names none."""
Log = Callable[[Mapping[str, float], int], None]


class _Reports:
    """A recorder whose metrics go to all that were named."""

    def __init__(self, recorder: Recorder, logs: list[Log]) -> None:
        self._recorder, self._logs = recorder, logs

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Record values of one training step everywhere."""
        for log in self._logs:
            log(metrics, step)

    def log_progress(self, text: str) -> None:
        """Show one short line about where the step is."""
        self._recorder.log_progress(text)


@contextmanager
def reporting(config: LoRATrainingConfig, context: StepContext) -> Iterator[Recorder]:
    """The context's recorder, its metrics sent to what `report_to` names.

    MLflow gets how busy the machine is with every point; Weights & Biases measures that by itself.

    Raises: UserError: a package is missing, or Weights & Biases has no key.
    """
    logs: list[Log] = [_with_system_metrics(context.recorder)] if "mlflow" in config.report_to else []
    with ExitStack() as stack:
        if is_main_process():
            if "wandb" in config.report_to:
                logs.append(stack.enter_context(_wandb(config, context)))
            if "tensorboard" in config.report_to:
                logs.append(stack.enter_context(_tensorboard(context)))
        yield _Reports(context.recorder, logs)


def _with_system_metrics(recorder: Recorder) -> Log:
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")

    def log(metrics: Mapping[str, float], step: int) -> None:
        recorder.log_metrics({**metrics, **system_metrics(device)}, step)

    return log


def _name(context: StepContext) -> str:
    return f"{context.checkpoints.producer.step}-{context.key[:12]}"


@contextmanager
def _wandb(config: LoRATrainingConfig, context: StepContext) -> Iterator[Log]:
    try:
        import wandb
    except ImportError:
        raise UserError("report_to wandb needs it: pip install 'finemill[report]'") from None
    values: dict[str, Any] = {"config": config.model_dump(mode="json"), "inputs": dict(context.references)}
    try:
        run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT), name=_name(context), group=context.run_id, config=values
        )
    except (wandb.errors.UsageError, wandb.errors.CommError) as error:
        raise UserError(
            f"report_to wandb: {' '.join(str(error).split()):.200}: set WANDB_API_KEY, or WANDB_MODE=offline"
        ) from None
    except ValidationError as error:
        wrong = error.errors()[0]
        raise UserError(
            f"report_to wandb: its setting {'.'.join(map(str, wrong['loc']))}: {wrong['msg']:.160}: change the "
            "variable WANDB_* that says otherwise"
        ) from None
    with run:
        yield lambda metrics, step: run.log(dict(metrics), step=step)


@contextmanager
def _tensorboard(context: StepContext) -> Iterator[Log]:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError("report_to tensorboard needs it: pip install 'finemill[report]'") from None
    folder = Path(os.environ.get("TENSORBOARD_LOGGING_DIR", "runs"), _name(context))
    try:
        writer = SummaryWriter(str(folder))
    except OSError as error:
        raise UserError(f"report_to tensorboard: {error}: set TENSORBOARD_LOGGING_DIR to a folder of yours") from None

    def log(metrics: Mapping[str, float], step: int) -> None:
        for name, value in metrics.items():
            writer.add_scalar(name, value, step)
        writer.flush()

    try:
        yield log
    finally:
        writer.close()
