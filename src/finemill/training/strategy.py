"""How several processes share a training: copies of the model, or shards by PyTorch's FSDP2 or DeepSpeed's ZeRO."""

import json
import logging
import os
from collections.abc import Mapping
from dataclasses import replace
from importlib.util import find_spec
from itertools import permutations
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor
from transformers import Trainer

from finemill.errors import UserError
from finemill.kernels.planning.planner import plan_step
from finemill.runtime.processes import num_processes
from finemill.training.config import SHARDED, ConfigT, LoRATrainingConfig
from finemill.training.decoder import UnknownDecoderError, read_decoder
from finemill.training.memory import (
    GIB,
    covered_workload,
    eight_bit_moments,
    fits_without_recompute,
    in_one_piece,
    needed_gib,
    not_on_kernels,
    sharded_gib,
    takes_shards,
)

logger = logging.getLogger(__name__)

ACCELERATE_FILE = "accelerate_config.yaml"
"""What `accelerate launch --config_file` would need for the same training."""
DEEPSPEED_FILE = "deepspeed_config.json"
"""DeepSpeed's own configuration, which that file names."""
KEEPS_LAYERS = {"reshard_after_forward": False, "activation_checkpointing": False}
"""FSDP2 where a card holds whole layers and activations: gathered once per step, for all of its passes."""
WHOLE_MODEL = KEEPS_LAYERS | {"auto_wrap_policy": "NO_WRAP"}
"""The same in one piece, for small models: launching 28 gathers of 1.7B takes Python longer than the GPUs."""
_ANY_MACHINE = GIB
"""Bytes that a training on a CPU may take for granted, whatever else its container holds."""
PREFETCHED = 500_000_000
"""Weights that ZeRO-3 gathers ahead of their use: a layer of any model, where DeepSpeed's default is a tenth."""


def check_strategy(config: LoRATrainingConfig) -> None:
    """Refuse what cannot run here. Raises: UserError: DeepSpeed is asked for and not installed."""
    if config.strategy.startswith("zero") and find_spec("deepspeed") is None:
        raise UserError(
            f"strategy '{config.strategy}' needs DeepSpeed: install it with pip install 'finemill[deepspeed]', or use "
            "strategy 'fsdp2'"
        )


def settle_strategy(config: ConfigT, base_model: Path, limit: float | None) -> ConfigT:
    """The configuration with a strategy and a choice of recomputation that are not `auto`.

    Args:
        config: as it was asked for.
        base_model: whose config.json says how large it is.
        limit: bytes that training may allocate on a card; None on a CPU, where copies are made.
    """
    model = read_decoder(base_model)
    config = _with_strategy(config, model, limit)
    if config.gradient_checkpointing != "auto":
        return config
    # The kernels plan by themselves; what they turn out not to cover is recomputed.
    if limit is None:
        fits = config.strategy not in SHARDED and fits_without_recompute(model, config, _ANY_MACHINE, 1)
    else:
        fits = not_on_kernels(config) is not None and fits_without_recompute(model, config, limit, num_processes())
    if fits and config.strategy == "fsdp2" and not (config.offload or config.strategy_config):
        kept = WHOLE_MODEL if in_one_piece(model, config) else KEEPS_LAYERS
        config = config.model_copy(update={"strategy_config": kept})
    return config.model_copy(update={"gradient_checkpointing": not fits})


def _with_strategy(config: ConfigT, model: Mapping[str, Any], limit: float | None) -> ConfigT:
    processes = num_processes()
    if processes == 1:
        if config.strategy in ("shard", *SHARDED) or config.offload:
            asked = "offload" if config.strategy == "auto" else f"strategy '{config.strategy}'"
            logger.warning("%s has nothing to share in one process: trains without shards", asked)
        return config.model_copy(update={"strategy": "ddp", "offload": False, "strategy_config": None})
    if config.strategy == "shard":
        _check_shards(model, config, limit)
    if config.strategy != "auto":
        return config
    if limit is not None and takes_shards(model, config, limit, _readable_gpus()):
        logger.warning("a copy of the base does not fit a card: strategy 'shard'")
        return config.model_copy(update={"strategy": "shard", "offload": False})
    copies = config.model_copy(update={"strategy": "ddp", "offload": False})
    if limit is None or config.not_sharded_because():
        return copies
    try:
        needed = needed_gib(model, config)
    except UnknownDecoderError:
        return copies
    if needed * GIB <= limit:
        return copies
    offload = config.offload or sharded_gib(model, config, processes) * GIB > limit
    logger.warning("%.1f GiB do not fit a card: strategy 'fsdp2'%s", needed, " with offload" if offload else "")
    return config.model_copy(update={"strategy": "fsdp2", "offload": offload})


def _check_shards(model: Mapping[str, Any], config: LoRATrainingConfig, limit: float | None) -> None:
    """Look before anything is loaded whether shards of a 4-bit base can be trained.

    Raises: UserError: the kernels do not run, GPUs cannot read each other's memory, or no plan fits.
    """
    reason, work, gpus = None, covered_workload(model, config), _readable_gpus()
    if limit is None:
        reason = "there is no GPU"
    elif work is None:
        reason = not_on_kernels(config) or f"the kernels do not cover a {model.get('model_type')}"
    elif model.get("quantization_config"):
        reason = "layers of a base that is quantized already may differ in their bits"
    elif gpus == 1:
        reason = "the processes of a host have no GPUs that can read each other's memory"
    if reason or limit is None or work is None:
        raise UserError(f"strategy 'shard' cannot run here: {reason}; use strategy 'ddp' or 'fsdp2'")
    plan_step(replace(work, shards=gpus), int(limit), streamed=True, eight_bit=eight_bit_moments(config))


def _readable_gpus() -> int:
    """GPUs of this host's processes that can read each other's memory; 1 if some cannot."""
    count = int(os.environ.get("LOCAL_WORLD_SIZE") or 1) if torch.cuda.is_available() else 1
    pairs = permutations(range(count), 2)
    return count if all(torch.cuda.can_device_access_peer(one, other) for one, other in pairs) else 1


def strategy_arguments(config: LoRATrainingConfig) -> dict[str, Any]:
    """The arguments of transformers' trainer that a settled strategy is."""
    shared: dict[str, Any] = {"ddp_timeout": config.ddp_timeout}
    if config.strategy == "fsdp2":
        # Else gradients of all passes but the last would be summed whole, beside the shards.
        each = {"gradient_accumulation_kwargs": {"sync_each_batch": bool(config.gradient_checkpointing)}}
        return shared | {"fsdp": True, "fsdp_config": _fsdp_config(config), "accelerator_config": each}
    if config.strategy in SHARDED:
        return shared | {"deepspeed": _deepspeed_config(config)}
    return shared


def _fsdp_config(config: LoRATrainingConfig) -> dict[str, Any]:
    """FSDP2 on whole decoder layers; recomputation is its own, which gathers a layer once for it."""
    settings: dict[str, Any] = {
        "reshard_after_forward": True,
        "cpu_offload": config.offload,
        "activation_checkpointing": bool(config.gradient_checkpointing),
    }
    # Checkpoints are written from whole tensors, and a base is read by all processes, whatever a file says.
    kept = {"version": 2, "state_dict_type": "FULL_STATE_DICT", "cpu_ram_efficient_loading": False}
    return (config.strategy_config or settings) | kept


def _deepspeed_config(config: LoRATrainingConfig) -> dict[str, Any]:
    """ZeRO with the trainer's own AdamW and schedule; what says "auto" follows the trainer's arguments."""
    if config.strategy_config is not None:
        return dict(config.strategy_config)
    zero: dict[str, Any] = {"stage": int(config.strategy[-1]), "overlap_comm": True, "contiguous_gradients": True}
    if zero["stage"] == 3:
        zero["stage3_prefetch_bucket_size"] = PREFETCHED
    if config.offload:
        place = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
        zero |= {"offload_optimizer": place} | ({"offload_param": place} if zero["stage"] == 3 else {})
    names = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    return {
        "zero_optimization": zero,
        # DeepSpeed's own AdamW for CPUs is compiled when it is first used: no image has a compiler.
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": "auto"},
        "fp16": {"enabled": "auto"},
        **dict.fromkeys(names, "auto"),
    }


def prepare_shards(trainer: Trainer) -> None:
    """Make up for what Accelerate leaves out: shards on a CPU, layers kept from pass to pass, ZeRO-3's unit."""
    if trainer.args.fsdp and trainer.args.device.type == "cpu":
        _shard_on_cpu(trainer)
    if trainer.args.fsdp and not trainer.accelerator.state.fsdp_plugin.reshard_after_forward:
        _keep_layers_between_passes(trainer)
    in_pieces = trainer.is_deepspeed_enabled and trainer.accelerator.deepspeed_plugin.zero_stage == 3
    # Beside frozen weights it would take adapters away before their gradients are computed.
    if in_pieces and all(parameter.requires_grad for parameter in trainer.model.parameters()):
        gather_whole_layers(trainer.model)


def gather_whole_layers(model: Any) -> None:
    """Have ZeRO-3 gather a decoder layer at once: its hooks on every module inside one take longer than the layer."""
    from deepspeed.utils import set_z3_leaf_modules

    set_z3_leaf_modules(model, list(model._no_split_modules), raise_if_not_found=False)


def _keep_layers_between_passes(trainer: Trainer) -> None:
    """Have FSDP2 drop whole layers after the last pass of a step alone: no weight changes before."""
    train = trainer.training_step

    def training_step(model: Any, *inputs: Any, **named: Any) -> Tensor:
        model.set_reshard_after_backward(trainer.accelerator.sync_gradients)
        loss: Tensor = train(model, *inputs, **named)
        return loss

    trainer.training_step = training_step


def _shard_on_cpu(trainer: Trainer) -> None:
    """PyTorch's FSDP2 shards on a CPU, too, over gloo, but Accelerate asks for GPUs."""
    from accelerate import PartialState
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    settings = dict(trainer.args.fsdp_plugin_args)
    if settings.pop("cpu_offload", False):
        logger.warning("offload has no effect without a GPU: shards are in host memory anyway")
    state = trainer.accelerator.state
    # The one is copied into the other whenever Accelerate asks for it.
    state.distributed_type = PartialState().distributed_type = DistributedType.FSDP
    state.fsdp_plugin = FullyShardedDataParallelPlugin(**settings)
    trainer.is_fsdp_enabled = True


def write_strategy(output_dir: Path, config: LoRATrainingConfig, trainer: Trainer) -> None:
    """Write what `accelerate launch` needs to share a training in the same way, beside the adapter."""
    args = trainer.args
    launch: dict[str, Any] = {
        "compute_environment": "LOCAL_MACHINE",
        "distributed_type": "MULTI_GPU",
        "mixed_precision": args.mixed_precision,
        "num_machines": 1,
        "num_processes": args.world_size,
    }
    if config.strategy == "fsdp2":
        plugin = trainer.accelerator.state.fsdp_plugin
        launch |= {"distributed_type": "FSDP", "fsdp_config": _launch_settings(plugin, args.fsdp_config)}
    elif config.strategy in SHARDED:
        used: Mapping[str, Any] = trainer.accelerator.deepspeed_config
        (output_dir / DEEPSPEED_FILE).write_text(json.dumps(dict(used), indent=2) + "\n", encoding="utf-8")
        launch |= {"distributed_type": "DEEPSPEED", "deepspeed_config": {"deepspeed_config_file": DEEPSPEED_FILE}}
    (output_dir / ACCELERATE_FILE).write_text(yaml.safe_dump(launch), encoding="utf-8")


def _launch_settings(plugin: Any, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The keys that `accelerate launch` reads, which are the trainer's with `fsdp_` before them."""
    layers = sorted(plugin.transformer_cls_names_to_wrap or ())
    return {
        "fsdp_version": 2,
        "fsdp_auto_wrap_policy": settings.get("auto_wrap_policy", "TRANSFORMER_BASED_WRAP"),
        **({"fsdp_transformer_layer_cls_to_wrap": ",".join(layers)} if layers else {}),
        "fsdp_reshard_after_forward": bool(settings.get("reshard_after_forward", True)),
        "fsdp_offload_params": bool(settings.get("cpu_offload", False)),
        "fsdp_activation_checkpointing": bool(settings.get("activation_checkpointing", False)),
        "fsdp_state_dict_type": settings["state_dict_type"],
    }
