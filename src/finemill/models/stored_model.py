"""A model folder opened without its weights: transformers' modules, and each weight read when it is asked for."""

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import safe_open

from finemill.errors import UserError
from finemill.models.weights import DTYPES, StoredTensor, stored_tensors


@dataclass(frozen=True)
class Group:
    """Stored tensors that become parameters together.

    Nearly always one and one of the same name. transformers holds a layer's experts as one parameter, where the files
    have a tensor per expert: then `converter` is its rule, and `keys` come with the rule's pattern that each matches.
    """

    keys: Mapping[str, str]
    names: tuple[str, ...]
    converter: Any = None


class StoredModel:
    """transformers' model of a folder, its parameters without memory, and the folder's tensors.

    `model` is on the CPU in float32, every parameter a single number seen in the parameter's shape: modules can be
    inspected, wrapped and replaced as if the model were loaded, at no cost.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tensors: Mapping[str, StoredTensor] = stored_tensors(folder)
        self.model = _hollow_model(folder, self.tensors)
        # By identity, which only holds while nothing else takes a parameter's address.
        self._parameters = dict(self.model.named_parameters())
        self._names = {id(parameter): name for name, parameter in self._parameters.items()}
        paths = {id(module): path for path, module in self.model.named_modules()}
        embedding, output = self.model.get_input_embeddings(), self.model.get_output_embeddings()
        self.embedding_name = f"{paths[id(embedding)]}.weight"
        self.output_name = f"{paths[id(output)]}.weight"
        self.is_tied = output.weight is embedding.weight
        self._check()
        self._load_buffers()

    @cached_property
    def groups(self) -> tuple[Group, ...]:
        """Every stored tensor in exactly one group, in the order of the files.

        `names` is empty for what the model has no use for.
        """
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

        rules = get_model_conversion_mapping(self.model)
        renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
        converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
        by_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}
        wanted = self.model.state_dict()
        keys: dict[str, dict[str, str]] = {}
        for key in self.tensors:
            name, pattern = rename_source_key(key, renamings, converters, self.model.base_model_prefix, wanted)
            if name not in wanted and key in wanted:
                name, pattern = key, None
            keys.setdefault(name, {})[key] = pattern or ""
        return tuple(
            Group(members, *_targets(name, members, wanted, by_pattern.get(next(iter(members.values())))))
            for name, members in keys.items()
        )

    @cached_property
    def group_of(self) -> dict[str, Group]:
        """The group that each parameter and buffer comes from."""
        return {name: group for group in self.groups for name in group.names}

    @property
    def num_elements(self) -> int:
        """Values in all stored tensors, and in the output matrix where it is the embedding."""
        return sum(tensor.num_elements for tensor in self.tensors.values()) + (
            math.prod(self.shape_of(self.embedding_name)) if self.is_tied else 0
        )

    @cached_property
    def dtype(self) -> torch.dtype:
        """The type that most of the floating-point values have."""
        counts = Counter[str]()
        for tensor in self.tensors.values():
            counts[tensor.dtype] += tensor.num_elements if tensor.is_float else 0
        return DTYPES[counts.most_common(1)[0][0]]

    def shape_of(self, name: str) -> tuple[int, ...]:
        """The stored shape of a parameter that is one stored tensor."""
        return self.tensors[next(iter(self.group_of[name].keys))].shape

    def name_of(self, parameter: torch.nn.Parameter) -> str | None:
        """The name under which `parameter` is stored; None for one that is not the model's own."""
        return self._names.get(id(parameter))

    def read(self, name: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The values of one parameter."""
        group = self.group_of[name]
        if group.converter is None:
            return self.read_stored(next(iter(group.keys))).to(dtype)
        from transformers.core_model_loading import dot_natural_key

        converter = deepcopy(group.converter)
        for key in sorted(group.keys, key=dot_natural_key):
            converter.add_tensor(group.names[0], key, group.keys[key], self.read_stored(key).to(dtype))
        converted = converter.convert(group.names[0], model=self.model, config=self.model.config)[name]
        tensor: torch.Tensor = converted[0] if isinstance(converted, list) else converted
        return tensor

    def read_stored(self, key: str) -> torch.Tensor:
        """A stored tensor as it is. The file is closed again, so that its pages do not count as this process's."""
        with safe_open(self.tensors[key].path, framework="pt") as file:
            tensor: torch.Tensor = file.get_tensor(key)
            return tensor.clone()

    def restore(self, group: Group, values: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The tensors of `group` as they are stored, from the values of all its parameters."""
        if group.converter is None:
            return {next(iter(group.keys)): values[group.names[0]]}
        from transformers.core_model_loading import revert_weight_conversion

        restored = revert_weight_conversion(self.model, dict(values))
        assert restored.keys() == group.keys.keys(), (restored.keys(), group.keys)
        return {key: restored[key].contiguous() for key in group.keys}

    def _check(self) -> None:
        """Raises: UserError: a parameter is not in the files, or has another shape or no floating-point type there."""
        parameters = dict(self.model.named_parameters())
        missing = sorted(set(parameters) - set(self.group_of))
        if missing:
            raise UserError(
                f"{self.folder} lacks {len(missing)} of the {len(parameters)} weights of a "
                f"{type(self.model).__name__}, {missing[0]} for one: download or copy the model again"
            )
        for name, parameter in parameters.items():
            group = self.group_of[name]
            stored = [self.tensors[key] for key in group.keys]
            if not all(tensor.is_float for tensor in stored):
                raise UserError(
                    f"{stored[0].path}: {next(iter(group.keys))} has type {stored[0].dtype}; allowed are "
                    "floating-point types of 16 bits or more: pass the unquantized model"
                )
            if group.converter is None and stored[0].shape != tuple(parameter.shape):
                raise UserError(
                    f"{stored[0].path}: {next(iter(group.keys))} has shape {list(stored[0].shape)}, config.json means "
                    f"{list(parameter.shape)}: the two are not of one model"
                )

    def _load_buffers(self) -> None:
        """Buffers that the files hold are few and small."""
        stored = self.model.state_dict().keys() & self.group_of.keys()
        for name, buffer in self.model.named_buffers():
            if name in stored:
                buffer.copy_(self.read(name, buffer.dtype))


def _targets(
    name: str, members: Mapping[str, str], wanted: Mapping[str, torch.Tensor], converter: Any
) -> tuple[tuple[str, ...], Any]:
    """What a group's stored tensors become, and by which rule."""
    if name not in wanted:
        return (), None
    if converter is None:
        return (name,), None
    prefix, _, suffix = next(
        name.partition(pattern) for pattern in converter.target_patterns if pattern and pattern in name
    )
    return tuple(f"{prefix}{pattern}{suffix}" for pattern in converter.target_patterns), converter


def read_model_config(folder: Path) -> Any:
    """transformers' configuration. Raises: UserError: config.json is damaged or of a model that it does not know."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (StrictDataclassError, OSError, ValueError, TypeError, LookupError, AttributeError) as error:
        line = " ".join(str(error).split())
        raise UserError(f"{folder / 'config.json'} is not a model that transformers can build: {line:.300}") from None


def _hollow_model(folder: Path, tensors: Mapping[str, StoredTensor]) -> Any:
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    _check_num_layers(folder, tensors)
    config = read_model_config(folder)
    try:
        with init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)
    except (RuntimeError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError, AssertionError) as error:
        line = " ".join(str(error).split())
        raise UserError(f"{folder / 'config.json'} is not a causal language model: {line:.300}") from None
    model.tie_weights()
    hollow: dict[int, torch.nn.Parameter] = {}
    for module in model.modules():
        # A row is looked up among those that were loaded, where the padding token need not be.
        if isinstance(module, torch.nn.Embedding):
            module.padding_idx = None
        for name, parameter in module._parameters.items():
            if parameter is not None:
                empty = torch.zeros(1).expand(parameter.shape)
                module._parameters[name] = hollow.setdefault(
                    id(parameter), torch.nn.Parameter(empty, requires_grad=False)
                )
    return model.eval()


def _check_num_layers(folder: Path, tensors: Mapping[str, StoredTensor]) -> None:
    """A wrong number would build a model for hours. Raises: UserError: the files hold fewer layers than config.json."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        wanted = (config.get("text_config") or config).get("num_hidden_layers")
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(
            f"{folder / 'config.json'} cannot be read ({error}): download or copy the model again"
        ) from None
    found = _num_layers(list(tensors))
    if isinstance(wanted, int) and found and wanted > found:
        raise UserError(
            f"{folder / 'config.json'} says {wanted} layers, the weights beside it have {found}: download or copy the "
            "model again"
        )


def _num_layers(keys: Sequence[str]) -> int:
    """One more than the highest number that comes first in a tensor's name."""
    first = (next((int(part) for part in key.split(".") if part.isdecimal()), -1) for key in keys)
    return max(first, default=-1) + 1
