"""The base that is trained, or that adapters are trained on, in 4, 8 or 16 bits."""

import json
import logging
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from finemill.errors import UserError
from finemill.kernels.engine.expert_layout import expert_shape, has_dense_layers
from finemill.kernels.engine.nf4_quantize import BLOCKSIZE
from finemill.kernels.engine.quantized_experts import quantize_experts
from finemill.models.causal_lm import no_progress_bar
from finemill.models.nf4.config import compute_in, is_quantized
from finemill.training.adapter import decoder_prefix
from finemill.training.config import LoRATrainingConfig
from finemill.training.hollow_base import load_hollow
from finemill.training.mixture import EXPERTS, Mixture
from finemill.training.positions import base_config
from finemill.training.stored_bits import check_stored_bits

logger = logging.getLogger(__name__)

WHOLE_SIZE = {4: 0.5, 8: 0.75, 16: 1.0, 32: 2.0}
"""Bytes of a loaded base per byte of its 16-bit files, by bits per weight; embeddings keep their 16."""


def compute_dtype(config: LoRATrainingConfig, device: torch.device) -> torch.dtype:
    """The dtype of matrix products. On CPUs float32: bfloat16 there is slower at small sizes, and not everywhere."""
    if config.compute_dtype != "auto":
        return {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}[config.compute_dtype]
    if device.type == "cpu":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def load_base(base_model: Path, config: LoRATrainingConfig, device: torch.device) -> PreTrainedModel:
    """Load the base on `device`, linear layers but the output layer, and experts, quantized if that is asked for.

    Weights that are trained themselves are float32: bfloat16 would round small updates to nothing. A base that is cut
    into shards gets its weights then, layer by layer; or, where something is computed with them before, is whole until
    then, on the card where it fits, else in host memory, a copy per process. Its 4-bit weights lie in words of the
    dtype that all shards have.

    Raises: UserError: a base in 4 bits on the disk, and a training that it does not allow.
    """
    model_config = base_config(base_model, config.rope_scaling)
    dtype = compute_dtype(config, device)
    sharded = config.strategy in ("fsdp2", "zero3")
    check_stored_bits(_description(base_model), config, str(base_model))
    in_4_bits = is_quantized(base_model)
    if in_4_bits:
        compute_in(model_config, dtype)
    if device.type == "cuda" and not sharded and not in_4_bits and _has_experts_to_quantize(base_model, config):
        from finemill.kernels.streamed import load_streamed

        # In 16 bits they may not fit the card.
        return load_streamed(
            base_model,
            device=device,
            dtype=dtype,
            double_quant=config.bnb_4bit_use_double_quant,
            resident=True,
            config=model_config,
        )
    quantization: dict[str, Any] = {}
    whole = _whole_layers(model_config) if config.train_router else None
    if config.bits == 8:
        quantization["quantization_config"] = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=whole)
    if config.bits == 4 and not in_4_bits:
        quantization["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=config.bnb_4bit_quant_type,
            bnb_4bit_use_double_quant=config.bnb_4bit_use_double_quant,
            bnb_4bit_compute_dtype=dtype,
            bnb_4bit_quant_storage=dtype if sharded else torch.uint8,
            llm_int8_skip_modules=whole,
        )
    stored_dtype = torch.float32 if config.method == "full" else dtype
    if sharded and not config.needs_whole_base:
        model = load_hollow(base_model, model_config, stored_dtype, quantization.get("quantization_config"))
    else:
        with no_progress_bar():
            model = AutoModelForCausalLM.from_pretrained(
                base_model,
                config=model_config,
                dtype=stored_dtype,
                device_map={"": "cpu" if sharded and not _fits_card(base_model, config, device) else device},
                trust_remote_code=False,
                use_safetensors=True,
                local_files_only=True,
                **quantization,
            )
    keep_trainable_on_cpu(model)
    if config.method == "full":
        _freeze_beside(model)
    if config.train_router:
        _check_routers(model)
    _quantize_experts(model, config, sharded=sharded)
    return model


def _freeze_beside(model: PreTrainedModel) -> None:
    """Leave what rows of text never pass as it is: the parts of a model that see or hear."""
    prefix = decoder_prefix(model)
    kept = {id(parameter) for parameter in model.get_output_embeddings().parameters()}
    for name, parameter in model.named_parameters():
        if not name.startswith(prefix) and id(parameter) not in kept:
            parameter.requires_grad_(False)


def _whole_layers(model_config: Any) -> list[str]:
    """Linear layers that are not quantized where routers are trained: routers, and the output layer as ever."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(model_config)
    output = next(name for name, module in model.named_modules() if module is model.get_output_embeddings())
    return [output, *Mixture.of(model).routers]


def _check_routers(model: PreTrainedModel) -> None:
    """Raises: UserError: a router that is to be trained is quantized already."""
    routers = Mixture.of(model)
    for name, module in model.named_modules():
        if routers.is_router(name) and isinstance(module, bnb.nn.Linear4bit | bnb.nn.Linear8bitLt):
            raise UserError(
                f"train_router: the base model has {name} quantized on the disk: pass the unquantized model, or leave "
                "train_router out"
            )


def memory_limit(config: LoRATrainingConfig, device: torch.device) -> float:
    """Bytes of the card that training may allocate: `memory_gb`, and at most what is free."""
    free, _ = torch.cuda.mem_get_info(device)
    return free if config.memory_gb is None else min(free, config.memory_gb * 2**30)


def _fits_card(base_model: Path, config: LoRATrainingConfig, device: torch.device) -> bool:
    """Whether a card holds the whole base, as it is loaded, until it is cut into shards."""
    if device.type != "cuda":
        return False
    stored = sum(file.stat().st_size for file in base_model.glob("*.safetensors"))
    return WHOLE_SIZE[config.bits if config.method == "lora" else 32] * stored <= 0.9 * memory_limit(config, device)


def _description(base_model: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((base_model / "config.json").read_text(encoding="utf-8"))
    return values


def _has_experts_to_quantize(base_model: Path, config: LoRATrainingConfig) -> bool:
    """Whether the base is a mixture that the engine's loader quantizes layer by layer."""
    model = _description(base_model)
    experts = expert_shape(model)
    nf4 = config.bits == 4 and config.bnb_4bit_quant_type == "nf4"
    if not nf4 or experts is None or has_dense_layers(model):
        return False
    return bool(model["hidden_size"] % BLOCKSIZE == experts.intermediate % BLOCKSIZE == 0)


def _quantize_experts(model: torch.nn.Module, config: LoRATrainingConfig, *, sharded: bool) -> None:
    """Quantize a mixture's experts, which bitsandbytes leaves as they are, or say why they stay."""
    layers = [module for name, module in model.named_modules() if name.endswith(f".{EXPERTS}")]
    if config.bits == 16 or not layers:
        return
    kind = config.bnb_4bit_quant_type if config.bits == 4 else "LLM.int8"
    reason = f"{kind} is for linear layers, and transformers keeps a layer's experts as one parameter"
    if sharded:
        reason = f"strategy {config.strategy} cuts them into shards"
    elif kind == "nf4":
        try:
            for experts in layers:
                quantize_experts(experts, double_quant=config.bnb_4bit_use_double_quant)
            return
        except ValueError as error:
            reason = str(error)
    logger.warning("the base's experts stay as they are, unquantized: %s", reason)


def keep_trainable_on_cpu(model: torch.nn.Module) -> None:
    """Keep bitsandbytes from repacking 4-bit weights on CPUs with AVX512-BF16.

    There the first forward pass in eval mode without gradients repacks the weights in place for a faster kernel. That
    kernel has no autograd and `dequantize()` does not know the new order: training after any evaluation would go on
    with wrong gradients and without a word (bitsandbytes 0.50).
    """
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False
