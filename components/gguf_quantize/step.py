"""The step gguf-quantize: a merged model as GGUF files that have been run and compared."""

import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from finemill.artifacts.chain import ChainLink, chain_metrics, chain_table
from finemill.artifacts.dataset import HeldOutRow, prompt_ids, read_held_out, spread
from finemill.artifacts.files import IMATRIX_FILE
from finemill.artifacts.gguf import GGUFFileRecord, GGUFRecord, write_gguf_record
from finemill.artifacts.model import read_merge
from finemill.artifacts.records import content_name
from finemill.artifacts.splits import Split
from finemill.components.gguf_quantize.config import DYNAMIC, GGUFQuantizeConfig, Quantization
from finemill.components.gguf_quantize.convert import Array, SourceModel
from finemill.components.gguf_quantize.decoded import check_decoded
from finemill.components.gguf_quantize.dynamic import Option, choose_types, measure_options
from finemill.components.gguf_quantize.imatrix import channel_importance, write_imatrix
from finemill.components.gguf_quantize.modelfile import modelfile
from finemill.components.gguf_quantize.sensitivity import uses
from finemill.components.gguf_quantize.verify import Reference, chat_room, compare, compared_positions
from finemill.components.gguf_quantize.vocabulary import check_vocabulary, load_tokenizer
from finemill.components.gguf_quantize.write import Target, WrittenFile, size_bytes, write_ggufs
from finemill.errors import GateFailedError, StepError, UserError
from finemill.models.causal_lm import SMALL_MODEL, load_causal_lm, suitable_threads
from finemill.models.cores import available_cores
from finemill.models.generation import Answer, generate_answers, stop_token_ids
from finemill.models.llama_cpp import serve
from finemill.models.model_card import llama_cpp_command, write_card
from finemill.models.sampling import number_of, read_generation_defaults
from finemill.models.stored_model import StoredModel
from finemill.models.token_rows import check_token_ids
from finemill.runtime.context import StepContext
from finemill.storage.space import require_space

logger = logging.getLogger(__name__)

# Names that transformers and Ollama give to the same sampling parameters.
_SAMPLING = {
    "temperature": "temperature", "top_p": "top_p", "top_k": "top_k", "min_p": "min_p",
    "repetition_penalty": "repeat_penalty",
}  # fmt: skip
_CARD_RATES = {"top1_agreement": "same likeliest token", "exact_match": "exact match"}


def run(
    *, model: Path, dataset: Path, output_dir: Path, config: GGUFQuantizeConfig, context: StepContext
) -> Mapping[str, float]:
    """Write `<name>-<quantization>.gguf` for each quantization, a Modelfile and gguf.json; return the metrics.

    The merged model is read one layer at a time, but for its answers to `verify_rows` problems.

    Raises: UserError: a model, tokenizer or tensor that llama.cpp has no counterpart for; no room on the disk.
    StepError: llama.cpp does not load a file, reads text otherwise, or computes something else than the merged model.
    GateFailedError: a file lost too many points, under `strict`.
    """
    source = SourceModel(model, config.context_length)
    source.check()
    if "MXFP4_MOE" in config.quantizations and not source.num_experts:
        raise UserError(
            f"gguf-quantize: MXFP4_MOE rounds experts, and the model in {model} has none: choose Q4_K_M or IQ4_XS"
        )
    stored = StoredModel(model)
    tokenizer = load_tokenizer(model)
    check_vocabulary(source)
    name = config.name or default_name(model)
    num_threads = config.num_threads or available_cores()
    output_dir.mkdir(parents=True, exist_ok=True)
    size = sum(size_bytes(source, quantization) for quantization in config.quantizations)
    require_space(output_dir, size, "writing the GGUF files")
    rows, held_out = _training_rows(dataset, config, source.num_tokens), _rows(dataset, "test", source.num_tokens)
    imatrix = _imatrix(stored, source, rows, output_dir, config, context)
    options = _options(stored, source, rows, imatrix, config, context)
    context.recorder.log_progress(f"writing {', '.join(config.quantizations)}")
    targets = [
        Target(
            output_dir / f"{name}-{quantization.replace(DYNAMIC, 'dynamic-')}.gguf",
            quantization,
            choose_types(source, options, quantization) if quantization.startswith(DYNAMIC) else None,
        )
        for quantization in config.quantizations
    ]
    written = write_ggufs(source, targets, name, num_threads, imatrix)
    files: dict[str, WrittenFile] = dict(zip(config.quantizations, written, strict=True))
    context.recorder.log_progress("comparing every tensor of the files with the merged model's")
    errors = check_decoded(source, files, num_threads)
    fallbacks = [
        line for quantization in config.quantizations for line in _fallbacks(quantization, files[quantization])
    ]
    for line in fallbacks:
        logger.warning(line)
    reference = _reference(stored, tokenizer, held_out, config, context)
    comparisons: dict[str, dict[str, float]] = {}
    links: list[ChainLink] = []
    for quantization in config.quantizations:
        compared, link = _compare(files[quantization], quantization, reference, tokenizer, model, config, context)
        _check_divergence(quantization, link.kl, config)
        _check_answers(quantization, link, config)
        links.append(link)
        comparisons[quantization] = {**compared, "max_tensor_error": errors[quantization]}
    lost = _points_lost(reference.exact_match, comparisons, config)
    other_prompts = [*_other_tokens(comparisons), *_other_prompts(comparisons)]
    for line in other_prompts:
        logger.warning(line)
    for line in lost:
        logger.warning(line)
    default_file = files[config.quantizations[-1]].path.name
    (output_dir / "Modelfile").write_text(_modelfile(default_file, tokenizer, model), encoding="utf-8")
    _write_record(output_dir, name, files, comparisons, reference, links, [*fallbacks, *lost, *other_prompts])
    _write_card(output_dir, name, model, files, comparisons, links, is_mixture=bool(source.num_experts))
    metrics = _metrics(files, comparisons, reference) | chain_metrics(links)
    if lost and config.strict:
        raise GateFailedError(f"gguf-quantize: {'; '.join(lost)}")
    return metrics


def default_name(model: Path) -> str:
    """The base model's own name with `-tuned`; the base as merge recorded it."""
    record = read_merge(model)
    last = (record.base_model if record else "model").split("@")[0].rstrip("/").split("/")[-1].removeprefix("builtin:")
    return re.sub(r"[^A-Za-z0-9._-]+", "-", last) + "-tuned"


def _training_rows(dataset: Path, config: GGUFQuantizeConfig, num_tokens: int) -> list[list[int]]:
    """What importance and errors are measured on; nothing where nothing asks for them."""
    if not config.needs_imatrix:
        return []
    return [row.input_ids for row in spread(_rows(dataset, "train", num_tokens), config.imatrix_rows)]


def _rows(dataset: Path, split: Split, num_tokens: int) -> list[HeldOutRow]:
    """Raises: UserError: rows of a tokenizer that is not the model's."""
    rows = read_held_out(dataset, split)
    check_token_ids((row.input_ids for row in rows), num_tokens, dataset)
    return rows


def _imatrix(
    stored: StoredModel,
    source: SourceModel,
    rows: list[list[int]],
    output_dir: Path,
    config: GGUFQuantizeConfig,
    context: StepContext,
) -> dict[str, Array] | None:
    """The importance of input channels, which is published beside the files, or None where nothing asks for it."""
    if not config.needs_imatrix:
        return None
    context.recorder.log_progress(f"importance of input channels on {config.imatrix_rows} training rows")
    importance = channel_importance(stored, source, rows)
    write_imatrix(output_dir / IMATRIX_FILE, importance, rows, content_name(context.references["dataset"]))
    return {name: found.weights for name, found in importance.items()}


def _options(
    stored: StoredModel,
    source: SourceModel,
    rows: list[list[int]],
    imatrix: Mapping[str, Array] | None,
    config: GGUFQuantizeConfig,
    context: StepContext,
) -> dict[str, list[Option]]:
    """What each type costs in each tensor, where a dynamic file asks for it."""
    if not config.is_dynamic or imatrix is None:
        return {}
    context.recorder.log_progress("errors of each tensor in each type")
    return measure_options(source, uses(stored, source, rows), imatrix, config.num_threads or available_cores())


def _reference(
    stored: StoredModel, tokenizer: Any, rows: list[HeldOutRow], config: GGUFQuantizeConfig, context: StepContext
) -> Reference:
    context.recorder.log_progress(f"what the merged model expects on {config.kl_rows} rows")
    length = config.context_length or stored.model.config.get_text_config().max_position_embeddings
    compared = compared_positions(stored, spread(rows, config.kl_rows), config.kl_positions, length)
    if not compared:
        raise UserError(
            f"gguf-quantize: no held-out row of the dataset has an answer within {length} tokens: run chat-format on "
            "other rows, or declare a larger context_length"
        )
    with_answer = [row for row in rows if row.answer is not None]
    answer_rows = spread(with_answer or rows, config.verify_rows)
    answers_to = [prompt_ids(row, tokenizer) for row in answer_rows]
    answers = _answers(stored, tokenizer, answers_to, config, context)
    return Reference(compared, answer_rows, answers_to, answers)


def _answers(
    stored: StoredModel, tokenizer: Any, prompts: list[list[int]], config: GGUFQuantizeConfig, context: StepContext
) -> list[Answer]:
    """What the merged model answers. It is loaded as it is stored: in 16 bits, but for a small one."""
    if not prompts:
        return []
    small = sum(tensor.num_elements for tensor in stored.tensors.values()) < SMALL_MODEL
    merged = load_causal_lm(stored.folder, dtype=torch.float32 if small else stored.dtype)
    with suitable_threads(merged):
        return generate_answers(
            merged,
            tokenizer,
            prompts,
            stop_token_ids=stop_token_ids(tokenizer, stored.folder),
            max_new_tokens=config.max_new_tokens,
            on_progress=lambda done: context.recorder.log_progress(f"merged model: {done} of {len(prompts)} answers"),
        )


def _compare(
    file: WrittenFile,
    quantization: Quantization,
    reference: Reference,
    tokenizer: Any,
    model: Path,
    config: GGUFQuantizeConfig,
    context: StepContext,
) -> tuple[dict[str, float], ChainLink]:
    """What llama.cpp makes of a file, against the merged model."""
    context.recorder.log_progress(f"{quantization} in llama.cpp: distributions")

    def show(done: int) -> None:
        if done % 16 == 0 or done == len(reference.prompts):
            context.recorder.log_progress(f"{quantization} in llama.cpp: {done} of {len(reference.prompts)} answers")

    longest = max(len(prompt) for prompt in (*(one.prompt for one in reference.compared), *reference.prompts))
    num_threads = config.num_threads or (1 if file.num_parameters < SMALL_MODEL else available_cores())
    length = max(longest + config.max_new_tokens, chat_room(tokenizer))
    with serve(file.path, num_threads, length) as server:
        found = compare(
            quantization,
            server,
            reference,
            tokenizer,
            stop_token_ids=stop_token_ids(tokenizer, model),
            max_new_tokens=config.max_new_tokens,
            on_progress=show,
        )
    return found.metrics, found.link


def _check_divergence(quantization: Quantization, kl: float, config: GGUFQuantizeConfig) -> None:
    """Raises: StepError: the file is another model than the merged one."""
    allowed = config.allowed_kl(quantization)
    if not kl <= allowed:
        raise StepError(
            f"gguf-quantize: {quantization} in llama.cpp differs from the merged model by {kl:.3g} nats per token "
            f"(KL; allowed {allowed:g}): choose a type with more bits, imatrix true, or a larger max_kl for it"
        )


def _check_answers(quantization: Quantization, link: ChainLink, config: GGUFQuantizeConfig) -> None:
    """Raises: GateFailedError: beyond chance, the file answers worse than its type may."""
    allowed = config.allowed_points(quantization)
    if link.points_surely_lost > allowed:
        raise GateFailedError(
            f"gguf-quantize: {quantization} loses {-(link.points_change or 0):.1f} points of exact match against the "
            f"merged model on {link.answers} problems, surely {link.points_surely_lost:.1f} (allowed {allowed:g}): "
            "choose a type with more bits, imatrix true, or a larger max_points_lost"
        )


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
    return warnings


def _other_prompts(comparisons: Mapping[str, Mapping[str, float]]) -> list[str]:
    """A line where llama.cpp runs the chat template otherwise than transformers; all files have the same."""
    share = min((metrics.get("chat_prompt_match", 1.0) for metrics in comparisons.values()), default=1.0)
    if share == 1:
        return []
    line = (
        f"of {1 - share:.0%} of the probe chats llama.cpp makes another prompt than the tokenizer's chat template: "
        "render prompts with the tokenizer, or write the template in plainer Jinja"
    )
    return [line]


def _other_tokens(comparisons: Mapping[str, Mapping[str, float]]) -> list[str]:
    """A line where llama.cpp splits held-out prompts otherwise than the tokenizer; all files have the same."""
    share = min((metrics.get("tokenization_match", 1.0) for metrics in comparisons.values()), default=1.0)
    if share == 1:
        return []
    line = (
        f"llama.cpp makes other tokens of {1 - share:.1%} of the texts, as where a tokenizer drops spaces beside its "
        "special tokens: answers to such prompts may differ"
    )
    return [line]


def _fallbacks(quantization: str, file: WrittenFile) -> list[str]:
    """A line per reason for which tensors have another type than the one asked for."""
    halves = {name: change for name, change in file.fallbacks.items() if change == "F16 -> BF16"}
    others = {name: change for name, change in file.fallbacks.items() if name not in halves}
    return [
        f"{quantization}: {len(tensors)} of {sum(file.tensor_types.values())} tensors have {reason} and fall back, "
        f"{next(iter(tensors))} for one: {next(iter(tensors.values()))}"
        for tensors, reason in (
            (halves, "values too large or too small for float16"),
            (others, "rows that are no multiple of the type's block"),
        )
        if tensors
    ]


def _modelfile(gguf_name: str, tokenizer: Any, model: Path) -> str:
    stops = tokenizer.convert_ids_to_tokens(stop_token_ids(tokenizer, model))
    return modelfile(gguf_name, tokenizer, stops, _sampling(model))


def _sampling(model: Path) -> dict[str, float]:
    """The model's recommended values, by the names of llama.cpp and Ollama."""
    generation = read_generation_defaults(model)
    # Both draw tokens unless they are told not to.
    if generation.get("do_sample") is False:
        return {"temperature": 0.0}
    found = {theirs: number_of(generation, name) for name, theirs in _SAMPLING.items()}
    return {name: value for name, value in found.items() if value is not None}


def _write_card(
    output_dir: Path,
    name: str,
    model: Path,
    files: Mapping[str, WrittenFile],
    comparisons: Mapping[str, Mapping[str, float]],
    links: Sequence[ChainLink],
    *,
    is_mixture: bool,
) -> None:
    merge = read_merge(model)
    default_file = list(files.values())[-1].path.name
    serve = llama_cpp_command(default_file, _sampling(model))
    # Attention stays on the GPU: a card of a few GB runs a mixture of many.
    in_host_memory = [("llama.cpp, experts in host memory", f"{serve} --cpu-moe")]
    write_card(
        output_dir,
        title=name,
        base_model=merge.base_model if merge else "",
        form="gguf",
        summary="GGUF files for llama.cpp, Ollama and LM Studio, each compared with the merged model by finemill.",
        commands=[
            ("llama.cpp", serve),
            *(in_host_memory if is_mixture else []),
            ("Ollama", f"ollama create {name.lower()} -f Modelfile"),
        ],
        table={
            file.path.name: {
                "GB": f"{file.size_bytes / 1e9:.3g}",
                "bits per weight": f"{file.bits_per_weight:.2f}",
                "KL, nats per token": f"{comparisons[quantization]['kl']:.2g}",
                **{
                    title: f"{comparisons[quantization][metric]:.1%}"
                    for metric, title in _CARD_RATES.items()
                    if metric in comparisons[quantization]
                },
            }
            for quantization, file in files.items()
        },
        chain=chain_table([*(merge.chain if merge else ()), *links]),
    )


def _write_record(
    output_dir: Path,
    name: str,
    files: Mapping[str, WrittenFile],
    comparisons: Mapping[str, Mapping[str, float]],
    reference: Reference,
    links: Sequence[ChainLink],
    warnings: list[str],
) -> None:
    record = GGUFRecord(
        name=name,
        merged_exact_match=reference.exact_match,
        kl_positions=len(reference.compared),
        answers=len(reference.prompts),
        files={
            quantization: GGUFFileRecord(
                path=file.path.name,
                size_bytes=file.size_bytes,
                num_parameters=file.num_parameters,
                bits_per_weight=round(file.bits_per_weight, 4),
                tensor_types=dict(file.tensor_types),
                fallbacks=dict(file.fallbacks),
                metrics=dict(comparisons[quantization]),
            )
            for quantization, file in files.items()
        },
        chain=tuple(links),
        warnings=tuple(warnings),
    )
    write_gguf_record(output_dir, record)


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
