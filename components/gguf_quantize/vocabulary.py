"""A BPE tokenizer, byte-level or of SentencePiece, as GGUF metadata: llama.cpp splits text into the same tokens."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
from tokenizers import Tokenizer
from tokenizers.models import BPE
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from finemill.components.gguf_quantize.convert import SourceModel
from finemill.errors import UserError
from finemill.models.generation import stop_token_ids
from finemill.models.token_rows import tokens_without_row

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_TEKKEN_WORDS = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
)
_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_CASED_WORDS = "|".join(f"{words}{_ENDINGS}" for words in _TEKKEN_WORDS.split("|"))
_MARKS = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# The split pattern in tokenizer.json -> llama.cpp's name of the same pre-tokenizer.
PRE_TOKENIZERS = {
    rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}|{_REST}": "qwen2",
    rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}{{1,3}}|{_REST}": "llama-bpe",
    rf"{_TEKKEN_WORDS}|\p{{N}}|{_MARKS}": "tekken",
    rf"{_CASED_WORDS}|\p{{N}}{{1,3}}|{_MARKS}": "gpt-4o",
}
# Split as the first, and a word of the vocabulary is taken whole only if merges make it.
_WITH_MERGES = {"llama-bpe": "dbrx"}
_WHOLE_WORDS = ("llama-bpe", "tekken")
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")


def load_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """The folder's tokenizer. Raises: UserError: it is not a fast tokenizer with a `tokenizer.json`, or damaged."""
    if not (folder / "tokenizer.json").is_file():
        raise UserError(f"gguf-quantize: {folder} has no tokenizer.json: save the model with a fast tokenizer")
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    # The library's own errors are plain `Exception`s.
    except Exception as error:
        line = " ".join(str(error).split())
        raise UserError(f"gguf-quantize: the tokenizer in {folder} cannot be loaded: {line:.300}") from error


def pre_tokenizer_name(definition: dict[str, Any]) -> str:
    """llama.cpp's name for the split rule of a parsed `tokenizer.json`.

    Raises: UserError: not a byte-level BPE tokenizer, or a split rule that has no name here.
    """
    name = _split_name(definition.get("pre_tokenizer") or {})
    takes_whole_words = bool(definition["model"].get("ignore_merges"))
    if takes_whole_words == (name in _WHOLE_WORDS):
        return name
    if not takes_whole_words and name in _WITH_MERGES:
        return _WITH_MERGES[name]
    if word := _only_whole(definition):
        raise UserError(
            f"gguf-quantize: the tokenizer has {word!r}, which its merges do not make, and ignore_merges "
            f"{str(takes_whole_words).lower()}; llama.cpp does the opposite after the split that it calls {name}"
        )
    return name


def _check_kind(definition: Mapping[str, Any]) -> None:
    """Raises: UserError: no BPE."""
    if definition["model"]["type"] != "BPE":
        raise UserError(
            f"gguf-quantize: the tokenizer is {definition['model']['type']}; supported is BPE, byte-level as in Qwen2, "
            "Qwen3 and Llama 3, or of SentencePiece as in Mistral 7B and Llama 2"
        )


def _split_name(pre_tokenizer: Mapping[str, Any]) -> str:
    parts = pre_tokenizer.get("pretokenizers") or [pre_tokenizer]
    kinds = [part.get("type") for part in parts]
    if kinds[0] == "ByteLevel" and parts[0].get("use_regex", True):
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and parts[0]["individual_digits"] and parts[1].get("use_regex", True):
        return "smollm"
    pattern = str((parts[0].get("pattern") or {}).get("Regex"))
    if pattern not in PRE_TOKENIZERS:
        raise UserError(
            f"gguf-quantize: the tokenizer splits text by {pattern!r:.120}, which is none of llama.cpp's that are "
            f"known here: gpt-2, smollm, {', '.join(PRE_TOKENIZERS.values())}"
        )
    return PRE_TOKENIZERS[pattern]


def _only_whole(definition: Mapping[str, Any]) -> str | None:
    """A word of the vocabulary that its merges make several tokens of."""
    vocabulary, merges = definition["model"]["vocab"], definition["model"]["merges"]
    pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in merges]
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=[(first, second) for first, second in pairs]))
    encoded = zip(vocabulary, tokenizer.encode_batch(list(vocabulary)), strict=True)
    return next((word for word, tokens in encoded if len(tokens.ids) != 1), None)


def check_vocabulary(model: SourceModel) -> None:
    """Raises: UserError: a tokenizer that llama.cpp has no counterpart for, or of another model; a broken template."""
    _check_template(load_tokenizer(model.folder), model.folder)
    add_vocabulary(gguf.GGUFWriter(None, gguf.MODEL_ARCH_NAMES[model.architecture]), model.folder, model.num_tokens)


def _check_template(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """llama.cpp does not load a file whose chat template it cannot run on any chat."""
    problem = None
    for chat in (
        [{"role": "system", "content": "Hi"}, {"role": "user", "content": "Hi"}],
        [{"role": "user", "content": "Hi"}],
    ):
        try:
            tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        # There is none, none of that name, or one that wants something else.
        except (ValueError, TypeError, KeyError, AttributeError):
            return
        except Exception as error:
            problem = error
        else:
            return
    raise UserError(
        f"gguf-quantize: the chat template in {folder} cannot be run ({problem}): correct it, or take it away"
    )


def add_vocabulary(writer: gguf.GGUFWriter, folder: Path, num_embeddings: int) -> None:
    """Write tokens, their types, merges, special tokens and chat template.

    Args:
        num_embeddings: rows of the embedding matrix; ids past the tokenizer's last become unused tokens.
    Raises: UserError: tokens that the model has no row for, or a tokenizer that llama.cpp has no counterpart for.
    """
    tokenizer = load_tokenizer(folder)
    definition = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    if unknown := tokens_without_row(tokenizer, num_embeddings):
        last = max(unknown)
        raise UserError(
            f"gguf-quantize: the tokenizer has token id {last}, {unknown[last]!r}, the model only {num_embeddings} "
            "embeddings: they are not of one model"
        )
    _check_kind(definition)
    tokens, types = _tokens(definition, num_embeddings)
    if definition["model"].get("byte_fallback"):
        _add_sentencepiece(writer, definition, tokens)
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre_tokenizer_name(definition))
        merges = definition["model"]["merges"]
        writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    _add_special_tokens(writer, tokenizer, folder)
    _add_chat_templates(writer, tokenizer.chat_template)


def _add_sentencepiece(writer: gguf.GGUFWriter, definition: dict[str, Any], tokens: list[str]) -> None:
    """llama.cpp merges the pair whose whole has the highest score: the merge that comes first has it.

    Raises: UserError: text is changed before it is split, by more than a mark for spaces.
    """
    normalizer = definition.get("normalizer") or {}
    changes = [part for part in normalizer.get("normalizers") or [normalizer] if part]
    pre_tokenizer = definition.get("pre_tokenizer") or {}
    known = all(part["type"] in ("Prepend", "Replace") for part in changes)
    if not known or pre_tokenizer.get("type") not in (None, "Metaspace", "Split"):
        found = [part["type"] for part in (*changes, *([pre_tokenizer] if pre_tokenizer else []))]
        raise UserError(
            f"gguf-quantize: the SentencePiece tokenizer changes text by {', '.join(found)}; llama.cpp only marks "
            "spaces"
        )
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(definition["model"]["merges"]):
        ranks.setdefault(merge.replace(" ", "") if isinstance(merge, str) else "".join(merge), rank)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_scores([-float(ranks.get(token, len(ranks))) for token in tokens])
    prepends = any(part["type"] == "Prepend" for part in changes)
    writer.add_add_space_prefix(prepends or pre_tokenizer.get("prepend_scheme") in ("always", "first"))


def _add_chat_templates(writer: gguf.GGUFWriter, template: str | dict[str, str] | None) -> None:
    """The one called `default` goes under the plain key, others under their names, in a fixed order."""
    named = template if isinstance(template, dict) else {"default": template} if template else {}
    if "default" in named:
        writer.add_chat_template(named["default"])
    others = sorted(set(named) - {"default"})
    if others:
        writer.add_array(gguf.Keys.Tokenizer.CHAT_TEMPLATES, others)
    for name in others:
        writer.add_string(gguf.Keys.Tokenizer.CHAT_TEMPLATE_N.format(name=name), named[name])


def _tokens(definition: dict[str, Any], num_embeddings: int) -> tuple[list[str], list[int]]:
    """Text and type of every id below `num_embeddings`."""
    texts = {index: text for text, index in definition["model"]["vocab"].items()}
    types = dict.fromkeys(texts, gguf.TokenType.NORMAL)
    if definition["model"].get("byte_fallback"):
        types |= {index: gguf.TokenType.BYTE for index, text in texts.items() if _BYTE.fullmatch(text)}
    for added in definition["added_tokens"]:
        texts[added["id"]] = added["content"]
        types[added["id"]] = gguf.TokenType.CONTROL if added["special"] else gguf.TokenType.USER_DEFINED
    unknown = definition["model"].get("unk_token")
    types |= {index: gguf.TokenType.UNKNOWN for index, text in texts.items() if unknown and text == unknown}
    ids = range(num_embeddings)
    tokens = [texts.get(index, f"[PAD{index}]") for index in ids]
    _check_repeated(tokens)
    return tokens, [types.get(index, gguf.TokenType.UNUSED) for index in ids]


def _check_repeated(tokens: Sequence[str]) -> None:
    """Raises: UserError: two ids have one text, at which llama.cpp ends the whole process."""
    first: dict[str, int] = {}
    for index, text in enumerate(tokens):
        if first.setdefault(text, index) != index:
            raise UserError(
                f"gguf-quantize: token ids {first[text]} and {index} of the tokenizer are both {text!r}; llama.cpp "
                "wants each token once: rename one of them in tokenizer.json"
            )


def _add_special_tokens(writer: gguf.GGUFWriter, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    adders = {"bos": writer.add_bos_token_id, "eos": writer.add_eos_token_id, "pad": writer.add_pad_token_id}
    for role, add in adders.items():
        token_id = getattr(tokenizer, f"{role}_token_id")
        if token_id is not None:
            add(token_id)
    # llama.cpp keeps one more token that ends a turn.
    others = [token_id for token_id in stop_token_ids(tokenizer, folder) if token_id != tokenizer.eos_token_id]
    if others:
        writer.add_eot_token_id(others[0])
    prefix = tokenizer("", add_special_tokens=True)["input_ids"]
    writer.add_add_bos_token(bool(prefix) and prefix[0] == tokenizer.bos_token_id)
