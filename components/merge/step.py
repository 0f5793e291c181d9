"""The step merge: an adapter added to its unquantized base, written in 16 bits, read back and compared."""

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from finemill.artifacts.adapter import read_training
from finemill.artifacts.chain import ChainLink, chain_metrics, chain_table
from finemill.artifacts.model import LandedTensor, MergeRecord, ScaledAdapter, write_merge
from finemill.artifacts.records import content_name
from finemill.components.merge.adapters import Addition, all_adapters, base_known_by, refuse_router
from finemill.components.merge.config import MergeConfig
from finemill.components.merge.files import check_tokens, copy_tokenizer, write_config, write_generation_config
from finemill.components.merge.four_bit import CARD as FOUR_BIT_CARD
from finemill.components.merge.four_bit import FOLDER as FOUR_BIT_FOLDER
from finemill.components.merge.four_bit import four_bit_bytes, four_bit_link, write_four_bit_model
from finemill.components.merge.fp8 import CARD as FP8_CARD
from finemill.components.merge.fp8 import FOLDER as FP8_FOLDER
from finemill.components.merge.fp8 import fp8_bytes, fp8_link, write_fp8_model
from finemill.components.merge.gptq import CARD as GPTQ_CARD
from finemill.components.merge.gptq import FOLDER as GPTQ_FOLDER
from finemill.components.merge.gptq import calibration_rows, gptq_bytes, gptq_link, write_gptq_model
from finemill.components.merge.landed import write_checked
from finemill.components.merge.merged import MergedModel
from finemill.components.merge.parity import compare_logits, link_of_logits, logits_of, probe_prompts
from finemill.errors import StepError, UserError
from finemill.models.adapter import saved_rows
from finemill.models.generation import stop_token_ids
from finemill.models.model_card import CardText, serve_commands, write_card
from finemill.models.stored_model import Rounding, StoredModel
from finemill.models.trained_base import trained_rounding
from finemill.models.write_weights import total_bytes
from finemill.runtime.context import StepContext
from finemill.storage.space import require_space

logger = logging.getLogger(__name__)

# Share of the adapter's whole change below which rounding is worth a word.
_MIN_SHARE = 0.9
_ADDED_TO = {"unquantized": "16-bit base + adapter", "dequantized": "4-bit base + adapter"}
_CARDS = {FOUR_BIT_FOLDER: FOUR_BIT_CARD, FP8_FOLDER: FP8_CARD, GPTQ_FOLDER: GPTQ_CARD}


def run(
    *, base_model: Path, adapter: Path, output_dir: Path, config: MergeConfig, context: StepContext
) -> Mapping[str, float]:
    """Write the merged model with tokenizer, chat template, generation config and merge.json; return the metrics.

    One layer is in memory at a time, so that a model of any size merges on any machine.

    Raises: UserError: a quantized or another base, an adapter that does not fit it, no room on the disk. StepError: the
    written model is not base plus adapter within the tolerances.
    """
    refuse_quantized(base_model)
    manifest = context.manifests.get("adapter")
    known_by = base_known_by(adapter, manifest.parents if manifest else {}, config, context)
    with all_adapters(base_model, adapter, config, context) as addition:
        return _merge(base_model, adapter, addition, known_by, output_dir, config, context)


def _merge(
    base_model: Path,
    adapter: Path,
    addition: Addition,
    known_by: str,
    output_dir: Path,
    config: MergeConfig,
    context: StepContext,
) -> Mapping[str, float]:
    unquantized = StoredModel(base_model)
    rounding = _trained_rounding(unquantized, adapter, context)
    stored = _chosen_base(unquantized, rounding, config)
    dtype = output_dtype(stored, config)
    output_dir.mkdir(parents=True, exist_ok=True)
    size = stored.num_elements * dtype.itemsize
    size += four_bit_bytes(stored, dtype) if config.merged_4bit else 0
    size += fp8_bytes(stored, dtype) if config.merged_fp8 else 0
    calibration = calibration_rows(stored, context) if config.merged_gptq else []
    size += gptq_bytes(stored) if config.merged_gptq else 0
    require_space(output_dir, size, "the merged model")
    tokenizer = copy_tokenizer(adapter, base_model, output_dir)
    prompts = probe_prompts(tokenizer)
    tuned, merged = put_on(stored, addition, config)
    refuse_router(tuned, config)
    known_rows = max(stored.shape_of(stored.embedding_name)[0], saved_rows(adapter, stored.embedding_name))
    check_tokens(tokenizer, merged.vocab_size or stored.num_tokens, adapter, known_rows)
    context.recorder.log_progress("what base and adapter say to the probes")
    expected = logits_of(tuned, stored, prompts)
    trained = _trained_base(base_model, addition, rounding, prompts, expected, config, context)
    write_config(
        base_model,
        output_dir,
        dtype,
        # Also of a base that only says it ties them.
        unties_embeddings=merged.unties_embeddings or not stored.is_tied,
        vocab_size=merged.vocab_size,
        rope_parameters=_rope_parameters(adapter),
    )
    write_generation_config(base_model, output_dir, stop_token_ids(tokenizer, base_model))
    shapes = merged.shapes()
    used_rounding = rounding if config.base == "dequantized" else None
    anew = put_on(StoredModel(base_model, used_rounding), addition, config)[1]
    size_gb = total_bytes(shapes) / 1e9
    context.recorder.log_progress(f"merging, writing {size_gb:.2f} GB, and comparing every written tensor")
    tensors = write_checked(merged, anew, output_dir, shapes, config.max_shard_size)
    landed = summarize(tensors)
    context.recorder.log_progress("what the written model says to the probes")
    written = StoredModel(output_dir)
    found = logits_of(written.model, written, prompts)
    parity = compare_logits(expected, found)
    link = link_of_logits("merged", _ADDED_TO[config.base], prompts, expected, found)
    in_4_bits = _four_bits(written, dtype, prompts, found, config, context)
    in_fp8 = _fp8(written, dtype, prompts, found, config, context)
    in_gptq = _gptq(written, dtype, tokenizer, calibration, prompts, found, config, context)
    record = MergeRecord(
        base_model=content_name(context.references["base_model"]),
        base_known_by=known_by,
        adapter=content_name(context.references["adapter"]),
        scale=config.scale,
        further_adapters=tuple(
            ScaledAdapter(adapter=content_name(further.adapter), scale=further.scale)
            for further in config.further_adapters
        ),
        dtype=str(dtype).removeprefix("torch."),
        **parity,
        max_kl=config.max_kl,
        min_top1_agreement=config.min_top1_agreement,
        **landed,
        tensors=tuple(tensors),
        base=config.base,
        chain=(*trained, link, *in_4_bits, *in_fp8, *in_gptq),
    )
    write_merge(output_dir, record)
    _write_card(output_dir, record, tokenizer.chat_template, written.num_experts)
    asked_for = {FOUR_BIT_FOLDER: in_4_bits, FP8_FOLDER: in_fp8, GPTQ_FOLDER: in_gptq}
    rounded = {folder: links for folder, links in asked_for.items() if links}
    for folder, links in rounded.items():
        _write_rounded_card(output_dir / folder, _CARDS[folder], record.base_model, tokenizer.chat_template, links)
    # Also of a model that says NaN.
    if not (parity["kl"] <= config.max_kl and parity["top1_agreement"] >= config.min_top1_agreement):
        raise StepError(
            f"merge: the written model differs from base and adapter: KL {parity['kl']:.3g} nats per token (allowed "
            f"{config.max_kl:g}), same likeliest token at {parity['top1_agreement']:.1%} (required "
            f"{config.min_top1_agreement:.1%})"
        )
    return {
        **chain_metrics(record.chain),
        **_link_metrics("trained_base", trained),
        **{name: value for folder, links in rounded.items() for name, value in _link_metrics(folder, links).items()},
        **{f"merge/{name}": value for name, value in {**parity, **landed}.items()},
        "merge/size_bytes": _weight_bytes(output_dir),
        **{f"merge/{folder}_size_bytes": _weight_bytes(output_dir / folder) for folder in rounded},
    }


def _write_rounded_card(
    folder: Path, text: CardText, base_model: str, chat_template: object, links: Sequence[ChainLink]
) -> None:
    """README.md beside the merged model in fewer bits."""
    write_card(
        folder,
        title=text.title,
        base_model=base_model,
        form=text.form,
        summary=text.summary,
        commands=serve_commands(chat_template, num_experts=0),
        table={},
        chain=chain_table(links),
    )


def _weight_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def _trained_rounding(stored: StoredModel, adapter: Path, context: StepContext) -> Rounding | None:
    manifest, training = context.manifests.get("adapter"), read_training(adapter)
    return trained_rounding(stored, manifest.config if manifest else {}, training.layers_in_16_bits if training else ())


def _chosen_base(stored: StoredModel, rounding: Rounding | None, config: MergeConfig) -> StoredModel:
    """The base that the adapter is added to. Raises: UserError: a dequantized one, and what it was is not known."""
    if config.base == "unquantized":
        return stored
    if rounding is None:
        raise UserError(
            "merge: base 'dequantized' needs an adapter that train-qlora or train-dpo trained in 4 bits, on a dense "
            "model and without LoftQ: use base 'unquantized'"
        )
    return StoredModel(stored.folder, rounding)


def _trained_base(
    base_model: Path,
    addition: Addition,
    rounding: Rounding | None,
    prompts: Sequence[Sequence[int]],
    expected: Sequence[torch.Tensor],
    config: MergeConfig,
    context: StepContext,
) -> list[ChainLink]:
    """How far the base is, under the adapter, from the base in 4 bits that was trained on; empty if there was none.

    Args:
        expected: logits of the one of the two that the adapter is added to.
    Raises: StepError: it is another model than the one that was trained.
    """
    if rounding is None:
        return []
    is_unquantized = config.base == "unquantized"
    what = "base in 4 bits that was trained on" if is_unquantized else "base itself"
    context.recorder.log_progress(f"what the {what} and the adapter say to the probes")
    stored = StoredModel(base_model, rounding if is_unquantized else None)
    others = logits_of(put_on(stored, addition, config)[0], stored, prompts)
    logits = (others, expected) if is_unquantized else (expected, others)
    link = link_of_logits(_ADDED_TO["unquantized"], _ADDED_TO["dequantized"], prompts, *logits)
    if not link.kl <= config.max_trained_base_kl:
        raise StepError(
            f"merge: the base with the adapter differs from the 4-bit base that was trained on by {link.kl:.3g} nats "
            f"per token (KL; allowed {config.max_trained_base_kl:g}): train on more bits, or merge onto "
            "base 'dequantized' with a larger max_trained_base_kl"
        )
    return [link]


def _four_bits(
    written: StoredModel,
    dtype: torch.dtype,
    prompts: Sequence[Sequence[int]],
    logits: Sequence[torch.Tensor],
    config: MergeConfig,
    context: StepContext,
) -> list[ChainLink]:
    """The link to the merged model in 4 bits, which is written, where it is asked for."""
    if not config.merged_4bit:
        return []
    return _rounded(
        "4 bits",
        partial(write_four_bit_model, written, dtype),
        partial(four_bit_link, written.folder, prompts, logits),
        config.max_4bit_kl,
        "use finemill quantize-4bit, which keeps 16 bits where they count, or a larger max_4bit_kl",
        context,
    )


def _fp8(
    written: StoredModel,
    dtype: torch.dtype,
    prompts: Sequence[Sequence[int]],
    logits: Sequence[torch.Tensor],
    config: MergeConfig,
    context: StepContext,
) -> list[ChainLink]:
    """The link to the merged model in FP8, which is written, where it is asked for."""
    if not config.merged_fp8:
        return []
    return _rounded(
        "FP8",
        partial(write_fp8_model, written, dtype),
        partial(fp8_link, written.folder, dtype, prompts, logits),
        config.max_fp8_kl,
        "serve the one in 16 bits, or allow a larger max_fp8_kl",
        context,
    )


def _gptq(
    written: StoredModel,
    dtype: torch.dtype,
    tokenizer: Any,
    rows: Sequence[Sequence[int]],
    prompts: Sequence[Sequence[int]],
    logits: Sequence[torch.Tensor],
    config: MergeConfig,
    context: StepContext,
) -> list[ChainLink]:
    """The link to the merged model in GPTQ's format, which is written, where it is asked for."""
    if not config.merged_gptq:
        return []
    return _rounded(
        "GPTQ's format",
        partial(write_gptq_model, written.folder, dtype, tokenizer, rows, config.gptq_steps),
        partial(gptq_link, written.folder, prompts, logits),
        config.max_gptq_kl,
        "raise gptq_steps, serve the one in FP8 or 16 bits, or allow a larger max_gptq_kl",
        context,
    )


def _rounded(
    form: str,
    write: Callable[[], None],
    compare: Callable[[], ChainLink],
    max_kl: float,
    advice: str,
    context: StepContext,
) -> list[ChainLink]:
    """Write the merged model in fewer bits and compare it. Raises: StepError: it is another model."""
    context.recorder.log_progress(f"writing the merged model in {form}, and comparing it")
    write()
    link = compare()
    if not link.kl <= max_kl:
        raise StepError(
            f"merge: in {form} the merged model differs by {link.kl:.3g} nats per token (KL; allowed {max_kl:g}): "
            f"{advice}"
        )
    return [link]


def _link_metrics(name: str, links: Sequence[ChainLink]) -> dict[str, float]:
    """Metrics of a link, where there is one."""
    return {
        f"merge/{name}_{metric}": value
        for link in links
        for metric, value in (
            ("kl", link.kl),
            ("kl_error", link.kl_error),
            ("loss_change", link.loss_change),
            ("top1_agreement", link.same_token),
        )
    }


def _rope_parameters(adapter: Path) -> Mapping[str, Any] | None:
    training = read_training(adapter)
    return training.rope_parameters if training else None


def put_on(stored: StoredModel, addition: Addition, config: MergeConfig) -> tuple[Any, MergedModel]:
    """PEFT's model of base and adapter, and what is written for it. Raises: UserError: as `Addition.on`."""
    tuned = addition.on(stored)
    dtype = output_dtype(stored, config)
    # A 16-bit base may keep a few tensors in 32 bits on purpose.
    return tuned, MergedModel(stored, tuned, dtype if config.dtype or dtype != stored.dtype else None)


def _write_card(output_dir: Path, record: MergeRecord, chat_template: object, num_experts: int) -> None:
    write_card(
        output_dir,
        title="Merged model",
        base_model=record.base_model,
        form="safetensors",
        summary=f"The base model `{record.base_model}` with the adapter `{record.adapter}`{_others(record)}, merged in "
        f"{record.dtype} by finemill.",
        commands=serve_commands(chat_template, num_experts=num_experts),
        table={
            "merged, against base and adapter": {
                "KL, nats per token": f"{record.kl:.2g}",
                "same likeliest token": f"{record.top1_agreement:.1%}",
                "change that rounding left": f"{record.share_landed:.1%}",
            },
        },
        chain=chain_table(record.chain),
    )


def _others(record: MergeRecord) -> str:
    """What was added besides, and the factors."""
    factor = f" x {record.scale:g}" if record.scale != 1 or record.further_adapters else ""
    return factor + "".join(f" and `{further.adapter}` x {further.scale:g}" for further in record.further_adapters)


def refuse_quantized(base_model: Path) -> None:
    """Raises: UserError: the base's weights are quantized. Merging into them would round the adapter away."""
    config = json.loads((base_model / "config.json").read_text(encoding="utf-8"))
    quantization = config.get("quantization_config") or config.get("compression_config")
    if quantization:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else None
        raise UserError(
            f"merge: the base model is quantized ({method or 'unknown method'}): pass the "
            "unquantized model it was made from; training in 4 bits quantizes that by itself"
        )


def output_dtype(stored: StoredModel, config: MergeConfig) -> torch.dtype:
    """The configured type, or the base's own if that has 16 bits."""
    if config.dtype:
        return {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}[config.dtype]
    if stored.dtype.itemsize == 2:
        return stored.dtype
    return torch.float16 if stored.model.config.dtype == torch.float16 else torch.bfloat16


def summarize(landed: Sequence[LandedTensor]) -> dict[str, float]:
    """How much of the adapter's change is in the written tensors: of all of them, and of the one that lost most."""
    if not landed:
        logger.warning("the adapter changes nothing: every one of its products is zero")
        return {"share_landed": 1.0, "min_share_landed": 1.0}
    total = sum(tensor.meant**2 for tensor in landed)
    share = sum(tensor.share * tensor.meant**2 for tensor in landed) / total
    worst = min(landed, key=lambda tensor: tensor.share)
    if share < _MIN_SHARE:
        logger.warning(
            "rounding keeps %.0f %% of the adapter's change (%.0f %% of %s): it is smaller than the steps between the "
            "written numbers; dtype float32 keeps all of it",
            100 * share, 100 * worst.share, worst.name,
        )  # fmt: skip
    return {"share_landed": share, "min_share_landed": worst.share}
