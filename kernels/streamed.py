"""Load a transformers model whose NF4 weights wait in pinned host memory, for cards that cannot hold the base.

`load_streamed` gives the same model as `from_pretrained` with a `BitsAndBytesConfig`: the same modules, the same codes.
But a weight goes to the host as soon as it is quantized, so that the device never holds more than two layers of the
base, and each `Linear4bit` looks at the slot that its layer visits (engine/weight_stream.py). Before a layer's own
forward a hook fetches its weights: evaluation and generation run as ever, a layer's copy behind the layer before.
Training is the engine's: autograd of the model's own layers would read slots that hold other layers by then.
"""

from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_module_tensor_to_device
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedConfig, PreTrainedModel
from transformers.quantizers import AutoHfQuantizer

from finemill.errors import UserError
from finemill.kernels.engine.load import stream_tensors
from finemill.kernels.engine.model import LINEARS
from finemill.kernels.engine.weight_stream import WeightStream
from finemill.kernels.ops.nf4 import NF4Tensor


def load_streamed(
    path: Path,
    *,
    device: torch.device,
    dtype: torch.dtype = torch.bfloat16,
    double_quant: bool = True,
    config: PreTrainedConfig | None = None,
) -> PreTrainedModel:
    """Load a checkpoint of the Llama family, its seven linear layers in NF4 and in host memory.

    Args:
        path: folder with config.json and safetensors files.
        device: where to compute; embedding, norms and output layer go there.
        dtype: of what is not quantized, and of products.
        double_quant: quantize the quantization constants too.
        config: in place of the folder's own.
    Raises: UserError: the checkpoint lacks a tensor of the model.
    """
    if config is None:
        config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    config.dtype = dtype
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_compute_dtype=dtype,
    )
    quantizer = AutoHfQuantizer.from_config(quantization)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        quantizer.preprocess_model(model=model, device_map={"": device})
    # Its frequencies are computed, not loaded.
    model.model.rotary_emb = type(model.model.rotary_emb)(config=config).to(device)
    _load_tensors(model, path, device, dtype)
    model.tie_weights()
    quantizer.postprocess_model(model)
    model.hf_quantizer = quantizer
    model.hf_device_map = {"": device}
    model.requires_grad_(False)
    loaded: PreTrainedModel = model.eval()
    return loaded


def weight_stream_of(causal: Any) -> WeightStream | None:
    """The stream of a model whose weights wait in host memory."""
    stream: WeightStream | None = getattr(causal, "_finemill_stream", None)
    return stream


def attach_stream(causal: Any, stream: WeightStream, layers: list[list[NF4Tensor]]) -> None:
    """Let every quantized layer of a model look at its slot, and fetch it before the layer's own forward.

    Args:
        causal: the transformers model.
        stream: holds the weights.
        layers: what its `put` returned, the seven of each layer in the order of `LINEARS`.
    """
    causal._finemill_stream = stream
    causal._finemill_hooks = [
        layer.register_forward_pre_hook(_fetch(stream, index)) for index, layer in enumerate(causal.model.layers)
    ]
    for layer, weights in zip(causal.model.layers, layers, strict=True):
        for linear, weight in zip(quantized_linears(layer), weights, strict=True):
            point_at(linear.weight, weight)


def detach_stream(causal: Any) -> None:
    """Bring the weights back to the device, for good."""
    stream = weight_stream_of(causal)
    if stream is None:
        return
    for index, layer in enumerate(causal.model.layers):
        linears = quantized_linears(layer)
        weights = stream.take(index, [NF4Tensor.from_bitsandbytes(linear.weight) for linear in linears])
        for linear, weight in zip(linears, weights, strict=True):
            point_at(linear.weight, weight)
    for hook in causal._finemill_hooks:
        hook.remove()
    del causal._finemill_stream, causal._finemill_hooks


def quantized_linears(layer: nn.Module) -> list[Any]:
    """A decoder layer's seven linear layers below their adapters, in the order of `LINEARS`."""
    attention, mlp = layer.self_attn, layer.mlp
    found = (getattr(attention, name, None) or getattr(mlp, name) for name in LINEARS)
    return [getattr(linear, "base_layer", linear) for linear in found]


def point_at(parameter: Any, weight: NF4Tensor) -> None:
    """Let a `Params4bit` and its quantization state share the memory of `weight`."""
    state = parameter.quant_state
    parameter.data = weight.packed.view(parameter.data.dtype).view(parameter.data.shape)
    state.absmax = weight.absmax
    if weight.nested_absmax is not None:
        state.state2.absmax = weight.nested_absmax


def _fetch(stream: WeightStream, index: int) -> Any:
    def fetch(*_: Any) -> None:
        if index == 0:
            stream.begin()
        stream.wait(index)
        stream.prefetch(index + 1)

    return fetch


def _load_tensors(model: Any, path: Path, device: torch.device, dtype: torch.dtype) -> None:
    """Fill the model, layer by layer: quantize what is quantized, and send a layer to the host when it is complete."""
    from bitsandbytes.nn import Linear4bit

    waiting: dict[int, dict[str, Any]] = {}
    stream: WeightStream | None = None
    visits: dict[int, list[NF4Tensor]] = {}
    # A tied output layer is not among them.
    missing = {name for name, _ in model.named_parameters()}
    for name, tensor in stream_tensors(path, device, order=_layer_first):
        if name not in missing:
            continue
        missing.remove(name)
        module_name, _, leaf = name.rpartition(".")
        module = model.get_submodule(module_name)
        if leaf == "weight" and isinstance(module, Linear4bit):
            module.weight = _quantize(module.weight, tensor.to(dtype))
            layer = int(name.split(".")[2])
            waiting.setdefault(layer, {})[module_name.rpartition(".")[2]] = module.weight
            if len(waiting[layer]) == len(LINEARS):
                done = waiting.pop(layer)
                weights = [NF4Tensor.from_bitsandbytes(done[linear]) for linear in LINEARS]
                stream = stream or WeightStream(weights, len(model.model.layers), device)
                visits[layer] = stream.put(layer, weights)
                for linear, weight in zip(LINEARS, visits[layer], strict=True):
                    point_at(done[linear], weight)
        else:
            set_module_tensor_to_device(model, name, device, value=tensor.to(dtype))
    if missing:
        raise UserError(f"the checkpoint in {path} lacks {len(missing)} tensors, {min(missing)} for one")
    if stream is not None:
        attach_stream(model, stream, [visits[layer] for layer in range(len(visits))])


def _quantize(old: Any, tensor: Tensor) -> Any:
    from bitsandbytes.nn import Params4bit

    return Params4bit(tensor, requires_grad=False, **old.__dict__).to(tensor.device)


def _layer_first(name: str) -> tuple[int, str]:
    """Order of loading: layer by layer, so that few are incomplete at once; what belongs to no layer first."""
    parts = name.split(".")
    return (int(parts[2]) if parts[:2] == ["model", "layers"] else -1, name)
