"""The merged model's tensors, one after the other: base plus adapter in float32, rounded once."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from types import SimpleNamespace
from typing import Any

import torch

from finemill.errors import StepError, UserError
from finemill.models.stored_model import Group, StoredModel

# What fits a core's cache.
_VALUES_AT_ONCE = 1 << 19


@dataclass(frozen=True)
class Part:
    """A whole tensor, or one expert, before rounding; its rows are computed when they are asked for.

    `base` is as the base holds it. `delta` gives what is added to some of its rows; `whole` stands in its place;
    without either it stays.
    """

    base: torch.Tensor
    delta: Callable[[slice], torch.Tensor] | None = None
    whole: torch.Tensor | None = None

    @property
    def is_base(self) -> bool:
        """Whether nothing is to be changed."""
        return self.delta is None and self.whole is None

    @property
    def shape(self) -> torch.Size:
        """Of all rows."""
        return (self.base if self.whole is None else self.whole).shape

    def rows(self, which: slice) -> torch.Tensor:
        """Some of them, float32."""
        return self.changed_rows(which)[0]

    def changed_rows(self, which: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """Some of them, float32, and how they differ from the base: of new tokens' rows, not at all."""
        if self.whole is not None:
            rows = self.whole[which].float()
            is_new = self.base.shape != self.whole.shape
            return rows, torch.zeros_like(rows) if is_new else rows - self.base[which].float()
        rows = self.base[which].float()
        if self.delta is None:
            return rows, torch.zeros_like(rows)
        change = self.delta(which)
        return rows + change, change


def slices(shape: Sequence[int]) -> Iterator[slice]:
    """All rows of a tensor, a few at a time."""
    step = max(1, _VALUES_AT_ONCE // max(1, math.prod(shape[1:])))
    return (slice(first, first + step) for first in range(0, shape[0], step))


class MergedModel:
    """What is written for `stored` with the adapter of `tuned`, a PEFT model on `stored.model`.

    What is more than plain LoRA, PEFT merges in place, module by module, once: `pieces` are the last that is done with
    `tuned`. Different jobs can be done by different threads.

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
        self._merged: dict[str, Mapping[str, torch.Tensor]] = {}
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

    def jobs(self) -> list[tuple[Group, ...]]:
        """Everything to be written; what one module of the adapter decides lies together.

        So do the embedding and the output matrix, which come first: they are the largest.

        Raises: StepError: a part of the adapter has no place.
        """
        groups = list(self._groups())
        if self.unties_embeddings:
            groups.append(Group({self._stored.output_name: ""}, (self._stored.output_name,)))
        placed = {name for group in groups for name in group.names}
        if self._stored.is_tied:
            placed.add(self._stored.output_name)
        if left := self.changed - placed:
            raise StepError(f"merge: {len(left)} tensors that the adapter changes have no place, {min(left)} for one")
        ends = {self._stored.embedding_name, self._stored.output_name}
        jobs: dict[str, list[Group]] = {"": []}
        for group in groups:
            path = next((self._path_of[name] for name in group.names if name in self._path_of), next(iter(group.keys)))
            jobs.setdefault(path if ends.isdisjoint(group.names) else "", []).append(group)
        return [tuple(job) for job in jobs.values()]

    def _groups(self) -> Iterator[Group]:
        """All but a stored copy of the output matrix that is written anew."""
        for group in self._stored.groups:
            if not (self.unties_embeddings and self._stored.output_name in group.names):
                yield group

    def _type_of(self, group: Group, key: str) -> torch.dtype:
        """What the model has no use for, and what is no floating-point number, stays as it is."""
        keys = self._source(group).keys
        own = self._stored.tensors[key if key in keys else next(iter(keys))].torch_dtype
        return (self._dtype or own) if group.names and own.is_floating_point else own

    def _source(self, group: Group) -> Group:
        """Itself, or the embedding's for an output matrix that becomes one of its own."""
        is_new = self.unties_embeddings and self._stored.output_name in group.names
        return self._stored.group_of[self._stored.embedding_name] if is_new else group

    def takes_rows(self, group: Group) -> bool:
        """Whether `pieces` of it are some rows, or one expert, and no more of it is in memory."""
        return self._is_copied(group) or self._is_plain(group) or self._is_split(group)

    def _is_copied(self, group: Group) -> bool:
        is_untouched = self.changed.isdisjoint(group.names) and not (group.names and self._stored.is_rounded)
        is_stored = all(key in self._stored.tensors for key in group.keys)
        return is_untouched and is_stored and self._stored.layout(group).keys() == group.keys.keys()

    def _is_plain(self, group: Group) -> bool:
        """Whether it is one matrix, stored as it is, with plain LoRA."""
        names = [name for name in group.names if name in self._stored.group_of]
        return (
            len(names) == len(group.keys) == 1
            and len(self._stored.layout(group)) == 1
            and self._own_base(names[0]) is None
            and self._stored.holds_as_is(names[0])
            and self._plain_module(names[0]) is not None
        )

    def _is_split(self, group: Group) -> bool:
        """Whether it is one stack of experts, with LoRA on stacks or none."""
        if not all(key in self._stored.tensors for key in group.keys) or not self._stored.is_split(group):
            return False
        return group.names[0] not in self.changed or self._stack(group.names[0]) is not None

    def pieces(self, group: Group) -> Iterator[tuple[str, int, torch.Tensor]]:
        """(stored name, first row, values) of everything that is written for `group`: PEFT's sum, rounded once."""
        if self._is_copied(group):
            for key in self._stored.layout(group):
                yield from self._rows(key, Part(self._stored.read_stored(key)), self._type_of(group, key))
            return
        key = next(iter(group.keys))
        dtype = self._type_of(group, key)
        if self._is_plain(group):
            base = next(self._stored.parts(group.names[0], widen=False))
            yield from self._rows(key, Part(base, _delta_of_peft(self._plain_module(group.names[0]))), dtype)
            return
        if key in self._stored.tensors and self._stored.is_split(group):
            name = group.names[0]
            for number, part in enumerate(self._merged_parts(name)):
                restored = self._stored.restore_expert(group, number, _round(name, part, dtype))
                yield from ((key, 0, values) for key, values in restored.items())
            return
        values = {name: self._rounded(name, dtype) for name in group.names}
        restored = self._stored.restore(group, values) if key in self._stored.tensors else {key: values[key]}
        yield from ((key, 0, values) for key, values in restored.items())

    def _rows(self, key: str, part: Part, dtype: torch.dtype) -> Iterator[tuple[str, int, torch.Tensor]]:
        if not part.shape:
            yield key, 0, _round(key, part.base, dtype)
            return
        for rows in slices(part.shape):
            yield key, rows.start, _round(key, part.base[rows] if part.is_base else part.rows(rows), dtype)

    def forget(self, group: Group) -> None:
        """Drop what PEFT merged of it. What a whole module's merge decided is gone then."""
        for name in group.names:
            self._merged.pop(self._path_of.get(name, ""), None)

    def _merged_parts(self, name: str) -> Iterator[torch.Tensor]:
        """A stack as it is written, before rounding: expert by expert, with PEFT's own factors where it has some."""
        wrapper = self._stack(name)
        if wrapper is None:
            yield from self._value(name) if name in self.changed else self.base_parts(name)
            return
        b, a, scaling = wrapper.get_delta_factors("default")
        for base, *factors in zip(self.base_parts(name), b, a, strict=True):
            yield torch.addmm(base, *factors, alpha=scaling)

    def _stack(self, name: str) -> Any:
        """PEFT's LoRA on a stack of experts; None where there is none."""
        path = self._path_of.get(name)
        return _wrapped(self._modules[path]).get(name.removeprefix(f"{path}.")) if path else None

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

    def expected_parts(self, name: str) -> Iterator[Part]:
        """Base plus adapter before rounding, in the parts of `base_parts`.

        LoRA is the product of its factors here, not what PEFT merges; what is more than a sum is.
        """
        own = self._own_base(name)
        bases = self._stored.parts(self._name_in_base(name), widen=False) if own is None else iter((own,))
        if name not in self.changed:
            return map(Part, bases)
        deltas = self._deltas(name)
        if deltas is not None:
            return (Part(base, delta) for base, delta in zip(bases, deltas, strict=True))
        value = self._value(name)
        wholes = value if value.dim() == 3 else (value,)
        return (Part(base, whole=whole) for base, whole in zip(bases, wholes, strict=True))

    def _deltas(self, name: str) -> list[Callable[[slice], torch.Tensor]] | None:
        """The change of each part, by the adapter's own factors; None where it is more than their product."""
        stack = self._stack(name)
        if stack is not None and stack.num_experts > 1:
            return _by_expert(stack)
        module = stack or self._plain_module(name)
        is_merged = self._path_of.get(name) in self._merged
        if module is None or is_merged or module.lora_variant or any(module.lora_bias.values()):
            return None
        b, a = (factors["default"].weight for factors in (module.lora_B, module.lora_A))
        return [_delta(b, a, module.scaling["default"])]

    def _plain_module(self, name: str) -> Any:
        """PEFT's LoRA on a linear layer, where that adds a product to the weight `name` and no more; else None."""
        from peft.tuners.lora.layer import Linear

        path = self._path_of.get(name)
        if path is None or path in self._merged or name != f"{path}.weight":
            return None
        module = self._modules[path]
        is_plain = type(module) is Linear and not module.fan_in_fan_out
        return module if is_plain and not module.lora_variant and not any(module.lora_bias.values()) else None

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
        if path not in self._merged:
            self._merged[path] = _merge_module(path, self._modules[path], self._stored)
        return self._merged[path][name.removeprefix(f"{path}.")]


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


def _by_expert(stack: Any) -> list[Callable[[slice], torch.Tensor]]:
    """The change of each expert, from factors as PEFT lays them out: in A one expert's rows after the other's, in B
    each expert's columns as many apart as there are experts.
    """
    a, b = (factors["default"].weight for factors in (stack.lora_A, stack.lora_B))
    count, rank, scaling = stack.num_experts, stack.r["default"], stack.scaling["default"]
    factors = [(b[:, expert::count], a[expert * rank : (expert + 1) * rank]) for expert in range(count)]
    if getattr(_original_module(stack), "is_transposed", False):  # (E, in, out), as gpt-oss has them
        factors = [(a.T, b.T) for b, a in factors]
    return [_delta(b, a, scaling) for b, a in factors]


def _delta(b: torch.Tensor, a: torch.Tensor, scaling: float) -> Callable[[slice], torch.Tensor]:
    scaled = scaling * b
    return lambda rows: scaled[rows] @ a


def _delta_of_peft(module: Any) -> Callable[[slice], torch.Tensor]:
    """PEFT's own sum of products, of an adapter that has only some of the rows."""
    b = module.lora_B["default"].weight

    def of_rows(rows: slice) -> torch.Tensor:
        part = SimpleNamespace(
            lora_A=module.lora_A,
            lora_B={"default": SimpleNamespace(weight=b[rows], device=b.device)},
            scaling=module.scaling,
            fan_in_fan_out=module.fan_in_fan_out,
        )
        found: torch.Tensor = type(module).get_delta_weight(part, "default")
        return found

    return of_rows


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
    # Of eight bits are only tensors that the model has no use for, and torch does not compare those.
    if not dtype.is_floating_point or dtype.itemsize == 1 or not rounded.numel():
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
