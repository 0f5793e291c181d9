"""Weights and moments of a sharded training, whole: its checkpoints are those of a training without shards.

A checkpoint holds the weights that are trained and torch's own state of AdamW, in the files of transformers' trainer:
one that FSDP2 wrote on eight GPUs is continued by ZeRO-3 on two, or by one process on the plain path.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointWrapper
from transformers import Trainer

from finemill.training.hollow_base import filled_as_cut, hollow_base_of

ADAPTER_FILE, MODEL_FILE = "adapter_model.safetensors", "model.safetensors"
OPTIMIZER_FILE, SCHEDULER_FILE = "optimizer.pt", "scheduler.pt"
_MOMENTS = ("exp_avg", "exp_avg_sq")
_RATES = ("base_lrs", "_last_lr")
"""What a schedule's state has per group of parameters."""


def trained_weights(model: nn.Module) -> dict[str, Tensor]:
    """Every trained weight whole, in host memory, by each of its names.

    A collective of all processes that share the model.
    """
    _drop_whole_layers(model)
    return {
        name: _whole(parameter).detach().cpu().contiguous().clone()
        for name, parameter in _parameters(model, remove_duplicate=False)
        if parameter.requires_grad
    }


def set_trained_weights(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Give the trained parameters these values, in the memory and the shards that they have."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    _drop_whole_layers(model)
    with torch.no_grad():
        for name, parameter in _parameters(model):
            if not parameter.requires_grad:
                continue
            value = weights[name]
            if hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping"):
                _deepspeed().safe_set_full_fp32_param(parameter, value)
            elif isinstance(parameter, DTensor):
                local = value.to(parameter.device, parameter.dtype)
                parameter.copy_(distribute_tensor(local, parameter.device_mesh, parameter.placements))
            else:
                parameter.copy_(value)


@contextmanager
def plain_names(model: nn.Module) -> Iterator[None]:
    """Give modules the names that they have without FSDP2's recomputation, which wraps layers: PEFT saves by them."""
    wrapped = {name: module for name, module in model.named_modules() if isinstance(module, CheckpointWrapper)}
    for name, module in wrapped.items():
        model.set_submodule(name, module._checkpoint_wrapped_module)
    try:
        yield
    finally:
        for name, module in wrapped.items():
            model.set_submodule(name, module)


def _parameters(model: nn.Module, *, remove_duplicate: bool = True) -> list[tuple[str, Any]]:
    """Parameters by the names that they have in a model that is not sharded."""
    with plain_names(model):
        return list(model.named_parameters(remove_duplicate=remove_duplicate))


def _drop_whole_layers(model: nn.Module) -> None:
    """Have FSDP2 put its shards in the place of the 16-bit layers that an evaluation has left whole."""
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def _whole(parameter: nn.Parameter) -> Tensor:
    from torch.distributed.tensor import DTensor

    if hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping"):
        found: Tensor = _deepspeed().safe_get_full_fp32_param(parameter)
        return found
    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter


def _deepspeed() -> Any:
    import deepspeed.utils

    return deepspeed.utils


class WholeState:
    """Lets a trainer save and restore a sharded training as one that is not sharded.

    Args:
        trainer: before `train`; its model is still whole.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._groups: list[list[str]] = []
        """Names of the parameters in the optimizer's groups, in its order."""
        self._settings: list[dict[str, Any]] = []
        """The groups' settings as they were made."""
        self._create_optimizer, self._prepare = trainer.create_optimizer, trainer._prepare_for_training
        trainer.create_optimizer = self.create_optimizer
        trainer._prepare_for_training = self.prepare_for_training
        trainer.save_model = self.save_model
        trainer._save_optimizer_and_scheduler = self.save_optimizer_and_scheduler

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """Create the optimizer, and remember the order of its parameters before shards replace them."""
        optimizer = self._create_optimizer(*args, **kwargs)
        names = {id(parameter): name for name, parameter in self._trainer.model.named_parameters()}
        self._groups = [[names[id(parameter)] for parameter in group["params"]] for group in optimizer.param_groups]
        self._settings = [_without_parameters(group) for group in optimizer.param_groups]
        return optimizer

    def prepare_for_training(self, max_steps: int, train_dataloader: Any, checkpoint: str | None) -> Any:
        """Restore the weights before the model is cut into shards, cut it, then restore the moments."""
        trainer = self._trainer
        if checkpoint is not None:
            _load_weights(trainer.model, Path(checkpoint))
        with filled_as_cut(trainer):
            prepared = self._prepare(max_steps, train_dataloader, None)
        if checkpoint is not None:
            saved = torch.load(Path(checkpoint, OPTIMIZER_FILE), map_location="cpu", weights_only=True)
            self._load_moments(saved["state"])
            for group, values in zip(self._live_groups(), saved["param_groups"], strict=True):
                group |= _without_parameters(values)
            schedule = torch.load(Path(checkpoint, SCHEDULER_FILE), weights_only=True)
            trainer.lr_scheduler.load_state_dict(self._schedule_for(trainer.lr_scheduler.state_dict(), schedule))
        return prepared

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the trained weights whole."""
        trainer = self._trainer
        weights = trained_weights(trainer.model)
        if trainer.args.should_save:
            with plain_names(trainer.model):
                trainer._save(output_dir or trainer.args.output_dir, state_dict=weights)

    def save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Write AdamW's moments whole, as torch numbers them, and the schedule."""
        trainer = self._trainer
        _drop_whole_layers(trainer.model)
        parameters = dict(_parameters(trainer.model))
        names = [name for group in self._groups for name in group]
        if trainer.is_deepspeed_enabled:
            _link_moments(trainer.optimizer.optimizer)
        state = {index: self._moments(parameters[name]) for index, name in enumerate(names)}
        if not trainer.args.should_save:
            return
        groups, begin = [], 0
        for made, live, members in zip(self._settings, self._live_groups(), self._groups, strict=True):
            settings = {name: live.get(name, value) for name, value in made.items()}
            groups.append(settings | {"params": list(range(begin, begin + len(members)))})
            begin += len(members)
        torch.save({"state": state, "param_groups": groups}, Path(output_dir, OPTIMIZER_FILE))
        torch.save(self._whole_schedule(trainer.lr_scheduler.state_dict()), Path(output_dir, SCHEDULER_FILE))

    def _live_groups(self) -> list[dict[str, Any]]:
        """The optimizer's groups as they are; DeepSpeed leaves out what holds no parameter."""
        live: list[dict[str, Any]] = self._trainer.optimizer.param_groups
        if len(live) == len(self._groups):
            return live
        rest = iter(live)
        return [next(rest) if members else {} for members in self._groups]

    def _whole_schedule(self, live: dict[str, Any]) -> dict[str, Any]:
        """The schedule's state with rates for all groups; DeepSpeed leaves out what holds no parameter."""
        if len(live["base_lrs"]) == len(self._groups):
            return live
        rates = {name: iter(live[name]) for name in _RATES}
        return live | {
            name: [next(rates[name]) if members else live[name][0] for members in self._groups] for name in _RATES
        }

    def _schedule_for(self, live: dict[str, Any], saved: dict[str, Any]) -> dict[str, Any]:
        """A saved schedule's state with rates for the groups that the live one has."""
        if len(live["base_lrs"]) == len(saved["base_lrs"]):
            return saved
        return saved | {
            name: [rate for rate, members in zip(saved[name], self._groups, strict=True) if members] for name in _RATES
        }

    def _moments(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        if self._trainer.is_deepspeed_enabled:
            get = _deepspeed().safe_get_full_optimizer_state
            found = {name: get(parameter, name).cpu() for name in _MOMENTS}
            return {"step": self._deepspeed_step(), **found}
        state = self._trainer.optimizer.state[parameter]
        return {"step": state["step"].cpu(), **{name: _whole(state[name]).cpu() for name in _MOMENTS}}

    def _deepspeed_step(self) -> Tensor:
        state = self._trainer.optimizer.optimizer.state
        found = next(iter(state.values()))["step"]
        return torch.tensor(float(found))  # each parameter's own: one that all share counts once per parameter

    def _load_moments(self, state: dict[int, dict[str, Tensor]]) -> None:
        from torch.distributed.tensor import distribute_tensor

        parameters, optimizer = dict(_parameters(self._trainer.model)), self._trainer.optimizer
        names = [name for group in self._groups for name in group]
        if self._trainer.is_deepspeed_enabled:
            _begin_moments(optimizer.optimizer, state[0]["step"])
        for index, name in enumerate(names):
            parameter, saved = parameters[name], state[index]
            if self._trainer.is_deepspeed_enabled:
                for moment in _MOMENTS:
                    _deepspeed().safe_set_full_optimizer_state(parameter, saved[moment], moment)
            else:
                mesh, placements = parameter.device_mesh, parameter.placements
                optimizer.state[parameter] = {
                    "step": _beside(saved["step"], parameter, optimizer),
                    **{
                        moment: distribute_tensor(saved[moment].to(parameter.device), mesh, placements)
                        for moment in _MOMENTS
                    },
                }


def _begin_moments(zero: Any, step: Tensor) -> None:
    """Give ZeRO's flat shards their moments, which are made in the first step else, and the step's number."""
    shards = getattr(zero, "fp32_partitioned_groups_flat", None) or zero.single_partition_of_fp32_groups
    state = zero.optimizer.state
    for shard in shards:
        begun = {moment: torch.zeros_like(shard) for moment in _MOMENTS}
        state[shard] = begun | dict(state.get(shard, {})) | {"step": _beside(step, shard, zero.optimizer)}
    _link_moments(zero)


def _link_moments(zero: Any) -> None:
    """Have ZeRO-2 find each parameter's moments: it looks once, when the first of its groups has made a step."""
    if hasattr(zero, "_lazy_init_hp_params_optimizer_state"):
        zero._hp_optimizer_states_linked = False
        zero._lazy_init_hp_params_optimizer_state()


def _beside(step: Tensor, weight: Tensor, optimizer: Any) -> Tensor:
    """AdamW's count of steps where the optimizer keeps it: a fused one's lies beside the weight."""
    fused = any(group.get("fused") for group in optimizer.param_groups)
    return step.clone().to(weight.device if fused else "cpu")


def _without_parameters(group: dict[str, Any]) -> dict[str, Any]:
    """A group's settings, but not how its steps are computed, which is a strategy's own."""
    return {name: value for name, value in group.items() if name not in ("params", "foreach", "fused")}


def _load_weights(model: Any, checkpoint: Path) -> None:
    """Put a checkpoint's weights into a model that is not sharded yet."""
    from peft import PeftModel, set_peft_model_state_dict

    if isinstance(model, PeftModel):
        set_peft_model_state_dict(model, load_file(checkpoint / ADAPTER_FILE))
    elif hollow := hollow_base_of(model):
        hollow.begin_from(checkpoint / MODEL_FILE)
    else:
        model.load_state_dict(load_file(checkpoint / MODEL_FILE), strict=False)
        model.tie_weights()
