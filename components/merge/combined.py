"""Several adapters of one base as one: their factors side by side, so that one product is the sum of all."""

# E experts, R rank

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from finemill.artifacts.adapter import read_training
from finemill.artifacts.files import TRAINING_FILE
from finemill.errors import UserError
from finemill.models.adapter import WEIGHTS_NAME, load_adapter
from finemill.models.stored_model import StoredModel

_PREFIX = "base_model.model."
_FACTORS = (("lora_A.weight", "lora_B.weight"), ("lora_embedding_A", "lora_embedding_B"))


@dataclass(frozen=True)
class _Product:
    """A of shape (E, R, in) and B of shape (out, R, E), whose product is the whole change of one module."""

    a: torch.Tensor
    b: torch.Tensor
    names: tuple[str, str]

    @property
    def rank(self) -> int:
        return self.a.shape[1]

    def padded(self, rank: int) -> "_Product":
        """The same change with zeros up to `rank`."""
        missing = rank - self.rank
        a = torch.nn.functional.pad(self.a, (0, 0, 0, missing))
        return _Product(a, torch.nn.functional.pad(self.b, (0, 0, 0, missing)), self.names)


def write_combined(base_model: Path, adapters: Sequence[tuple[Path, float]], folder: Path) -> None:
    """Write one adapter whose change is the sum of the changes of `adapters`, each times its factor, in float32.

    Raises: UserError: an adapter that does not fit the base, is more than LoRA, or was trained on other positions.
    """
    from peft import LoraConfig
    from safetensors.torch import save_file

    _check_positions([path for path, _ in adapters])
    opened = [_open(base_model, path) for path, _ in adapters]
    products = [_products(tuned, *part) for tuned, part in zip(opened, adapters, strict=True)]
    ranks = [max(product.rank for product in of.values()) for of in products]
    tensors: dict[str, torch.Tensor] = {}
    for path in dict.fromkeys(path for of in products for path in of):
        parts = [of[path].padded(rank) if path in of else None for of, rank in zip(products, ranks, strict=True)]
        like = next(part for part in parts if part)
        a = torch.cat([part.a if part else _zeros(like.a, rank) for part, rank in zip(parts, ranks, strict=True)], 1)
        b = torch.cat([part.b if part else _zeros(like.b, rank) for part, rank in zip(parts, ranks, strict=True)], 1)
        tensors[f"{path}.{like.names[0]}"] = a.flatten(0, 1).contiguous()
        tensors[f"{path}.{like.names[1]}"] = b.flatten(1).contiguous()
    save_file(tensors, folder / WEIGHTS_NAME, metadata={"format": "pt"})
    LoraConfig(
        r=sum(ranks),
        lora_alpha=sum(ranks),
        target_modules=sorted({name for tuned in opened for name in _target_modules(tuned)}),
        target_parameters=_target_parameters(opened),
        task_type="CAUSAL_LM",
        base_model_name_or_path=opened[0].peft_config["default"].base_model_name_or_path,
    ).save_pretrained(folder)
    if (adapters[0][0] / TRAINING_FILE).is_file():
        shutil.copyfile(adapters[0][0] / TRAINING_FILE, folder / TRAINING_FILE)


def _open(base_model: Path, adapter: Path) -> Any:
    return load_adapter(StoredModel(base_model).model, adapter, assign=True)


def _products(tuned: Any, adapter: Path, scale: float) -> dict[str, _Product]:
    """What the adapter adds to each module, by PEFT's path of it. Raises: UserError: it does more than add products."""
    from peft import get_peft_model_state_dict
    from peft.tuners.lora import LoraLayer

    state: dict[str, torch.Tensor] = get_peft_model_state_dict(tuned, save_embedding_layers=False)
    found = {}
    for path, module in tuned.named_modules():
        names = next((names for names in _FACTORS if f"{path}.{names[0]}" in state), None)
        if isinstance(module, LoraLayer) and names:
            a, b = (state.pop(f"{path}.{name}").float() for name in names)
            count = getattr(module, "num_experts", 1) or 1
            a, b = a.view(count, -1, a.shape[1]), b.view(len(b), -1, count)
            found[path] = _Product(a, b * (scale * module.scaling["default"]), names)
    variants = [path for path, module in tuned.named_modules() if getattr(module, "lora_variant", None)]
    if state or variants:
        raise UserError(
            f"merge: {min([*state, *variants]).removeprefix(_PREFIX)} of the adapter in {adapter} is no product of two "
            "factors, as whole modules, new tokens, biases and DoRA are not: several adapters are added only where all "
            "are plain LoRA; merge this one by itself"
        )
    return found


def _zeros(like: torch.Tensor, rank: int) -> torch.Tensor:
    return torch.zeros(like.shape[0], rank, *like.shape[2:])


def _target_modules(tuned: Any) -> list[str]:
    """Full names, so that no other module ends in the same letters."""
    from peft.tuners.lora import LoraLayer
    from peft.tuners.lora.layer import ParamWrapper

    return [
        path.removeprefix(_PREFIX)
        for path, module in tuned.named_modules()
        if isinstance(module, LoraLayer) and not isinstance(module, ParamWrapper)
    ]


def _target_parameters(opened: Sequence[Any]) -> list[str] | None:
    """Stacks of experts. Raises: UserError: the adapters have other ones, whose wrappers lie in another order."""
    chosen = {tuple(tuned.peft_config["default"].target_parameters or ()) for tuned in opened} - {()}
    if len(chosen) > 1:
        raise UserError(
            f"merge: the adapters have other target_parameters, {' and '.join(map(str, sorted(chosen)))}: several are "
            "added only where those are the same"
        )
    return list(chosen.pop()) if chosen else None


def _check_positions(adapters: Sequence[Path]) -> None:
    """Raises: UserError: adapters whose trainings scaled the base's positions differently."""
    records = [read_training(adapter) for adapter in adapters]
    first, *others = [record.rope_parameters if record else None for record in records]
    for adapter, found in zip(adapters[1:], others, strict=True):
        if found != first:
            raise UserError(
                f"merge: the adapter in {adapter} was trained with rope_scaling {_shown(found)}, the first one with "
                f"{_shown(first)}: no model has both"
            )


def _shown(parameters: Mapping[str, Any] | None) -> str:
    return f"{parameters['rope_type']} x {parameters['factor']:g}" if parameters else "none"
