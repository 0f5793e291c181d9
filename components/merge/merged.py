"""The merged model's tensors, one after the other: base plus adapter in float32, rounded once."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from finemill.errors import StepError, UserError
from finemill.models.stored_model import Group, StoredModel
from finemill.models.weights import DTYPES


@dataclass(frozen=True)
class ExpectedPart:
    """What a whole tensor, or one expert, should be before rounding; its rows are computed when they are asked for.

    `base` is as the base holds it. With `factors`, B, A and their factor, the product is added to it; `whole` stands in
    its place; without either it stays.
    """

    base: torch.Tensor
    factors: tuple[torch.Tensor, torch.Tensor, float] | None = None
    whole: torch.Tensor | None = None

    @property
    def is_base(self) -> bool:
        """Whether nothing is to be changed."""
        return self.factors is None and self.whole is None

    @property
    def shape(self) -> torch.Size:
        """Of all rows."""
        return (self.base if self.whole is None else self.whole).shape

    def rows(self, which: slice) -> torch.Tensor:
        """Some of them, float32."""
        if self.whole is not None:
            return self.whole[which].float()
        base = self.base[which].float()
        if self.factors is None:
            return base
        b, a, scaling = self.factors
        return torch.addmm(base, b[which], a, alpha=scaling)


class MergedModel:
    """What is written for `stored` with the adapter of `tuned`, a PEFT model on `stored.model`.

    Iterating merges the adapter's modules one by one, in place: once, and last of all that is done with `tuned`.

    Args:
        dtype: of every tensor; None: each keeps the type it has in the base.
    """

    def __init__(self, stored: StoredModel, tuned: Any, dtype: torch.dtype | None) -> None:
        self._stored = stored
        self._dtype = dtype
        self._model = tuned.get_base_model()
        self._modules = _adapted_modules(self._model)
        self._path_of = {
            f"{path}.{name}": path for path, module in self._modules.items() for name in _changed_names(module, stored)
        }
        # Whole tensors that the adapter brings, such as an embedding with new tokens.
        self._replaced = {
            name: parameter
            for name, parameter in self._model.named_parameters()
            if stored.name_of(parameter) is None and not name.startswith(tuple(f"{path}." for path in self._modules))
        }
        # Tables with more tokens that were trained on in the place of the base's own; merging changes the modules' own.
        self._own_bases = {
            f"{path}.weight": weight.detach().float().clone()
            for path, module in self._modules.items()
            if (weight := getattr(_original_module(module), "weight", None)) is not None
            and stored.name_of(weight) is None
        }
        self._last: tuple[str, Mapping[str, torch.Tensor]] = ("", {})
        for parameter in self._model.parameters():
            if stored.name_of(parameter) is None:
                parameter.data = parameter.data.float()
        _check_biases(self._modules)

    @property
    def changed(self) -> set[str]:
        """Names of the parameters that the adapter changes."""
        return self._path_of.keys() | self._replaced.keys()

    @property
    def vocab_size(self) -> int | None:
        """Rows of the embedding, where the adapter brings another number of them than the base has."""
        replaced = self._replaced.get(self._stored.embedding_name)
        rows = self._stored.num_tokens if replaced is None else len(replaced)
        return None if rows == self._stored.shape_of(self._stored.embedding_name)[0] else rows

    @cached_property
    def unties_embeddings(self) -> bool:
        """Whether the output matrix becomes one of its own: the base ties it to the embedding, and the adapter changes
        one without the other.
        """
        ends = {self._stored.embedding_name, self._stored.output_name}
        if not self._stored.is_tied or self.changed.isdisjoint(ends):
            return False
        embedding, output = self._model.get_input_embeddings(), self._model.get_output_embeddings()
        shared = {id(part) for part in embedding.parameters()} & {id(part) for part in output.parameters()}
        if ends & self._path_of.keys():
            # The base's own matrix is in both; the adapter's parameters are where PEFT ties them.
            return shared <= {id(part) for part in _original_module(embedding).parameters()}
        return not shared

    def shapes(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and type of every tensor, by its stored name, in the order in which they come."""
        shapes = {}
        for group in self._groups():
            replaced = self._replaced.get(group.names[0]) if group.names else None
            ends = {self._stored.embedding_name, self._stored.output_name}.intersection(group.names)
            for key, stored in self._stored.layout(group).items():
                shape = tuple(replaced.shape) if replaced is not None else stored
                if replaced is None and ends:
                    shape = self._stored.num_tokens, *stored[1:]
                shapes[key] = (shape, self._type_of(group, key))
        if self.unties_embeddings:
            embedding = shapes[next(iter(self._stored.group_of[self._stored.embedding_name].keys))]
            shapes[self._stored.output_name] = embedding
        return shapes

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(stored name, values) in the order of `shapes`. Raises: StepError: a part of the adapter has no place."""
        written: set[str] = set()
        for group in self._groups():
            yield from self._tensors(group)
            written |= set(group.names)
        if self.unties_embeddings:
            output = self._stored.output_name
            embedding = self._stored.group_of[self._stored.embedding_name]
            yield output, self._rounded(output, self._type_of(embedding, next(iter(embedding.keys))))
        if self._stored.is_tied:
            written.add(self._stored.output_name)
        if left := self.changed - written:
            raise StepError(f"merge: {len(left)} tensors that the adapter changes have no place, {min(left)} for one")

    def _groups(self) -> Iterator[Group]:
        """All but a stored copy of the output matrix that is written anew."""
        for group in self._stored.groups:
            if not (self.unties_embeddings and self._stored.output_name in group.names):
                yield group

    def _type_of(self, group: Group, key: str) -> torch.dtype:
        """What the model has no use for, and what is no floating-point number, stays as it is."""
        own = DTYPES[self._stored.tensors[key if key in group.keys else next(iter(group.keys))].dtype]
        return (self._dtype or own) if group.names and own.is_floating_point else own

    def _tensors(self, group: Group) -> Iterator[tuple[str, torch.Tensor]]:
        is_as_stored = self._stored.layout(group).keys() == group.keys.keys()
        is_untouched = self.changed.isdisjoint(group.names) and not (group.names and self._stored.is_rounded)
        if is_untouched and is_as_stored:
            for key in self._stored.layout(group):
                yield key, _round(key, self._stored.read_stored(key), self._type_of(group, key))
            return
        dtype = self._type_of(group, next(iter(group.keys)))
        if self._stored.is_split(group):
            name = group.names[0]
            for number, part in enumerate(self._merged_parts(name)):
                yield from self._stored.restore_expert(group, number, _round(name, part, dtype)).items()
            return
        values = {name: self._rounded(name, dtype) for name in group.names}
        yield from self._stored.restore(group, values).items()

    def _merged_parts(self, name: str) -> Iterator[torch.Tensor]:
        """A stack as it is written, before rounding: expert by expert, with PEFT's own factors where it has some."""
        path = self._path_of.get(name, "")
        wrapper = _wrapped(self._modules[path]).get(name.removeprefix(f"{path}.")) if path else None
        if wrapper is None:
            yield from self._value(name) if name in self.changed else self.base_parts(name)
            return
        b, a, scaling = wrapper.get_delta_factors("default")
        for base, *factors in zip(self.base_parts(name), b, a, strict=True):
            yield torch.addmm(base, *factors, alpha=scaling)

    def base_parts(self, name: str) -> Iterator[torch.Tensor]:
        """The base's own values, float32: of a stack, expert by expert; any other parameter, all at once."""
        own = self._own_base(name)
        return self._stored.parts(self._name_in_base(name)) if own is None else iter((own,))

    def _own_base(self, name: str) -> torch.Tensor | None:
        found = self._own_bases.get(name)
        return self._own_bases.get(self._name_in_base(name)) if found is None else found

    def _name_in_base(self, name: str) -> str:
        """The embedding, for an output matrix that becomes one of its own."""
        return name if name in self._stored.group_of else self._stored.embedding_name

    def expected_parts(self, name: str) -> Iterator["ExpectedPart"]:
        """Base plus adapter before rounding, in the parts of `base_parts`.

        LoRA is added here, factor by factor; what is more than a sum, as PEFT merges it.
        """
        own = self._own_base(name)
        bases = self._stored.parts(self._name_in_base(name), widen=False) if own is None else iter((own,))
        if name not in self.changed:
            return map(ExpectedPart, bases)
        factors = self._factors(name)
        if factors is not None:
            return (ExpectedPart(base, factors=of_one) for base, of_one in zip(bases, factors, strict=True))
        value = self._value(name)
        wholes = value if value.dim() == 3 else (value,)
        return (ExpectedPart(base, whole=whole) for base, whole in zip(bases, wholes, strict=True))

    def _factors(self, name: str) -> Sequence[tuple[torch.Tensor, torch.Tensor, float]] | None:
        """B, A and the factor of each part; None where the change is more than their product."""
        from peft.tuners.lora.layer import Linear

        path = self._path_of.get(name)
        # A module that PEFT has merged has no factors left.
        if path is None or path == self._last[0]:
            return None
        stack = _wrapped(self._modules[path]).get(name.removeprefix(f"{path}."))
        if stack is not None and stack.num_experts > 1:
            return _by_expert(stack)
        module = stack or self._modules[path]
        is_plain = stack is not None or (type(module) is Linear and name == f"{path}.weight")
        if not is_plain or module.lora_variant or any(module.lora_bias.values()):
            return None
        return [(module.lora_B["default"].weight, module.lora_A["default"].weight, module.scaling["default"])]

    def _rounded(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        """One parameter as it is written."""
        return _round(name, self._value(name) if name in self.changed else self._base_value(name), dtype)

    def _base_value(self, name: str) -> torch.Tensor:
        own = self._own_base(name)
        return self._stored.read(self._name_in_base(name)) if own is None else own

    def _value(self, name: str) -> torch.Tensor:
        """A changed parameter in float32, merged by PEFT."""
        if name in self._replaced:
            whole: torch.Tensor = self._replaced[name].detach()
            return whole.float()
        path = self._path_of[name]
        # A module's bias and weight lie beside each other.
        if self._last[0] != path:
            self._last = path, _merge_module(path, self._modules[path], self._stored)
        return self._last[1][name.removeprefix(f"{path}.")]


def _adapted_modules(model: torch.nn.Module) -> dict[str, Any]:
    """The modules that PEFT put an adapter or a trained copy around, by the name of what they replace."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    found: dict[str, Any] = {}
    for path, module in model.named_modules():
        if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)) and not path.startswith(
            tuple(f"{outer}." for outer in found)
        ):
            found[path] = module
    return found


def _original_module(module: Any) -> torch.nn.Module:
    """What an adapted module replaces; any other itself."""
    if not hasattr(module, "get_base_layer") and not hasattr(module, "original_module"):
        plain: torch.nn.Module = module
        return plain
    original: torch.nn.Module = module.get_base_layer() if hasattr(module, "get_base_layer") else module.original_module
    return original


def _changed_names(module: Any, stored: StoredModel) -> Iterator[str]:
    """Which parameters of an adapted module the adapter changes."""
    from peft.tuners.lora.layer import LoraLayer

    stacks = _wrapped(module)
    for name, parameter in _original_module(module).named_parameters():
        is_own = stored.name_of(parameter) is not None
        if is_own and (stacks and name not in stacks):
            continue
        if is_own and name == "bias" and isinstance(module, LoraLayer) and not any(module.lora_bias.values()):
            continue
        yield name


def _by_expert(stack: Any) -> list[tuple[torch.Tensor, torch.Tensor, float]]:
    """B, A and the factor of each expert, as PEFT lays them out: in A one expert's rows after the other's, in B each
    expert's columns as many apart as there are experts.
    """
    a, b = (factors["default"].weight for factors in (stack.lora_A, stack.lora_B))
    count, rank, scaling = stack.num_experts, stack.r["default"], stack.scaling["default"]
    return [(b[:, expert::count], a[expert * rank : (expert + 1) * rank], scaling) for expert in range(count)]


def _wrapped(module: Any) -> dict[str, Any]:
    """The adapters of single parameters, such as stacks of experts, around a module, by the parameter's name."""
    from peft.tuners.lora.layer import ParamWrapper

    found = {}
    while isinstance(module, ParamWrapper):
        found[module.parameter_name] = module
        module = module.base_layer
    return found


@torch.inference_mode()
def _merge_module(path: str, module: Any, stored: StoredModel) -> dict[str, torch.Tensor]:
    """The parameters of one adapted module, merged in float32 by PEFT.

    Raises: UserError: values that are no numbers, or a kind of adapter that PEFT does not merge.
    """
    for part in module.modules():
        for name, parameter in part._parameters.items():
            stored_name = stored.name_of(parameter) if parameter is not None else None
            if stored_name:
                part._parameters[name] = torch.nn.Parameter(stored.read(stored_name), requires_grad=False)
    try:
        # NaN is looked for where values are rounded.
        if hasattr(module, "unload_and_optionally_merge_module"):
            merged = module.unload_and_optionally_merge_module(merge=True, safe_merge=False, adapter_names=None)
        else:
            module.merge(safe_merge=False)
            merged = module.get_base_layer()
    except NotImplementedError as error:
        raise UserError(f"merge: PEFT cannot merge {path}: {' '.join(str(error).split()):.200}") from None
    values = {name: parameter.detach().float() for name, parameter in merged.named_parameters()}
    for part in module.modules():
        part._parameters = dict.fromkeys(part._parameters)
    return values


def _check_biases(modules: Mapping[str, Any]) -> None:
    """Raises: UserError: the adapter has biases for a layer without one."""
    for path, module in modules.items():
        if any(getattr(module, "lora_bias", {}).values()) and getattr(module.get_base_layer(), "bias", None) is None:
            raise UserError(
                f"merge: the adapter was trained with lora_bias, and {path} has no bias in the base, nor a place for "
                "one in its architecture: train without lora_bias, or serve base and adapter unmerged"
            )


def _round(name: str, values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Raises: UserError: NaN or infinity, or a value that `dtype` cannot hold."""
    rounded = values.to(dtype)
    if not dtype.is_floating_point or not rounded.numel():
        return rounded
    smallest, largest = torch.aminmax(rounded)
    if math.isfinite(smallest) and math.isfinite(largest):
        return rounded
    if torch.isfinite(values).all():
        raise UserError(
            f"merge: {name} has values up to {values.abs().max():.3g}, and {str(dtype).removeprefix('torch.')} ends at "
            f"{torch.finfo(dtype).max:.5g}: write another type (dtype)"
        )
    raise UserError(
        f"merge: {name} holds NaN or infinity: the base is damaged, or an adapter's product overflows; download the "
        "base or train again"
    )
