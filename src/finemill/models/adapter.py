"""A LoRA adapter on its base: read without running code, put on the model it was trained on, every tensor in place."""

import json
import re
import warnings
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt

from finemill.artifacts.adapter import read_training
from finemill.artifacts.ports import BASE_MODEL
from finemill.config import parse_config
from finemill.errors import StepError, UserError
from finemill.models.base.resolve import ResolvedBase, base_digest, hub_name, is_commit
from finemill.models.rope import scale_model
from finemill.models.token_rows import begin_token_rows
from finemill.models.weights import read_header

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
_PREFIX = "base_model.model."
# Where PEFT saves a whole embedding or output matrix: as it is, trained as a whole, or below an adapter.
_WHOLE_TABLES = ("weight", "modules_to_save.weight", "base_layer.weight", "token_adapter.base_layer.weight")
_FLOATS = ("F64", "F32", "F16", "BF16")
# Their factors are differences from a base that PEFT changes first: added to the base itself they are noise.
_BASE_CHANGING_INITS = ("pissa", "olora", "corda", "lora_ga", "loftq")
# Of what is refused anyway, of what cannot be merged in place, as nobody does, and of patterns that PEFT itself makes.
_PEFT_WARNINGS = (
    "Found missing adapter keys", "Model has `tie_word_embeddings", "`lora_bias=True`",
    r"The following (rank|alpha)_pattern keys", "target_parameters=.* were set but no parameter",
    ".*gradient_checkpointing",  # an attribute that transformers 5.18 renamed, and PEFT 0.21 reads
)  # fmt: skip


class AdapterConfig(BaseModel):
    """The fields of PEFT's `adapter_config.json` that are checked here; PEFT reads the others."""

    model_config = ConfigDict(extra="allow", frozen=True)

    peft_type: str
    r: int = Field(default=8, gt=0, strict=True)
    lora_alpha: float = Field(default=8, strict=True, allow_inf_nan=False)
    lora_dropout: float = Field(default=0, strict=True)
    target_modules: list[str] | str | None = None
    rank_pattern: dict[str, Annotated[int, Field(gt=0, strict=True)]] = {}
    alpha_pattern: dict[str, Annotated[float, Field(strict=True, allow_inf_nan=False)]] = {}
    modules_to_save: list[str] | None = None
    init_lora_weights: bool | str | None = True
    trainable_token_indices: list[NonNegativeInt] | dict[str, list[NonNegativeInt]] | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None


def read_adapter_config(folder: Path) -> AdapterConfig:
    """Raises: UserError: no adapter, not JSON, not LoRA, or LoRA whose weights do not belong on the base itself."""
    path = folder / CONFIG_NAME
    if not path.is_file():
        inside = sorted(found.parent.name for found in folder.glob(f"*/{CONFIG_NAME}"))
        hint = f", but in {', '.join(inside)} inside it: pass one of those" if inside else ""
        raise UserError(
            f"{CONFIG_NAME} not found in {folder}{hint or ': pass the adapter that train-qlora or train-dpo printed'}"
        )
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}): train the adapter again or copy it again") from None
    config = parse_config(AdapterConfig, values, str(path))
    if config.peft_type != "LORA":
        raise UserError(f"{path}: peft_type '{config.peft_type}' is not supported; supported is LORA")
    init = str(config.init_lora_weights).lower()
    if init.startswith(_BASE_CHANGING_INITS):
        raise UserError(
            f"{path}: init_lora_weights '{config.init_lora_weights}' changes the base before training, and the base "
            "itself is given here: convert the adapter with PEFT's path_initial_model_for_weight_conversion"
        )
    return config


def check_adapter_weights(folder: Path) -> None:
    """Raises: UserError: no safetensors file, a damaged one, or weights that are no finite floating-point numbers."""
    from safetensors import safe_open

    path = folder / WEIGHTS_NAME
    if not path.is_file():
        pickles = [name for name in ("adapter_model.bin", "adapter_model.pt") if (folder / name).is_file()]
        shards = sorted(found.name for found in folder.glob("adapter_model-*.safetensors"))
        found = f"only {pickles[0]}, a pickle, which can run code when loaded" if pickles else "none"
        found = f"{shards[0]} and {len(shards) - 1} more, which PEFT does not read either" if shards else found
        raise UserError(f"{folder} needs {WEIGHTS_NAME}, found {found}: save the adapter as one safetensors file")
    header = read_header(path)
    if not header:
        raise UserError(f"{path} holds no tensor: the adapter was saved without its weights")
    for name, tensor in header.items():
        if tensor.dtype not in _FLOATS or 0 in tensor.shape:
            raise UserError(
                f"{path}: tensor {name} has type {tensor.dtype} and shape {list(tensor.shape)}; an adapter's weights "
                f"are {', '.join(_FLOATS)} and not empty"
            )
    with safe_open(path, framework="pt") as file:
        for name in header:
            if not torch.isfinite(file.get_tensor(name)).all():
                raise UserError(f"{path}: tensor {name} holds NaN or infinity: the training that wrote it diverged")


def token_rows(config: AdapterConfig) -> int:
    """How many rows the embedding must have for the tokens that the adapter trained by themselves; 0 for none."""
    indices = config.trainable_token_indices or ()
    ids = chain(*indices.values()) if isinstance(indices, dict) else indices
    return max(ids, default=-1) + 1


def more_than_lora(config: AdapterConfig) -> str | None:
    """The setting with which an adapter has more than servers of LoRA adapters add to a base; None for none."""
    settings = ("modules_to_save", "trainable_token_indices", "use_dora", "lora_bias")
    if getattr(config, "bias", "none") not in (None, "none"):
        return "bias"
    return next((name for name in settings if getattr(config, name, None)), None)


def load_adapter(base: Any, folder: Path, *, assign: bool = False) -> Any:
    """`base` with the LoRA adapter in `folder`, as one PEFT model in evaluation mode, with the positions it trained on.

    Args:
        assign: put the adapter's tensors in the place of parameters instead of copying them there, as a base whose
            parameters have no memory of their own needs it (`StoredModel`).
    Raises: UserError: the adapter is missing, damaged or a pickle, or one of its tensors has no place in the base.
    """
    from peft import PeftConfig, PeftModelForCausalLM

    read_adapter_config(folder)
    check_adapter_weights(folder)
    _check_kind(folder, base)
    _refuse_base_weights(folder, base)
    training = read_training(folder)
    if training and training.rope_parameters:
        scale_model(base, training.rope_parameters)
    try:
        with warnings.catch_warnings():
            for message in _PEFT_WARNINGS:
                warnings.filterwarnings("ignore", message=message)
            config = PeftConfig.from_pretrained(folder)
            config.inference_mode = True
            _resize_embeddings(base, num_tokens_with(folder, base), assign=assign)
            tuned = PeftModelForCausalLM(base, config, low_cpu_mem_usage=assign)
            result = tuned.load_adapter(folder, "default", low_cpu_mem_usage=assign, torch_device="cpu")
    # A pattern that is none, and programs that PEFT would want for some settings.
    except (RuntimeError, ValueError, TypeError, LookupError, AttributeError, re.error, ImportError) as error:
        line = " ".join(str(error).split())
        raise UserError(f"the adapter in {folder} does not fit the base model: {line:.300}") from error
    _check_keys(folder, tuned, result.missing_keys, _without_copies(folder, tuned, result.unexpected_keys))
    if assign and base.config.get_text_config().tie_word_embeddings:
        _tie_again(base)
    return tuned.eval()


def _check_kind(folder: Path, base: Any) -> None:
    """Raises: UserError: an adapter of a dense model on a mixture of experts, or the reverse."""
    tensors = (*base.named_parameters(), *base.named_buffers())
    places = {name for name, _ in base.named_modules()} | {name for name, _ in tensors}
    names = (name.removeprefix(_PREFIX).partition(".lora_")[0] for name in read_header(folder / WEIGHTS_NAME))
    strangers = [name for name in names if ".mlp." in name and name.removesuffix(".weight") not in places]
    model, of_mixture = type(base).__name__, any(name.endswith(".experts") for name in places)
    of_experts = [name for name in strangers if "expert" in name]
    if of_experts and not of_mixture:
        raise UserError(
            f"the adapter in {folder} changes experts ({of_experts[0]}), and the base ({model}) is a dense model: pass "
            "the base that it was trained on"
        )
    if of_mixture and len(of_experts) < len(strangers):
        dense = next(name for name in strangers if "expert" not in name)
        raise UserError(
            f"the adapter in {folder} is of a dense model ({dense}), and the base ({model}) is a mixture of experts: "
            "pass the base that it was trained on"
        )


def _refuse_base_weights(folder: Path, base: Any) -> None:
    """Raises: UserError: the file holds weights of the base itself, in whose place PEFT would put them.

    Tables that grew are meant to be there.
    """
    paths = {id(module): path for path, module in base.named_modules()}
    ends = tuple(f"{_PREFIX}{paths[id(end)]}." for end in (base.get_input_embeddings(), base.get_output_embeddings()))
    for name in read_header(folder / WEIGHTS_NAME):
        if name.endswith(".base_layer.weight") and not name.startswith(ends):
            raise UserError(
                f"{folder / WEIGHTS_NAME} holds {name}, a weight of the base itself: save the adapter's own tensors "
                "alone (save_pretrained of the PEFT model)"
            )


def saved_rows(folder: Path, embedding: str) -> int:
    """Rows of the parameter `embedding` in the file of the adapter in `folder`, 0 where it does not hold it whole."""
    header = read_header(folder / WEIGHTS_NAME)
    names = (f"{_PREFIX}{embedding.removesuffix('.weight')}.{name}" for name in _WHOLE_TABLES)
    return next((header[name].shape[0] for name in names if name in header), 0)


def num_tokens_with(folder: Path, base: Any) -> int:
    """Rows of the embedding of `base` with the adapter in `folder`.

    Its own, as many as the adapter's file holds of it, or more for tokens that were trained by themselves.
    Raises: UserError: the adapter has an embedding of another size than its output matrix.
    """
    shapes = {
        name.removeprefix(_PREFIX): tensor.shape[0] for name, tensor in read_header(folder / WEIGHTS_NAME).items()
    }
    embedding, output = base.get_input_embeddings(), base.get_output_embeddings()
    paths = {id(module): path for path, module in base.named_modules()}
    rows = {}
    for module in (embedding, output):
        path = paths[id(module)]
        own = [shapes[f"{path}.{name}"] for name in _WHOLE_TABLES if f"{path}.{name}" in shapes]
        if own or output.weight is not embedding.weight:
            rows[f"{path}.weight"] = own[0] if own else len(module.weight)
    if len(set(rows.values())) > 1:
        (first, num_first), (second, num_second) = rows.items()
        raise UserError(
            f"the adapter in {folder} needs {num_first} rows of {first} and {num_second} of {second}: save both with "
            "the adapter (modules_to_save, or save_embedding_layers of PEFT's save_pretrained)"
        )
    num_tokens = next(iter(rows.values()), len(embedding.weight))
    return max(num_tokens, token_rows(read_adapter_config(folder)))


def _resize_embeddings(base: Any, num_tokens: int, *, assign: bool) -> None:
    own = len(base.get_input_embeddings().weight)
    if num_tokens > own and not assign:
        begin_token_rows(base, range(own, num_tokens))
    elif num_tokens != own:
        base.resize_token_embeddings(num_tokens, mean_resizing=False)


def _tie_again(base: Any) -> None:
    """Let a tied matrix that the adapter brought at one end, or alike at both, be that of both again."""
    ends = base.get_input_embeddings(), base.get_output_embeddings()
    (embedding, from_embedding), (output, from_output) = ((end, _own_weight(end)) for end in ends)
    is_plain = type(output) is torch.nn.Linear
    if is_plain and (
        _is_hollow(output.weight) or (from_embedding is not None and _equal(from_embedding, output.weight))
    ):
        if from_embedding is not None:
            output.weight = from_embedding
    elif type(embedding) is torch.nn.Embedding and _is_hollow(embedding.weight) and from_output is not None:
        embedding.weight = from_output


def _own_weight(end: Any) -> Any:
    """The matrix that an end has without an adapter's products; None where it is trained as a whole."""
    from peft.utils.other import ModulesToSaveWrapper

    return None if isinstance(end, ModulesToSaveWrapper) else getattr(end, "base_layer", end).weight


def _is_hollow(weight: torch.Tensor) -> bool:
    return not any(weight.stride())


def _equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    return not _is_hollow(one) and not _is_hollow(other) and torch.equal(one, other)


def _without_copies(folder: Path, tuned: Any, names: Sequence[str]) -> list[str]:
    """Those that are no second copy: PEFT saves a table that was resized under two names, and what is tied twice."""
    held, base = read_header(folder / WEIGHTS_NAME).keys(), tuned.get_base_model()
    paths = {id(module): path for path, module in base.named_modules()}
    embedding, output = (paths[id(end)] for end in (base.get_input_embeddings(), base.get_output_embeddings()))
    is_tied = base.config.get_text_config().tie_word_embeddings

    def is_copy(name: str) -> bool:
        first = name.replace(".modules_to_save.weight", ".weight")
        if is_tied and ".token_adapter." in name:
            first = first.replace(f"{_PREFIX}{output}.", f"{_PREFIX}{embedding}.")
        return first != name and first in held

    return [name for name in names if not is_copy(name)]


def _check_keys(folder: Path, tuned: Any, missing: Sequence[str], unexpected: Sequence[str]) -> None:
    """Raises: UserError: a tensor of the adapter went nowhere, or a place for one stayed empty."""
    if not missing and not unexpected:
        return
    total = len(read_header(folder / WEIGHTS_NAME))
    model = type(tuned.get_base_model()).__name__
    examples = [
        f"{keys[0].replace('.default', '')} is {problem}"
        for keys, problem in ((unexpected, "not in the base"), (missing, "not in the adapter"))
        if keys
    ]
    raise UserError(
        f"{total - len(unexpected)} of {total} tensors of the adapter in {folder} fit the base model ({model}): "
        f"{'; '.join(examples)}; was it trained on another architecture?"
    )


def check_base(folder: Path, parents: Mapping[str, str], given: ResolvedBase) -> str:
    """How `given` is known to be the base that the adapter in `folder` was trained on.

    Args:
        parents: of the adapter's manifest; empty where it has none.
    Raises: UserError: it is another base, or there is no telling.
    """
    config = read_adapter_config(folder)
    training = read_training(folder)
    if training and training.base_digest == given.digest:
        return "same digest"
    if training and training.unquantized_base_digest == given.digest:
        return "same digest as the model that the 4-bit base was made from"
    named = [name for name in (parents.get(BASE_MODEL), _spelled(config)) if name]
    for name in named:
        same, how = _is_same(name, given)
        # What a folder held when the adapter was trained is known better than what lies there today.
        if training and training.base_digest and how in ("same reference", "same digest"):
            same, how = False, "another digest"
        if same:
            return how
        if same is False:
            raise UserError(
                f"the adapter was trained on {name}, the base model given is {given.id} ({how}): pass the one it was "
                "trained on"
            )
    raise UserError(
        f"the adapter names {named[0] if named else 'no base model'}, which is not found here: nothing shows that it "
        f"was trained on {given.id}; pass the base model by the name that the adapter has"
    )


def _spelled(config: AdapterConfig) -> str | None:
    name, revision = config.base_model_name_or_path, config.revision
    return f"{name}@{revision}" if name and revision else name


def _is_same(name: str, given: ResolvedBase) -> tuple[bool | None, str]:
    """Whether `name` means the base `given`, and how that is known; None if it cannot be known on this machine."""
    if name == given.id:
        return True, "same reference"
    named, own = hub_name(name), hub_name(given.id)
    if named and own and not Path(name).is_dir():
        if named[0] != own[0]:
            return False, "another repository"
        if is_commit(named[1]) and is_commit(own[1]):
            return named[1] == own[1], "same commit" if named[1] == own[1] else "another commit"
        return True, "same repository; the adapter names no commit"
    try:
        digest = base_digest(name) if not named or Path(name).is_dir() else None
    except StepError:
        digest = None
    if digest is None:
        return None, "not found"
    return digest == given.digest, "same digest" if digest == given.digest else "another digest"
