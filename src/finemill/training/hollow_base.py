"""A base without its weights until it is cut into shards: a process reads a layer, keeps its share and reads the next.

No process ever holds more of a base than its share and one layer: on its card, or in host memory, where shards wait
there or there is no card.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from bitsandbytes.nn import Params4bit
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed import fsdp
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel, Trainer, TrainingArguments
from transformers.quantizers import AutoHfQuantizer

from finemill.models.stored_model import StoredModel
from finemill.models.streaming import loaded_together


class HollowBase:
    """What a hollow model's parameters will hold.

    Args:
        stored: the base's files.
        model: its parameters are replaced by single numbers, each seen in its parameter's shape.
    """

    def __init__(self, stored: StoredModel, model: PreTrainedModel) -> None:
        self._stored = stored
        self._checkpoint: Path | None = None
        hollow: dict[int, nn.Parameter] = {}
        # Kept beside its name: an identity only holds while nothing else takes a parameter's address.
        self._waiting: dict[int, tuple[nn.Parameter, str]] = {}
        for path, module in model.named_modules():
            for name, parameter in module._parameters.items():
                if parameter is None:
                    continue
                if id(parameter) not in hollow:
                    made = hollow[id(parameter)] = _hollow(parameter)
                    self._waiting[id(made)] = made, f"{path}.{name}".lstrip(".")
                module._parameters[name] = hollow[id(parameter)]

    def begin_from(self, checkpoint: Path) -> None:
        """Read weights from a checkpoint's safetensors file, whose names are the model's, and not from the base."""
        self._checkpoint = checkpoint

    def fill(self, module: nn.Module, device: torch.device) -> None:
        """Give the parameters of a module their values, those that have none yet; what is quantized, quantized."""
        for parameter in module.parameters():
            _, name = self._waiting.pop(id(parameter), (None, None))
            if name is None:
                continue
            values = self._read(name, device, parameter.dtype)
            parameter.data = values
            if isinstance(parameter, Params4bit):
                parameter._quantize(device)

    def _read(self, name: str, device: torch.device, dtype: torch.dtype) -> Tensor:
        if self._checkpoint is not None:
            with safe_open(self._checkpoint, framework="pt") as file:
                saved: Tensor = file.get_tensor(name).to(device, dtype, copy=True)
            return saved
        shape = self._stored.model.get_parameter(name).shape
        parts = self._stored.parts(name, widen=False)
        if len(shape) != 3:
            return next(parts).to(device, dtype, copy=True)
        stack = torch.empty(shape, device=device, dtype=dtype)
        for expert, part in enumerate(parts):
            stack[expert].copy_(part)
        return stack


def load_hollow(
    base_model: Path, config: Any, dtype: torch.dtype, quantization: BitsAndBytesConfig | None
) -> PreTrainedModel:
    """transformers' model of a folder, without its weights.

    Args:
        base_model: folder with config.json and safetensors files.
        config: transformers' configuration, in place of the folder's own.
        dtype: of weights.
        quantization: what linear layers but the output layer will be; None for `dtype`.
    Raises: UserError: as `StoredModel`.
    """
    stored = StoredModel(base_model)
    # A head of its own beside an embedding that config.json ties to it.
    for part in (config, config.get_text_config()):
        part.tie_word_embeddings = stored.is_tied
    with init_empty_weights(include_buffers=False):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
    if quantization is not None:
        quantizer = AutoHfQuantizer.from_config(quantization)
        quantizer.preprocess_model(model=model, device_map=None)
        quantizer.postprocess_model(model)
        model.hf_quantizer = quantizer
    model.tie_weights()
    _load_buffers(model, stored, dtype)
    model._finemill_hollow = HollowBase(stored, model)
    return model.eval()


def _load_buffers(model: PreTrainedModel, stored: StoredModel, dtype: torch.dtype) -> None:
    """Read the buffers, which no shard has; a correction of a router's choice as float32, as transformers does."""
    plan = model._get_dtype_plan(dtype)
    for path, module in model.named_modules():
        for name, buffer in module._buffers.items():
            if (key := f"{path}.{name}".lstrip(".")) in stored.group_of:
                module._buffers[name] = stored.read(key).to(plan.get(name, buffer.dtype))


def hollow_base_of(model: Any) -> HollowBase | None:
    """What a model, or the base below its adapters, is filled from; None of one that was loaded whole."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    hollow: HollowBase | None = getattr(base, "_finemill_hollow", None)
    return hollow


def _hollow(parameter: nn.Parameter) -> nn.Parameter:
    single = torch.zeros(1, dtype=parameter.dtype).expand(parameter.shape)
    if isinstance(parameter, Params4bit):
        made: nn.Parameter = Params4bit(single, requires_grad=False, **parameter.__dict__)
        return made
    return nn.Parameter(single, requires_grad=parameter.requires_grad)


@contextmanager
def filled_as_cut(trainer: Trainer) -> Iterator[None]:
    """Fill a trainer's hollow base inside the block, in which its model is cut into shards."""
    model, device = trainer.model, trainer.args.device
    hollow = hollow_base_of(model)
    if hollow is None:
        yield
        return
    if trainer.is_deepspeed_enabled:
        plugin = trainer.accelerator.deepspeed_plugin
        if plugin.zero_stage == 3:
            _cut_for_zero3(model, hollow, trainer.args, plugin.deepspeed_config["zero_optimization"])
        yield
    else:
        with _filling_for_fsdp2(hollow, device):
            yield
    hollow.fill(model, device)  # what the strategy leaves whole


@contextmanager
def _filling_for_fsdp2(hollow: HollowBase, device: torch.device) -> Iterator[None]:
    """Fill each module right before FSDP2 cuts it."""
    place: Any = fsdp  # from where Accelerate takes the function
    cut = place.fully_shard

    def fill_and_cut(modules: nn.Module | Sequence[nn.Module], **options: Any) -> Any:
        for module in [modules] if isinstance(modules, nn.Module) else modules:
            hollow.fill(module, device)
        return cut(modules, **options)

    place.fully_shard = fill_and_cut
    try:
        yield
    finally:
        place.fully_shard = cut


def _cut_for_zero3(model: nn.Module, hollow: HollowBase, args: TrainingArguments, zero: Mapping[str, Any]) -> None:
    """Fill a model with its adapters and cut it as DeepSpeed does, which takes weights of one dtype."""
    import deepspeed

    dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32
    settings = {name: value for name, value in zero.items() if value != "auto"}
    # The size of a batch has no part in it, but is asked for.
    described = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": settings}
    for unit in loaded_together(model):
        hollow.fill(unit, args.device)
        for parameter in unit.parameters():
            if not hasattr(parameter, "ds_id"):
                parameter.data = parameter.data.to(dtype)
        deepspeed.zero.Init(module=unit, config_dict_or_path=described, dtype=dtype)
    for module in model.modules():
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else buffer.to(args.device)
