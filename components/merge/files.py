"""The small files beside the merged weights: configuration, generation defaults, tokenizer."""

import json
import logging
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from finemill.artifacts.adapter import has_tokenizer
from finemill.artifacts.records import write_json
from finemill.errors import UserError
from finemill.models.adapter import read_adapter_config, token_rows
from finemill.models.rope import scale_json
from finemill.models.sampling import number_of, read_generation_defaults
from finemill.models.token_rows import tokens_without_row
from finemill.models.weights import is_pointer

logger = logging.getLogger(__name__)

# Whatever of these the adapter's folder has is the tuned model's tokenizer; copied, so that not a byte changes.
_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "vocab.txt", "tokenizer.model", "tekken.json", "chat_template.jinja", "chat_template.json",
)  # fmt: skip
# Where transformers keeps a tokenizer's named templates besides the default one.
_TEMPLATES = "additional_chat_templates"
_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")


def copy_tokenizer(adapter: Path, base_model: Path, output_dir: Path) -> Any:
    """Copy the adapter's tokenizer and chat templates, the base's where the adapter has none, and load the copy.

    Raises: UserError: transformers cannot load it.
    """
    source = adapter if has_tokenizer(adapter) else base_model
    for name in _TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, output_dir / name)
    if (source / _TEMPLATES).is_dir():
        (output_dir / _TEMPLATES).mkdir()
        for path in sorted((source / _TEMPLATES).glob("*.jinja")):
            shutil.copyfile(path, output_dir / _TEMPLATES / path.name)
    return load_tokenizer(output_dir, source)


def load_tokenizer(folder: Path, named: Path) -> Any:
    """The tokenizer in `folder`. Raises: UserError: names `named` as the place where it comes from."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    # The library's own errors are plain `Exception`s.
    except Exception as error:
        if pointer := next(filter(is_pointer, sorted(folder.iterdir())), None):
            raise UserError(f"merge: {named / pointer.name} is Git LFS's note of the file: run git lfs pull") from None
        line = " ".join(str(error).split())
        raise UserError(f"merge: the tokenizer in {named} cannot be loaded: {line:.300}") from error


def check_tokens(tokenizer: Any, num_tokens: int, adapter: Path, known_rows: int) -> None:
    """Raises: UserError: the tokenizer has tokens that the model has no embedding for, or the adapter has a row of its
    own for what is no token.
    """
    trained = token_rows(read_adapter_config(adapter))
    if trained > max(known_rows, len(tokenizer)):
        raise UserError(
            f"merge: the adapter in {adapter} trained token id {trained - 1} (trainable_token_indices), its tokenizer "
            f"has {len(tokenizer)} tokens, base and adapter {known_rows} embeddings: it is of a model with another "
            "vocabulary"
        )
    if unknown := tokens_without_row(tokenizer, num_tokens):
        last = max(unknown)
        raise UserError(
            f"merge: the tokenizer has token id {last}, {unknown[last]!r}, the merged model "
            f"only {num_tokens} embeddings: the adapter in {adapter} was trained with tokens that were not saved with "
            "it; save embedding and output matrix, too (modules_to_save)"
        )


def write_config(
    base_model: Path,
    output_dir: Path,
    dtype: torch.dtype,
    *,
    unties_embeddings: bool,
    vocab_size: int | None,
    rope_parameters: Mapping[str, Any] | None = None,
) -> None:
    """Write the base's config.json with what merging changed.

    Args:
        vocab_size: rows of the embedding, if the adapter brought another number.
        rope_parameters: if the adapter was trained on positions that were scaled.
    """
    config = json.loads((base_model / "config.json").read_text(encoding="utf-8"))
    # An empty one says nothing, and transformers opens no model that has it.
    config.pop("quantization_config", None)
    key = "torch_dtype" if "torch_dtype" in config else "dtype"
    config[key] = str(dtype).removeprefix("torch.")
    # Models with several parts keep the text model's fields one level down.
    for part in (config, config.get("text_config") or {}):
        if unties_embeddings and (part is config or "tie_word_embeddings" in part):
            part["tie_word_embeddings"] = False
        if vocab_size and "vocab_size" in part:
            part["vocab_size"] = vocab_size
        if rope_parameters and "max_position_embeddings" in part:
            scale_json(part, rope_parameters)
    write_json(output_dir / "config.json", config)


def write_generation_config(base_model: Path, output_dir: Path, stop_token_ids: Sequence[int]) -> None:
    """Write the base's generation defaults with all tokens that end a turn.

    A base that never chatted knows no end of turn: without it the merged model would go on after its answer. Sampling
    parameters without `do_sample`, as the first Llama 2 has them, are meant to be used: transformers ignores them and
    refuses to save them.
    """
    values = _without_words(read_generation_defaults(base_model))
    if any(values.get(name) is not None for name in _SAMPLING):
        values.setdefault("do_sample", True)
    if values.get("do_sample") is False:
        values = {name: value for name, value in values.items() if name not in _SAMPLING}
    values["eos_token_id"] = list(stop_token_ids)
    if problem := _problem(values):
        logger.warning("the base's generation_config.json is reduced to its special tokens: %s", problem)
        values = {name: value for name, value in values.items() if name.endswith("_token_id")}
    write_json(output_dir / "generation_config.json", values)


def _without_words(values: dict[str, Any]) -> dict[str, Any]:
    """The values but for parameters of sampling that are no number: servers end on them when they start."""
    kept = {
        name: value
        for name, value in values.items()
        if name not in _SAMPLING or value is None or number_of(values, name) is not None
    }
    if left_out := sorted(values.keys() - kept.keys()):
        logger.warning(
            "the base's generation_config.json is taken without %s: no number from 0 on", ", ".join(left_out)
        )
    return kept


def _problem(values: dict[str, Any]) -> str | None:
    """Why transformers would not save these values again; None if it would."""
    from transformers import GenerationConfig

    try:
        GenerationConfig.from_dict(values).validate(strict=True)
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        return " ".join(str(error).split())[:200]
    return None
