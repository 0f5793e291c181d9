"""The checks that run before anything is spent: seconds on a CPU instead of a GPU that finds out after an hour."""

import logging
import math
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

from finemill.artifacts.plan import RunPlan, write_plan
from finemill.components.preflight.base_model import BaseFacts, inspect_base_model
from finemill.components.preflight.config import PreflightConfig, PreflightSettings
from finemill.config import StepConfig, parse_config
from finemill.errors import UserError
from finemill.models.base.pin import pin_base_model
from finemill.registry.config import RegisterConfig
from finemill.registry.snapshot import read_registered_model
from finemill.runtime.catalog import SECTIONS
from finemill.runtime.context import StepContext
from finemill.runtime.train_job import check_train_jobs
from finemill.storage.store import hold_lock
from finemill.tracking.settings import Tracking
from finemill.training.config import LoRATrainingConfig
from finemill.training.decoder import UnknownDecoderError, complete
from finemill.training.memory import needed_gib
from finemill.training.new_tokens import with_new_tokens
from finemill.training.stored_bits import check_stored_bits

logger = logging.getLogger(__name__)


def check_time(inputs: Mapping[str, str], config: PreflightConfig, tracking: Tracking) -> dict[str, str]:
    """The state that a check depends on is that of the world: each run checks anew."""
    return {"checked": datetime.now(UTC).isoformat()}


def run(*, output_dir: Path, config: PreflightConfig, context: StepContext) -> dict[str, float]:
    """Check that a run can succeed; the harness has written to the store before.

    Returns: metrics; the estimates are in `plan.json` too, with the base model's exact revision.
    Raises: UserError: a configuration is wrong, no such base model, too little GPU memory, no credentials, no right
        to make a TrainJob.
        TemporaryError: a service is out of reach.
    """
    parsed = check_configs(config)
    if any(SECTIONS[section].needs_registry for section in parsed):
        # Whoever registers or promotes holds a lock in the store, which not every S3 server can keep.
        with hold_lock(f"{context.store}/locks/preflight.lock"):
            pass
    check_registry(parsed, context.tracking)
    check_nodes(parsed)
    base = inspect_base_model(_pinned(config.base_model, context)) if config.base_model else None
    training = next((item for item in parsed.values() if isinstance(item, LoRATrainingConfig)), None)
    if training:
        # chat-format's, which its data set brings to the training
        num_tokens = max(len(getattr(section, "new_tokens", ())) for section in parsed.values())
        training = with_new_tokens(training, num_tokens)
    needed = None
    if base and training:
        check_stored_bits(base.config, training, base.id)
        needed = check_memory(base, training, config)
    plan = RunPlan(
        base_model=base.id if base else None,
        store=context.store,
        steps={section: item.model_dump(mode="json") for section, item in parsed.items()},
        gpu_memory_gib=needed,
    )
    write_plan(output_dir, plan)
    return {} if needed is None else {"preflight/gpu_memory_gib": needed}


def _pinned(base_model: str, context: StepContext) -> str:
    """The commit that the run's other steps will take too."""
    return pin_base_model(base_model, context.store, context.run_id, context.checkpoints.producer)


def check_configs(config: PreflightConfig) -> dict[str, StepConfig]:
    """Parse every section. Raises: UserError: names the section and the key."""
    unknown = sorted(set(config.steps) - set(SECTIONS))
    if unknown:
        raise UserError(f"preflight: no step reads the section {', '.join(unknown)}; allowed are {', '.join(SECTIONS)}")
    return {
        section: parse_config(SECTIONS[section].config, values, section) for section, values in config.steps.items()
    }


def check_registry(sections: Mapping[str, StepConfig], tracking: Tracking) -> None:
    """Ask the model registry, as the steps will, for the model that the run is about.

    Raises: UserError: it is nowhere, or refuses us. TemporaryError: it is out of reach.
    """
    if any(SECTIONS[section].needs_registry for section in sections):
        config = sections.get("register")
        named = config if isinstance(config, RegisterConfig) else RegisterConfig()
        read_registered_model(tracking.registry, named.registered_model_name)


def check_nodes(sections: Mapping[str, StepConfig]) -> None:
    """Raises: UserError: a step is to have a TrainJob's nodes compute, and cannot make one."""
    num_nodes = max((getattr(section, "num_nodes", 1) for section in sections.values()), default=1)
    if num_nodes > 1:
        check_train_jobs(num_nodes)


def check_memory(base: BaseFacts, training: LoRATrainingConfig, config: PreflightSettings) -> float | None:
    """GiB of GPU memory that training needs at least; None of a family whose memory cannot be estimated.

    Raises: UserError: the GPU or `memory_gb` is smaller.
    """
    try:
        needed = needed_gib(complete(base.config), training, host_gib=config.host_memory_gib)
    except UnknownDecoderError as error:
        logger.warning("GPU memory of training %s is not checked: %s", base.id, error)
        return None
    gpu, host = config.gpu_memory_gib, config.host_memory_gib
    limits = {f"memory_gb is {training.memory_gb}": training.memory_gb, f"the GPU has {gpu}": gpu}
    beside = "" if host is None else f" beside a container of {host:g}"
    for found, limit in limits.items():
        if limit is not None and needed > limit:
            raise UserError(
                f"training {base.id} needs {math.ceil(100 * needed) / 100:.2f} GiB of GPU memory at least{beside}, "
                f"{found}: lower max_length ({training.max_length}), per_device_train_batch_size "
                f"({training.per_device_train_batch_size}) or lora_r ({training.lora_r}), or ask for a larger GPU"
            )
    return needed
