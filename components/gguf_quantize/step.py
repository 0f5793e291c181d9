"""The step gguf-quantize: a merged model as GGUF files that have been run and compared."""

import json
import logging
import re
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from finemill.artifacts.dataset import read_held_out, spread
from finemill.artifacts.files import GGUF_FILE
from finemill.artifacts.model import read_merge
from finemill.artifacts.records import write_json
from finemill.components.gguf_quantize.config import GGUFQuantizeConfig
from finemill.components.gguf_quantize.convert import Array, SourceModel
from finemill.components.gguf_quantize.cores import available_cores
from finemill.components.gguf_quantize.imatrix import channel_weights
from finemill.components.gguf_quantize.llama_cpp import serve
from finemill.components.gguf_quantize.modelfile import modelfile
from finemill.components.gguf_quantize.verify import Reference, compare, make_reference
from finemill.components.gguf_quantize.vocabulary import load_tokenizer
from finemill.components.gguf_quantize.write import WrittenFile, write_gguf
from finemill.errors import GateFailedError
from finemill.models.causal_lm import SMALL_MODEL, load_causal_lm, suitable_threads
from finemill.models.generation import stop_token_ids
from finemill.runtime.context import StepContext

logger = logging.getLogger(__name__)

# Names that transformers and Ollama give to the same sampling parameters.
_SAMPLING = {"temperature": "temperature", "top_p": "top_p", "top_k": "top_k", "repetition_penalty": "repeat_penalty"}


def run(
    *, model: Path, dataset: Path, output_dir: Path, config: GGUFQuantizeConfig, context: StepContext
) -> Mapping[str, float]:
    """Write `<name>-<quantization>.gguf` for each quantization, a Modelfile and gguf.json; return the metrics.

    Raises: UserError: a model, tokenizer or tensor that llama.cpp has no counterpart for. StepError: llama.cpp does not
    load a file, or reads text otherwise. GateFailedError: a file lost too many points, under `strict`.
    """
    source = SourceModel(model)
    source.names()  # what cannot be converted is refused before the model is loaded
    name = config.name or default_name(model)
    num_threads = config.num_threads or available_cores()
    tokenizer = load_tokenizer(model)
    stored = source.config.get("dtype") or "bfloat16"
    merged = load_causal_lm(model, dtype=getattr(torch, "float32" if config.compute_dtype == "float32" else stored))
    imatrix = _imatrix(merged, source, dataset, config, context)
    files: dict[str, WrittenFile] = {}
    for quantization in config.quantizations:
        context.recorder.log_progress(f"writing {quantization}")
        path = output_dir / f"{name}-{quantization}.gguf"
        files[quantization] = write_gguf(source, path, quantization, name, num_threads, imatrix)
        _warn_of_fallbacks(quantization, files[quantization])
    with suitable_threads(merged):
        reference = _reference(merged, tokenizer, model, dataset, config, context)
    del merged
    comparisons = _compare_all(files, reference, tokenizer, model, config, context)
    warnings = _points_lost(reference.exact_match, comparisons, config)
    default_file = files[config.quantizations[-1]].path.name
    (output_dir / "Modelfile").write_text(_modelfile(default_file, tokenizer, model), encoding="utf-8")
    _write_record(output_dir, name, files, comparisons, reference, warnings)
    metrics = _metrics(files, comparisons, reference)
    if warnings and config.strict:
        raise GateFailedError(f"gguf-quantize: {'; '.join(warnings)}")
    return metrics


def default_name(model: Path) -> str:
    """The base model's own name with `-tuned`; the base as merge recorded it."""
    record = read_merge(model)
    last = (record.base_model if record else "model").split("@")[0].rstrip("/").split("/")[-1].removeprefix("builtin:")
    return re.sub(r"[^A-Za-z0-9._-]+", "-", last) + "-tuned"


def _imatrix(
    merged: Any, source: SourceModel, dataset: Path, config: GGUFQuantizeConfig, context: StepContext
) -> dict[str, Array] | None:
    if not config.imatrix:
        return None
    context.recorder.log_progress(f"importance of input channels on {config.imatrix_rows} training rows")
    return channel_weights(merged, source, spread(read_held_out(dataset, "train"), config.imatrix_rows))


def _reference(
    merged: Any, tokenizer: Any, model: Path, dataset: Path, config: GGUFQuantizeConfig, context: StepContext
) -> Reference:
    rows = read_held_out(dataset, "test")
    with_answer = [row for row in rows if row.answer is not None]
    answer_rows = spread(with_answer or rows, config.verify_rows)
    return make_reference(
        merged,
        tokenizer,
        kl_rows=spread(rows, config.kl_rows),
        kl_positions=config.kl_positions,
        answer_rows=answer_rows,
        stop_token_ids=stop_token_ids(tokenizer, model),
        max_new_tokens=config.max_new_tokens,
        on_progress=lambda done: context.recorder.log_progress(f"merged model: {done} of {len(answer_rows)} answers"),
    )


def _compare_all(
    files: Mapping[str, WrittenFile],
    reference: Reference,
    tokenizer: Any,
    model: Path,
    config: GGUFQuantizeConfig,
    context: StepContext,
) -> dict[str, dict[str, float]]:
    longest = max(len(prompt) for prompt in (*reference.kl_prompts, *reference.prompts))
    comparisons = {}
    for quantization, file in files.items():
        context.recorder.log_progress(f"{quantization} in llama.cpp: distributions")

        def show(done: int, quantization: str = quantization) -> None:
            if done % 16 == 0 or done == len(reference.prompts):
                context.recorder.log_progress(
                    f"{quantization} in llama.cpp: {done} of {len(reference.prompts)} answers"
                )

        num_threads = config.num_threads or (1 if file.num_parameters < SMALL_MODEL else available_cores())
        with serve(file.path, num_threads, longest + config.max_new_tokens) as server:
            comparisons[quantization] = compare(
                server,
                reference,
                tokenizer,
                stop_token_ids=stop_token_ids(tokenizer, model),
                max_new_tokens=config.max_new_tokens,
                on_progress=show,
            )
    return comparisons


def _points_lost(
    merged_score: float | None, comparisons: Mapping[str, Mapping[str, float]], config: GGUFQuantizeConfig
) -> list[str]:
    warnings = []
    for quantization, metrics in comparisons.items():
        if merged_score is None or "exact_match" not in metrics:
            continue
        lost = 100 * (merged_score - metrics["exact_match"])
        if lost > config.max_points_lost:
            warnings.append(
                f"{quantization} loses {lost:.1f} points of exact match against the merged model, "
                f"more than max_points_lost ({config.max_points_lost:g})"
            )
    for warning in warnings:
        logger.warning(warning)
    return warnings


def _warn_of_fallbacks(quantization: str, file: WrittenFile) -> None:
    if file.fallbacks:
        example, change = next(iter(file.fallbacks.items()))
        logger.warning(
            "%s: %d of %d tensors have rows that are no multiple of the block and fall back as in llama.cpp, "
            "%s for one: %s; the file is larger for it",
            quantization, len(file.fallbacks), sum(file.tensor_types.values()), example, change,
        )  # fmt: skip


def _modelfile(gguf_name: str, tokenizer: Any, model: Path) -> str:
    path = model / "generation_config.json"
    generation = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    sampling = {ollama: generation[name] for name, ollama in _SAMPLING.items() if generation.get(name) is not None}
    stops = tokenizer.convert_ids_to_tokens(stop_token_ids(tokenizer, model))
    return modelfile(gguf_name, tokenizer, stops, sampling)


def _write_record(
    output_dir: Path,
    name: str,
    files: Mapping[str, WrittenFile],
    comparisons: Mapping[str, Mapping[str, float]],
    reference: Reference,
    warnings: list[str],
) -> None:
    record = {
        "name": name,
        "merged": {"exact_match": reference.exact_match},
        "kl_positions": len(reference.kl_prompts),
        "answers": len(reference.prompts),
        "files": {
            quantization: {
                **asdict(file),
                "path": file.path.name,
                "bits_per_weight": round(file.bits_per_weight, 4),
                **comparisons[quantization],
            }
            for quantization, file in files.items()
        },
        "warnings": warnings,
    }
    write_json(output_dir / GGUF_FILE, record)


def _metrics(
    files: Mapping[str, WrittenFile], comparisons: Mapping[str, Mapping[str, float]], reference: Reference
) -> dict[str, float]:
    metrics: dict[str, float] = {}
    if reference.exact_match is not None:
        metrics["gguf/merged/exact_match"] = reference.exact_match
    for quantization, file in files.items():
        prefix = f"gguf/{quantization.lower()}"
        metrics[f"{prefix}/size_bytes"] = file.size_bytes
        metrics[f"{prefix}/bits_per_weight"] = file.bits_per_weight
        metrics |= {f"{prefix}/{metric}": value for metric, value in comparisons[quantization].items()}
    return metrics
