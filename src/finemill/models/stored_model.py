"""A model folder opened without its weights: transformers' modules, and each weight read when it is asked for."""

import json
import math
import operator
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import safe_open

from finemill.errors import UserError
from finemill.models.weights import DTYPES, NUM_EXPERTS, StoredTensor, holds_another_head, stored_tensors

Rounding = Callable[[str, torch.Tensor], torch.Tensor]
_EXPERT = re.compile(r"\.experts\.(\d+)\.")


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

    Args:
        rounding: what is made of the values of a parameter, by its name, as they are read; stacks of experts stay.
    """

    def __init__(self, folder: Path, rounding: Rounding | None = None) -> None:
        self.folder = folder
        self._rounding = rounding or _as_it_is
        self.tensors: Mapping[str, StoredTensor] = stored_tensors(folder)
        self.model = _hollow_model(folder, self.tensors)
        # By identity, which only holds while nothing else takes a parameter's address.
        self._parameters = dict(self.model.named_parameters())
        self._names = {id(parameter): name for name, parameter in self._parameters.items()}
        self._shapes = {name: tuple(values.shape) for name, values in self.model.state_dict().items()}
        paths = {id(module): path for path, module in self.model.named_modules()}
        embedding, output = self.model.get_input_embeddings(), self.model.get_output_embeddings()
        self.embedding_name = f"{paths[id(embedding)]}.weight"
        self.output_name = f"{paths[id(output)]}.weight"
        self.is_tied = output.weight is embedding.weight
        self._check()
        self._load_buffers()

    def set_num_tokens(self, num_tokens: int) -> None:
        """Give the embedding and the output matrix that many rows: new ones are the mean of those in the files."""
        tables = (self.model.get_input_embeddings(), self.model.get_output_embeddings())
        for name in dict.fromkeys(name for table in tables if (name := self._names.get(id(table.weight)))):
            old = self._parameters[name]
            if num_tokens != len(old):
                resized = self._parameters[name] = _hollow((num_tokens, *old.shape[1:]))
                del self._names[id(old)]
                self._names[id(resized)] = name
                for table in tables:
                    table.weight = resized if table.weight is old else table.weight
        for name, table in zip((self.embedding_name, self.output_name), tables, strict=True):
            self._shapes[name] = tuple(table.weight.shape)
            # What adapters ask for their own sizes.
            setattr(table, "num_embeddings" if hasattr(table, "num_embeddings") else "out_features", num_tokens)
        self.model.config.get_text_config().vocab_size = self.num_tokens

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
    def is_rounded(self) -> bool:
        """Whether parameters are read as something else than the files hold."""
        return self._rounding is not _as_it_is

    @property
    def num_elements(self) -> int:
        """Values in all stored tensors, and in the output matrix where it is the embedding."""
        return sum(tensor.num_elements for tensor in self.tensors.values()) + (
            math.prod(self.shape_of(self.embedding_name)) if self.is_tied else 0
        )

    @property
    def num_experts(self) -> int:
        """Experts of a layer; 0 in a dense model."""
        return _num_experts(self.tensors)

    @cached_property
    def dtype(self) -> torch.dtype:
        """The type that most of the floating-point values have."""
        counts = Counter[str]()
        for tensor in self.tensors.values():
            counts[tensor.dtype] += tensor.num_elements if tensor.is_float else 0
        return DTYPES[counts.most_common(1)[0][0]]

    @property
    def num_tokens(self) -> int:
        """Rows of the embedding, as they were set."""
        rows: int = self._shapes[self.embedding_name][0]
        return rows

    def shape_of(self, name: str) -> tuple[int, ...]:
        """The stored shape of a parameter that is one stored tensor."""
        return self.tensors[next(iter(self.group_of[name].keys))].shape

    def name_of(self, parameter: torch.nn.Parameter) -> str | None:
        """The name under which `parameter` is stored; None for one that is not the model's own."""
        return self._names.get(id(parameter))

    def read(self, name: str) -> torch.Tensor:
        """The values of one parameter or buffer, float32."""
        group = self.group_of[name]
        with self._opened(group.keys) as read:
            if group.converter is None:
                return self._resized(name, self._rounding(name, _float32(read(next(iter(group.keys))))))
            return self._converted(name, {key: _float32(read(key)) for key in group.keys})

    def _resized(self, name: str, values: torch.Tensor) -> torch.Tensor:
        """The values with as many rows as there are tokens."""
        if name not in (self.embedding_name, self.output_name):
            return values
        more = self._shapes[name][0] - len(values)
        return torch.cat([values, values.mean(0).expand(more, -1)]) if more > 0 else values[: len(values) + more]

    def parts(self, name: str, *, widen: bool = True) -> Iterator[torch.Tensor]:
        """The values of one parameter: of a stack, expert by expert; any other, all at once.

        Args:
            widen: to float32; else as they are stored, a view of the file where nothing else is made of them.
        """
        group = self.group_of[name]
        if len(self._shapes[name]) != 3:
            as_stored = None if widen else self.read_as_stored(name)
            yield self.read(name) if as_stored is None else as_stored
            return
        experts = _by_expert(group.keys)
        with self._opened(group.keys) as read:
            if group.converter is None:
                yield from map(_float32, read(next(iter(group.keys)))) if widen else read(next(iter(group.keys)))
            elif experts:
                for keys in experts:
                    values = {key: _float32(read(key)) if widen else read(key) for key in keys}
                    yield self._converted(name, values)[0]
            else:
                yield from self.read(name)

    def read_as_stored(self, name: str) -> torch.Tensor | None:
        """One parameter, a view of its file; None where the file holds something else than the parameter's values."""
        return self.read_stored(next(iter(self.group_of[name].keys))) if self.holds_as_is(name) else None

    def holds_as_is(self, name: str) -> bool:
        """Whether one stored tensor is the parameter's values, but for their type."""
        is_one = self.group_of[name].converter is None
        return is_one and not self.is_rounded and self.shape_of(name) == self._shapes[name]

    def _converted(self, name: str, values: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """What transformers' rule makes of stored tensors."""
        from transformers.core_model_loading import dot_natural_key

        group = self.group_of[name]
        converter = deepcopy(group.converter)
        for key in sorted(values, key=dot_natural_key):
            converter.add_tensor(group.names[0], key, group.keys[key], values[key])
        converted = converter.convert(group.names[0], model=self.model, config=self.model.config)[name]
        tensor: torch.Tensor = converted[0] if isinstance(converted, list) else converted
        return tensor

    @cached_property
    def is_stacked(self) -> bool:
        """Whether the files hold a layer's experts as transformers does, in one tensor, and not as the hub does."""
        stacks = (group for group in self.groups if group.names and group.converter is None)
        return any(
            len(self.shape_of(group.names[0])) > 2 and len(self._hub_shapes(group.names)) > 1 for group in stacks
        )

    def layout(self, group: Group) -> Mapping[str, tuple[int, ...]]:
        """Shapes of the tensors of `group` in the hub's layout, the files' own but where experts are stacked.

        Those of an expert lie together.
        """
        return self._layouts[next(iter(group.keys))]

    @cached_property
    def _layouts(self) -> dict[str, dict[str, tuple[int, ...]]]:
        layouts = {}
        for group in self.groups:
            shapes = {key: self.tensors[key].shape for key in group.keys}
            if group.names and (group.converter or self.is_stacked):
                shapes = self._hub_shapes(group.names)
            layouts[next(iter(group.keys))] = {
                key: shapes[key] for expert in _by_expert(shapes) or [[*shapes]] for key in expert
            }
        return layouts

    def is_split(self, group: Group) -> bool:
        """Whether `group` is one stack of experts, of each of which the hub's layout has tensors of its own."""
        return len(group.names) == 1 and len(self._shapes[group.names[0]]) == 3 and bool(_by_expert(self.layout(group)))

    def restore_expert(self, group: Group, number: int, values: torch.Tensor) -> dict[str, torch.Tensor]:
        """The tensors of one expert of `group`, a split stack, in the hub's layout."""
        from transformers.core_model_loading import revert_weight_conversion

        parts = revert_weight_conversion(self.model, {group.names[0]: values[None]})
        return {_EXPERT.sub(f".experts.{number}.", key): part.contiguous() for key, part in parts.items()}

    def _hub_shapes(self, names: Sequence[str]) -> dict[str, tuple[int, ...]]:
        """What transformers would save these parameters and buffers as."""
        from transformers.core_model_loading import revert_weight_conversion

        values = {name: torch.empty(self._shapes[name], device="meta") for name in names}
        return {key: tuple(part.shape) for key, part in revert_weight_conversion(self.model, values).items()}

    def read_stored(self, key: str) -> torch.Tensor:
        """A stored tensor as it is: a view of its file."""
        with self._opened([key]) as read:
            return read(key)

    @contextmanager
    def _opened(self, keys: Iterable[str]) -> Iterator[Callable[[str], torch.Tensor]]:
        """Read stored tensors. The files are closed again, so that their pages do not count as this process's."""
        with ExitStack() as stack:
            paths = {self.tensors[key].path for key in keys}
            files = {path: stack.enter_context(safe_open(path, framework="pt")) for path in paths}
            yield lambda key: files[self.tensors[key].path].get_tensor(key)

    def restore(self, group: Group, values: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The tensors of `group` in the hub's layout, from the values of all its parameters."""
        layout = self.layout(group)
        if group.converter is None and layout.keys() == group.keys.keys():
            return {next(iter(group.keys)): values[group.names[0]]}
        from transformers.core_model_loading import revert_weight_conversion

        restored = revert_weight_conversion(self.model, dict(values))
        assert restored.keys() == layout.keys(), (restored.keys(), group.keys)
        return {key: restored[key].contiguous() for key in layout}

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
            if group.converter is not None:
                self._check_parts(group)

    def _check_parts(self, group: Group) -> None:
        """Raises: UserError: not the tensors that a stack of experts consists of."""
        wanted = self._hub_shapes(group.names)
        if missing := [key for key in wanted if key not in group.keys]:
            raise UserError(
                f"{self.folder} lacks {len(missing)} of the {len(wanted)} experts' tensors of {group.names[0]}, "
                f"{missing[0]} for one: download or copy the model again"
            )
        for key, shape in wanted.items():
            if self.tensors[key].shape != shape:
                raise UserError(
                    f"{self.tensors[key].path}: {key} has shape {list(self.tensors[key].shape)}, config.json means "
                    f"{list(shape)}: the two are not of one model"
                )

    def _load_buffers(self) -> None:
        """Buffers that the files hold are few and small."""
        stored = self.model.state_dict().keys() & self.group_of.keys()
        for name, buffer in self.model.named_buffers():
            if name in stored:
                buffer.copy_(self.read_stored(next(iter(self.group_of[name].keys))))


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

    _check_counts(folder, tensors)
    config = read_model_config(folder)
    try:
        with init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)
    except (RuntimeError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError, AssertionError) as error:
        line = " ".join(str(error).split())
        raise UserError(f"{folder / 'config.json'} is not a causal language model: {line:.300}") from None
    model.tie_weights()
    embedding, output = model.get_input_embeddings(), model.get_output_embeddings()
    if output.weight is embedding.weight and holds_another_head(tensors):
        output.weight = torch.nn.Parameter(torch.empty_like(embedding.weight), requires_grad=False)
        for part in (model.config, model.config.get_text_config()):
            part.tie_word_embeddings = False
    hollow: dict[int, torch.nn.Parameter] = {}
    for module in model.modules():
        # A row is looked up among those that were loaded, where the padding token need not be.
        if isinstance(module, torch.nn.Embedding):
            module.padding_idx = None
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = hollow.setdefault(id(parameter), _hollow(tuple(parameter.shape)))
    return model.eval()


def _hollow(shape: tuple[int, ...]) -> torch.nn.Parameter:
    """A single number seen in a parameter's shape."""
    return torch.nn.Parameter(torch.zeros(1).expand(shape), requires_grad=False)


def _check_counts(folder: Path, tensors: Mapping[str, StoredTensor]) -> None:
    """A wrong number would build a model for hours.

    Raises: UserError: the files hold fewer layers, or another number of experts, than config.json.
    """
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        config = config.get("text_config") or config
        layers = config.get("num_hidden_layers")
        experts = next((config[key] for key in NUM_EXPERTS if key in config), None)
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise UserError(
            f"{folder / 'config.json'} cannot be read ({error}): download or copy the model again"
        ) from None
    for what, wanted, found, wrong in (
        ("layers", layers, _num_layers(list(tensors)), operator.gt),
        ("experts", experts, _num_experts(tensors), operator.ne),
    ):
        if isinstance(wanted, int) and found and wrong(wanted, found):
            raise UserError(
                f"{folder / 'config.json'} says {wanted} {what}, the weights beside it have {found}: download or copy "
                "the model again"
            )


def _num_layers(keys: Sequence[str]) -> int:
    """One more than the highest number that comes first in a tensor's name."""
    first = (next((int(part) for part in key.split(".") if part.isdecimal()), -1) for key in keys)
    return max(first, default=-1) + 1


def _by_expert(keys: Iterable[str]) -> list[list[str]]:
    """The tensors of each expert, in the order of their numbers; empty if one is no expert's."""
    found: dict[int, list[str]] = {}
    for key in keys:
        number = _EXPERT.search(key)
        if not number:
            return []
        found.setdefault(int(number[1]), []).append(key)
    return [found[number] for number in sorted(found)]


def _as_it_is(_name: str, values: torch.Tensor) -> torch.Tensor:
    return values


def _float32(values: torch.Tensor) -> torch.Tensor:
    """A copy: what is read from a file is a view of it."""
    return values.to(torch.float32, copy=True)


def _num_experts(tensors: Mapping[str, StoredTensor]) -> int:
    """Experts of a layer, a tensor for each or one for all; 0 in a dense model."""
    numbers = (_EXPERT.search(key) for key in tensors)
    stacks = (tensor.shape[0] for key, tensor in tensors.items() if key.endswith(".experts.down_proj"))
    return max((*(int(number[1]) + 1 for number in numbers if number), *stacks), default=0)
