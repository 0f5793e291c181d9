"""What is added to the base: one adapter, or several as one, each known to be of that base."""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from finemill.artifacts.manifest import Reference
from finemill.components.merge.combined import write_combined
from finemill.components.merge.config import MergeConfig
from finemill.errors import UserError
from finemill.models.adapter import (
    check_adapter_weights,
    check_base,
    load_adapter,
    num_tokens_with,
    read_adapter_config,
)
from finemill.models.base.resolve import resolve_base_model
from finemill.models.stored_model import StoredModel
from finemill.runtime.context import StepContext
from finemill.storage.store import fetch_artifact

logger = logging.getLogger(__name__)

# What mixtures of experts call the layer that chooses among them.
_ROUTERS = ("gate", "router")


@dataclass(frozen=True)
class Addition:
    """A folder with an adapter, and the factor on its part."""

    folder: Path
    scale: float

    def on(self, stored: StoredModel) -> Any:
        """PEFT's model of base and adapter. Raises: UserError: it does not fit the base, or takes no `scale`."""
        _refuse_partial(self.folder)
        check_adapter_weights(self.folder)
        stored.set_num_tokens(num_tokens_with(self.folder, stored.model))
        tuned = load_adapter(stored.model, self.folder, assign=True)
        scale_adapter(tuned, self.scale)
        return tuned


def _refuse_partial(folder: Path) -> None:
    """Raises: UserError: an adapter that changes some tokens only, or chooses among others."""
    extra = read_adapter_config(folder).model_extra or {}
    for name in ("alora_invocation_tokens", "arrow_config", "layer_replication"):
        if extra.get(name):
            raise UserError(
                f"merge: the adapter in {folder} was trained with {name}, and is no change of the weights that holds "
                "for every token: serve base and adapter unmerged"
            )


@contextmanager
def all_adapters(base_model: Path, adapter: Path, config: MergeConfig, context: StepContext) -> Iterator[Addition]:
    """The step's adapter, or it and the further ones as one, which is there until the block ends.

    Raises: UserError: a further one is no adapter, of another base, or more than LoRA.
    """
    if not config.further_adapters:
        yield Addition(adapter, config.scale)
        return
    context.recorder.log_progress(f"adding up {len(config.further_adapters) + 1} adapters")
    parts = [(adapter, config.scale)]
    for further in config.further_adapters:
        folder, manifest = fetch_artifact(Reference.parse(further.adapter))
        if manifest.kind != "adapter":
            raise UserError(
                f"merge: further_adapters: {further.adapter} is of the kind '{manifest.kind}', not 'adapter': pass "
                "what train-qlora or train-dpo printed"
            )
        base_known_by(folder, manifest.parents, config, context)
        parts.append((folder, further.scale))
    with TemporaryDirectory(prefix="finemill-adapters-") as folder_of_all:
        write_combined(base_model, parts, Path(folder_of_all))
        yield Addition(Path(folder_of_all), 1.0)


def base_known_by(adapter: Path, parents: Mapping[str, str], config: MergeConfig, context: StepContext) -> str:
    """How the base is known to be the adapter's own. Raises: UserError: it is not, and `force` is off."""
    given = resolve_base_model(context.references["base_model"])
    try:
        return check_base(adapter, parents, given)
    except UserError as error:
        if not config.force:
            raise UserError(f"merge: {error}; --force true merges them all the same, and says so") from None
        logger.warning("forced: %s", error)
        return f"forced: {error}"


def refuse_router(tuned: Any, config: MergeConfig) -> None:
    """Raises: UserError: LoRA on a mixture's routers, and `force` is off."""
    from peft.tuners.lora import LoraLayer

    routers = [
        name.removeprefix("base_model.model.")
        for name, module in tuned.named_modules()
        if isinstance(module, LoraLayer) and name.rpartition(".")[2] in _ROUTERS
    ]
    if routers and not config.force:
        raise UserError(
            f"merge: the adapter has LoRA on the router, {routers[0]} for one of {len(routers)}: PEFT's all-linear "
            "puts it there unasked, and without the auxiliary loss some experts fall out of use; leave it out of "
            "target_modules, or train routers as a whole (modules_to_save); --force true merges it all the same"
        )


def scale_adapter(tuned: Any, scale: float) -> None:
    """Multiply the adapter's part by `scale`. Raises: UserError: the adapter is more than a sum with a factor."""
    from peft.tuners.lora import LoraLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    if scale == 1.0:
        return
    for name, module in tuned.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper) or getattr(module, "lora_variant", None):
            raise UserError(
                f"merge: scale {scale:g} needs plain LoRA; {name.removeprefix('base_model.model.')} is trained as a "
                "whole, or with DoRA: merge with scale 1"
            )
        if isinstance(module, LoraLayer):
            module.scale_layer(scale)
