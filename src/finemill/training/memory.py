"""How much GPU memory a training step of LoRA adapters takes, from the model's shapes alone, without torch.

Where finemill's kernels run, their planner says what is needed at least, and fits a step into any limit above that. On
the plain path layer inputs kept for recompute are counted, one layer's activations, and whole logits, of every sequence
of a batch: a pair of `train-dpo` is two. Measured with Hugging Face's trainer, Qwen3-8B at 2 x 2048 tokens takes
16.7 GB and Qwen3-0.6B 10.2 GB; this says 17.2 and 9.8.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from finemill.errors import UserError
from finemill.kernels.planning.from_config import is_planned, workload_of_config
from finemill.kernels.planning.planner import NoPlanError, least_bytes, plan_step, prefers_shards
from finemill.kernels.planning.workload import Workload
from finemill.training.config import SHARDED, TABLES, LoRATrainingConfig
from finemill.training.decoder import Decoder, UnknownDecoderError

GIB = 2.0**30
# Bits per weight: 4, and a float32 constant per 64 weights; doubly quantized 8 bits per 64 and 32 per 16384.
NF4_BITS, NF4_DOUBLE_BITS = 4 + 32 / 64, 4 + 8 / 64 + 32 / (64 * 256)
# Logits in 16 bits, their float32 copy, and the gradients of both.
LOGIT_BYTES = 2 + 4 + 4 + 4
# Weights that FSDP2 gathers and reduces at once: a few GB, in the time that Python takes to launch it layer by layer.
AT_ONCE = 2e9
# What a training process takes of a container's memory beside its plan, and how much of the rest may be page-locked.
PROCESS_GIB, FREE_SHARE = 3.0, 0.9
# float32 weight and gradient.
ADAPTER_BYTES = 4 + 4
EXPERT_NAMES = ("gate_proj", "up_proj", "down_proj", "gate_up_proj")
"""Names in `target_modules` that experts answer to, too."""
Matrices = list[tuple[int, int]]
"""Rows and columns of each."""


@dataclass(frozen=True)
class MemoryEstimate:
    """GiB of one GPU at the peak of a step, by cause."""

    weights: float
    adapters: float
    activations: float
    logits: float

    @property
    def total(self) -> float:
        """Their sum; CUDA's own context (about 0.6 GiB) comes on top."""
        return self.weights + self.adapters + self.activations + self.logits


def estimate_memory(model: Mapping[str, Any], config: LoRATrainingConfig) -> MemoryEstimate:
    """Estimate the peak of one training step.

    Args:
        model: the base's config.json, `complete`.
        config: batch, length, rank and quantization.
    Raises: UnknownDecoderError: a width is not in config.json.
    """
    shape = Decoder.of(model)
    width, experts = shape.hidden, shape.experts
    attention = [(width, shape.queries), (width, shape.keys), (width, shape.keys), (shape.queries, width)]
    dense = [(width, shape.inner)] * (shape.matrices - 1) + [(shape.inner, width)]
    mixed, shared = _mixture(shape)
    sparse_layers = shape.layers - shape.dense_layers
    layers = [(shape.layers, attention), (shape.dense_layers, dense), (sparse_layers, shared), (sparse_layers, mixed)]
    *linear, stacked = (count * sum(rows * columns for rows, columns in pairs) for count, pairs in layers)
    adapted = [config.target_modules != "mlp", *[config.target_modules != "attention"] * 2, _adapts_experts(config)]
    adapters = config.lora_r * sum(
        count * sum(rows + columns for rows, columns in pairs)
        for (count, pairs), is_adapted in zip(layers, adapted, strict=True)
        if is_adapted
    )
    tables = shape.vocabulary * width * (1 if shape.tied else 2)
    nf4 = NF4_DOUBLE_BITS if config.bnb_4bit_use_double_quant else NF4_BITS
    saved = sum(name.rpartition(".")[2] in TABLES for name in config.modules_to_save)
    bits, trained = {4: nf4, 8: 8, 16: 16}[config.bits], adapters + saved * shape.vocabulary * width
    # bitsandbytes has nothing for a layer's experts in one parameter, of which the kernels' loader makes NF4.
    stack_bits = bits if config.bits == 4 and config.bnb_4bit_quant_type == "nf4" else 16
    weights = (sum(linear) * bits + stacked * stack_bits) / 8 + 2 * tables
    if config.method == "full":
        trained = sum(linear) + stacked + tables
        weights = ADAPTER_BYTES / 2 * trained if config.keeps_reference else 0
    row = -(-config.max_length // config.processes_per_row)
    tokens = config.per_device_train_batch_size * config.sequences_per_row * row
    inner = shape.inner if experts is None else experts.width * experts.per_token + experts.shared
    # Inside a layer: inputs of the norms and projections, queries, keys, values, and the MLP's three wide tensors.
    inside = tokens * (6 * width + 3 * shape.queries + 2 * shape.keys + 4 * inner) * 2
    if experts is not None:
        # A layer's experts decoded, the same with adapters added, twice where PEFT tries them; rows of experts.
        decoded = sum(rows * columns for rows, columns in mixed)
        inside += 3 * 2 * decoded + tokens * experts.per_token * 3 * width * 2
    kept = tokens * width * 2 * shape.layers if config.gradient_checkpointing else inside * (shape.layers - 1)
    return MemoryEstimate(
        weights=weights / GIB,
        adapters=trained * (ADAPTER_BYTES + _moment_bytes(config)) / GIB,
        activations=(kept + inside) / GIB,
        logits=tokens * shape.vocabulary * LOGIT_BYTES / GIB,
    )


def _mixture(shape: Decoder) -> tuple[Matrices, Matrices]:
    """Matrices of a layer's experts, gate and up in one, and of what all tokens pass beside them."""
    if shape.experts is None:
        return [], []
    width, wide, shared = shape.hidden, shape.experts.width, shape.experts.shared
    return [(width, 2 * wide), (wide, width)] * shape.experts.count, [(width, shared)] * 2 + [(shared, width)]


def _adapts_experts(config: LoRATrainingConfig) -> bool:
    """Whether the experts of a mixture get adapters."""
    if isinstance(config.target_modules, str):
        return config.target_modules != "attention"
    return any(name.rpartition(".")[2] in EXPERT_NAMES for name in config.target_modules)


def _moment_bytes(config: LoRATrainingConfig) -> int:
    """What the optimizer keeps per trained weight on the card: one or two moments of 1 or 4 bytes."""
    name = config.optim
    if name == "adafactor" or name.startswith("paged"):
        return 0
    return (1 if "lion" in name else 2) * (1 if "8bit" in name else 4)


def eight_bit_moments(config: LoRATrainingConfig) -> bool | None:
    """Whether the moments have 8 bits on the kernels, as `optim` names it; None where memory decides."""
    return None if config.optim == "auto" and not config.loraplus_lr_ratio else "8bit" in config.optim


def not_on_kernels(config: LoRATrainingConfig) -> str | None:
    """What of the configuration the kernels do not cover; None if they run whatever it says."""
    reasons = {
        "kernels is 'off'": config.kernels == "off",
        f"strategy is '{config.strategy}'": config.strategy in SHARDED,
        f"context_parallel is {config.processes_per_row}": config.processes_per_row > 1,
    }
    return next((reason for reason, applies in reasons.items() if applies), config.beyond_kernels())


def covered_workload(model: Mapping[str, Any], config: LoRATrainingConfig) -> Workload | None:
    """The step as the kernels' planner sees it; None where they do not run.

    Args:
        model: the base's config.json, `complete`.
        config: what is trained, and how.
    Raises: UnknownDecoderError: config.json lacks a field.
    """
    known = is_planned(model) and config.compute_dtype in ("auto", "bfloat16")
    if not known or not_on_kernels(config):
        return None
    row = config.max_length
    rows = config.per_device_train_batch_size * config.sequences_per_row
    if not config.whole_passes:
        rows *= config.gradient_accumulation_steps
    try:
        return workload_of_config(
            model,
            rank=config.lora_r,
            quantized=config.bits == 4,
            tokens=rows * row,
            row=row,
            ragged=True,
            whole=config.whole_passes,
            expert_rank=config.lora_r if _adapts_experts(config) else 0,
        )
    except KeyError as error:
        raise UnknownDecoderError(f"the base model's config.json has no {error}") from None


def needed_gib(model: Mapping[str, Any], config: LoRATrainingConfig, *, host_gib: float | None = None) -> float:
    """GiB that a card must have for this training: on the kernels their leanest plan, elsewhere the plain step.

    Args:
        model: the base's config.json, `complete`.
        config: what is trained, and how.
        host_gib: memory of the container, in which plans may have weights and activations wait; None for any.
    Raises: UnknownDecoderError: a width is not in config.json.
    """
    plain = estimate_memory(model, config).total
    work = covered_workload(model, config)
    if work is None:
        return plain
    host = None if host_gib is None else int(max(0.0, host_gib - PROCESS_GIB) * GIB * FREE_SHARE)
    least = least_bytes(work, allow_stream=work.quantized, eight_bit=eight_bit_moments(config), host=host)
    if model.get("quantization_config"):
        # It comes to the card as it is stored, before anything of it may wait elsewhere.
        least = max(least, work.loading_bytes())
    return min(plain, least / GIB)


def takes_shards(model: Mapping[str, Any], config: LoRATrainingConfig, limit: float, shards: int) -> bool:
    """Whether a 4-bit base that does not fit a card trains faster in parts on several than from host memory.

    Args:
        model: the base's config.json, `complete`.
        config: what is trained, and how.
        limit: bytes that training may allocate on a card.
        shards: GPUs of the host.
    """
    work = None if model.get("quantization_config") else covered_workload(model, config)
    return work is not None and prefers_shards(work, int(limit), shards, eight_bit=eight_bit_moments(config))


def sharded_gib(model: Mapping[str, Any], config: LoRATrainingConfig, processes: int) -> float:
    """GiB that a card must have where weights, gradients and moments are cut into shards, on the plain path."""
    part = estimate_memory(model, config)
    # Of the base a layer is whole at a time, and the next one on its way.
    share = min(1.0, 1 / processes + 2 / int(model["num_hidden_layers"]))
    return part.weights * share + part.adapters / processes + part.activations + part.logits


def fits_without_recompute(model: Mapping[str, Any], config: LoRATrainingConfig, limit: float, processes: int) -> bool:
    """Whether a card holds all activations of the plain path, and whole weights, with a tenth of it to spare.

    Not where the family's memory cannot be estimated.

    Args:
        model: the base's config.json, `complete`.
        config: what is trained, and how, with a strategy that is settled.
        limit: bytes that training may allocate.
        processes: how many share it.
    """
    kept = config.model_copy(update={"gradient_checkpointing": False})
    try:
        part = estimate_memory(model, kept)
    except UnknownDecoderError:
        return False
    needed = part.total
    if config.strategy in SHARDED:
        # Weights and gradients that are whole in 16 bits beside the shards, of what is trained; gathered at once twice.
        whole = 3 / 8 if in_one_piece(model, config) else 1 / 4
        needed += part.adapters * (1 / processes + whole - 1)
    return needed * GIB <= 0.9 * limit


def in_one_piece(model: Mapping[str, Any], config: LoRATrainingConfig) -> bool:
    """Whether FSDP2 gathers the whole model at once where a card holds it: full fine-tuning of a small one.

    Args:
        model: the base's config.json, `complete`.
        config: what is trained, and how.
    """
    trained = estimate_memory(model, config).adapters * GIB / (ADAPTER_BYTES + _moment_bytes(config))
    return config.strategy == "fsdp2" and config.method == "full" and trained <= AT_ONCE


def must_stream(model: Mapping[str, Any], config: LoRATrainingConfig, limit: float, *, host: int | None = None) -> bool:
    """Decide before anything is loaded whether the base's layers have to wait in host memory.

    Args:
        model: the base's config.json, `complete`.
        config: what is trained, and how.
        limit: bytes that training may allocate.
        host: bytes of host memory that plans may take; None for any.
    Raises: UserError: not even the kernels' leanest plan fits, and the plain path takes more.
    """
    work = covered_workload(model, config)
    if work is None or (plain := estimate_memory(model, config).total * GIB) < limit:
        return False
    try:
        plan_step(work, int(limit), allow_stream=work.quantized, eight_bit=eight_bit_moments(config), host=host)
    except NoPlanError as error:
        beside = "" if host is None else f" beside {host / GIB:.1f} of host memory"
        raise UserError(
            f"training needs {error.allowance / GIB:.2f} GiB of GPU memory{beside} ({plain / GIB:.1f} without "
            f"finemill's kernels), there are {limit / GIB:.2f}: lower max_length ({config.max_length}) or lora_r "
            f"({config.lora_r}), or give more in memory_gb"
        ) from None
    return work.quantized and work.loading_bytes() > limit
