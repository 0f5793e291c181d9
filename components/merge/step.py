"""The step merge: an adapter added to its unquantized base, written in 16 bits, read back and compared."""

import json
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from finemill.artifacts.adapter import has_tokenizer
from finemill.components.merge.config import MergeConfig
from finemill.components.merge.parity import check_chat_template, compare_logits, logits_of, probe_prompts
from finemill.errors import StepError, UserError
from finemill.models.adapter import load_adapter
from finemill.models.causal_lm import load_causal_lm
from finemill.models.generation import stop_token_ids
from finemill.runtime.context import StepContext

logger = logging.getLogger(__name__)

# Whatever of these the adapter's folder has is the tuned model's tokenizer; copied, so that not a byte changes.
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "tokenizer.model", "chat_template.jinja",
)  # fmt: skip


def run(
    *, base_model: Path, adapter: Path, output_dir: Path, config: MergeConfig, context: StepContext
) -> Mapping[str, float]:
    """Write the merged model with tokenizer, chat template, generation config and merge.json; return the metrics.

    Works on the CPU: the sums are small, and a model that fits no GPU can be merged.

    Raises: UserError: a quantized base, or an adapter that does not fit it. StepError: the written model is not base
    plus adapter within the tolerances.
    """
    from transformers import AutoTokenizer

    refuse_quantized(base_model)
    dtype = output_dtype(base_model, config)
    compute_dtype = torch.float32 if config.compute_dtype == "float32" else dtype
    context.recorder.log_progress("loading base and adapter")
    tuned = load_adapter(load_causal_lm(base_model, device=torch.device("cpu"), dtype=compute_dtype), adapter)
    copy_tokenizer(adapter, base_model, output_dir)
    tokenizer = AutoTokenizer.from_pretrained(output_dir, trust_remote_code=False)
    prompts = probe_prompts(tokenizer)
    expected = logits_of(tuned, prompts)
    context.recorder.log_progress(f"merging, and writing {str(dtype).removeprefix('torch.')}")
    separate_embeddings(tuned)
    merged = tuned.merge_and_unload(safe_merge=True)
    # A base that never chatted knows no end of turn: without it the merged model would go on after its answer.
    merged.generation_config.eos_token_id = stop_token_ids(tokenizer, base_model)
    merged.to(dtype).save_pretrained(output_dir, max_shard_size=config.max_shard_size)
    del tuned, merged
    context.recorder.log_progress("comparing the written model with base and adapter")
    written = load_causal_lm(output_dir, device=torch.device("cpu"), dtype=compute_dtype)
    parity = compare_logits(expected, logits_of(written, prompts))
    check_chat_template(adapter, output_dir)
    _write_record(output_dir, base_model, adapter, dtype, compute_dtype, parity, config, context)
    if parity["kl"] > config.max_kl or parity["top1_agreement"] < config.min_top1_agreement:
        raise StepError(
            f"merge: the written model differs from base and adapter: KL {parity['kl']:.3g} nats per token (allowed "
            f"{config.max_kl:g}), same likeliest token at {parity['top1_agreement']:.1%} (required "
            f"{config.min_top1_agreement:.1%}); was the adapter trained on another base?"
        )
    return {
        **{f"merge/{name}": value for name, value in parity.items()},
        "merge/size_bytes": sum(path.stat().st_size for path in output_dir.glob("*.safetensors")),
    }


def refuse_quantized(base_model: Path) -> None:
    """Raises: UserError: the base's weights are quantized. Merging into them would round the adapter away."""
    config = json.loads((base_model / "config.json").read_text(encoding="utf-8"))
    quantization = config.get("quantization_config")
    if quantization:
        raise UserError(
            f"merge: the base model is quantized ({quantization.get('quant_method', 'unknown method')}): pass the "
            "unquantized model it was made from; training in 4 bits quantizes that by itself"
        )


def output_dtype(base_model: Path, config: MergeConfig) -> torch.dtype:
    """The configured type, or the base's own if that has 16 bits."""
    base = json.loads((base_model / "config.json").read_text(encoding="utf-8"))
    name = config.dtype or base.get("dtype") or base.get("torch_dtype")
    return torch.float16 if name == "float16" else torch.bfloat16


def separate_embeddings(tuned: Any) -> None:
    """Give the output matrix its own weights if it is tied to the embedding and the adapter changes one of the two.

    Merged into a shared matrix, a change of one would show in the other as well.
    """
    model = tuned.get_base_model()
    embedding, output = model.get_input_embeddings(), model.get_output_embeddings()
    adapted = [hasattr(module, "base_layer") or hasattr(module, "modules_to_save") for module in (embedding, output)]
    if not model.config.tie_word_embeddings or not any(adapted):
        return
    holder = getattr(output, "base_layer", None) or getattr(output, "original_module", output)
    holder.weight = torch.nn.Parameter(holder.weight.detach().clone(), requires_grad=False)
    model.config.tie_word_embeddings = False
    logger.warning("the adapter changes a tied embedding: the merged model gets an output matrix of its own")


def copy_tokenizer(adapter: Path, base_model: Path, output_dir: Path) -> None:
    """Copy the adapter's tokenizer and chat template; the base's where the adapter has none."""
    source = adapter if has_tokenizer(adapter) else base_model
    output_dir.mkdir(parents=True, exist_ok=True)
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, output_dir / name)


def _write_record(
    output_dir: Path,
    base_model: Path,
    adapter: Path,
    dtype: torch.dtype,
    compute_dtype: torch.dtype,
    parity: Mapping[str, float],
    config: MergeConfig,
    context: StepContext,
) -> None:
    record = {
        "base_model": context.references.get("base_model", str(base_model)),
        "adapter": context.references.get("adapter", str(adapter)),
        "dtype": str(dtype).removeprefix("torch."),
        "compute_dtype": str(compute_dtype).removeprefix("torch."),
        **parity,
        "max_kl": config.max_kl,
        "min_top1_agreement": config.min_top1_agreement,
    }
    (output_dir / "merge.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
