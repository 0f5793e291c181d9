"""Load a transformers model whose NF4 weights wait in host memory or on several GPUs, for cards that cannot hold them.

`load_streamed` gives the model that `from_pretrained` gives with a `BitsAndBytesConfig`: the same modules and codes;
experts of a mixture are quantized, too (engine/quantized_experts.py), a layer at a time, so that they need not fit the
card in 16 bits. A layer goes to where it waits as soon as it is quantized, pinned host memory or a part on every GPU of
the host (engine/weight_shards.py): the device never holds more than two whole ones, and each `Linear4bit` looks at the
slot that its layer visits (engine/weight_stream.py). Before a layer's own forward a hook fetches its weights:
evaluation and generation run as ever, a layer's copy behind the layer before. Training is the engine's: autograd of the
model's own layers would read slots that hold other layers by then.
"""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_module_tensor_to_device
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedConfig, PreTrainedModel
from transformers.quantizers import AutoHfQuantizer

from finemill.errors import UserError
from finemill.kernels.engine.expert_layout import EXPERT_STACKS, expert_shape
from finemill.kernels.engine.load import stream_tensors
from finemill.kernels.engine.load_experts import ExpertReader
from finemill.kernels.engine.model import ATTENTION, LINEARS
from finemill.kernels.engine.quantized_experts import attach_stacks, quantized_stacks
from finemill.kernels.engine.weight_shards import WeightShards
from finemill.kernels.engine.weight_stream import WeightStream
from finemill.kernels.ops.nf4 import NF4Tensor
from finemill.kernels.ops.nf4_stack import NF4Stack


def load_streamed(
    path: Path,
    *,
    device: torch.device,
    dtype: torch.dtype = torch.bfloat16,
    double_quant: bool = True,
    resident: bool = False,
    shards: WeightShards | None = None,
    config: PreTrainedConfig | None = None,
) -> PreTrainedModel:
    """Load a checkpoint of the Llama family, its linear layers and experts in NF4 and away from the device.

    Args:
        path: folder with config.json and safetensors files.
        device: where to compute; embedding, norms and output layer go there.
        dtype: of what is not quantized, and of products.
        double_quant: quantize the quantization constants too.
        resident: leave the weights on the device.
        shards: divide them among GPUs, in place of the host's memory; all processes load at the same time.
        config: in place of the folder's own.
    Raises: UserError: the checkpoint lacks a tensor of the model, or has experts that config.json has not.
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
    _load_tensors(model, path, device, dtype, double_quant=double_quant, resident=resident, shards=shards)
    model.tie_weights()
    quantizer.postprocess_model(model)
    model.hf_quantizer = quantizer
    model.hf_device_map = {"": device}
    model.requires_grad_(False)
    loaded: PreTrainedModel = model.eval()
    return loaded


def weight_stream_of(causal: Any) -> WeightStream | None:
    """The stream of a model whose weights wait in host memory or on several GPUs."""
    stream: WeightStream | None = getattr(causal, "_finemill_stream", None)
    return stream


def attach_stream(causal: Any, stream: WeightStream, layers: list[list[NF4Tensor | NF4Stack]]) -> None:
    """Let every quantized layer of a model look at its slot, and fetch it before the layer's own forward.

    Args:
        causal: the transformers model.
        stream: holds the weights.
        layers: what its `put` returned, of each layer in the order of `layer_weights`.
    """
    causal._finemill_stream = stream
    causal._finemill_hooks = [
        layer.register_forward_pre_hook(_fetch(stream, index)) for index, layer in enumerate(causal.model.layers)
    ]
    point_model_at(causal, layers)


def point_model_at(causal: Any, layers: Sequence[Sequence[NF4Tensor | NF4Stack]]) -> None:
    """Let all decoder layers share the memory of such weights."""
    for layer, weights in zip(causal.model.layers, layers, strict=True):
        point_layer_at(layer, weights)


def detach_stream(causal: Any) -> None:
    """Bring the weights back to the device, for good."""
    stream = weight_stream_of(causal)
    if stream is None:
        return
    for index, layer in enumerate(causal.model.layers):
        point_layer_at(layer, stream.take(index, layer_weights(layer)))
    for hook in causal._finemill_hooks:
        hook.remove()
    del causal._finemill_stream, causal._finemill_hooks


def release_shards(model: Any) -> None:
    """Let go what processes read of each other's parts, at the end of a training: the model can run no more.

    A collective of all processes that share a divided base.

    Args:
        model: the base, or adapters on it.
    """
    stream = weight_stream_of(model.get_base_model() if hasattr(model, "get_base_model") else model)
    if stream is not None and stream.shards is not None:
        stream.shards.close()


def quantized_linears(layer: nn.Module) -> list[Any]:
    """A decoder layer's linear layers below their adapters, in the order of `LINEARS`: of a mixture, attention's."""
    attention, mlp = layer.self_attn, layer.mlp
    names = ATTENTION if hasattr(mlp, "experts") else LINEARS
    found = (getattr(attention, name, None) or getattr(mlp, name) for name in names)
    return [getattr(linear, "base_layer", linear) for linear in found]


def layer_weights(layer: nn.Module) -> list[NF4Tensor | NF4Stack]:
    """All NF4 weights of a decoder layer, in the order of the engine's."""
    linears = [NF4Tensor.from_bitsandbytes(linear.weight) for linear in quantized_linears(layer)]
    return [*linears, *_stacks(layer).values()]


def point_layer_at(layer: nn.Module, weights: Sequence[NF4Tensor | NF4Stack]) -> None:
    """Let a decoder layer share the memory of such weights."""
    linears, stacks = quantized_linears(layer), _stacks(layer)
    for linear, weight in zip(linears, weights, strict=False):
        assert isinstance(weight, NF4Tensor)
        point_at(linear.weight, weight)
    for name, stack in zip(stacks, weights[len(linears) :], strict=True):
        assert isinstance(stack, NF4Stack)
        stacks[name] = stack


def _stacks(layer: Any) -> dict[str, NF4Stack]:
    """The NF4 matrices of a layer's experts by parameter."""
    experts = getattr(layer.mlp, "experts", None)
    return {} if experts is None else quantized_stacks(getattr(experts, "get_base_layer", lambda: experts)())


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
        stream.visit(index)

    return fetch


def _load_tensors(
    model: Any,
    path: Path,
    device: torch.device,
    dtype: torch.dtype,
    *,
    double_quant: bool,
    resident: bool,
    shards: WeightShards | None,
) -> None:
    """Fill the model, layer by layer: quantize what is quantized, and send a layer away when it is complete."""
    from bitsandbytes.nn import Linear4bit

    layers, mixture = model.model.layers, expert_shape(model.config.to_dict())
    hidden = model.config.hidden_size
    reader = ExpertReader(mixture, hidden, device, dtype, quantize=True, double_quant=double_quant) if mixture else None
    done, stream, visits = Counter[int](), None, {}
    # A tied output layer is not among them.
    missing = {name for name, _ in model.named_parameters()}
    for name, tensor in stream_tensors(path, device, order=_layer_first):
        module_name, _, leaf = name.rpartition(".")
        if reader is not None and reader.take(name, tensor):
            if not reader.is_complete(layer := _layer_first(name)[0]):
                continue
            missing -= _put_mixture(layers[layer].mlp, f"model.layers.{layer}.mlp.", reader)
        elif name not in missing:
            continue
        else:
            missing.remove(name)
            module = model.get_submodule(module_name)
            if not (leaf == "weight" and isinstance(module, Linear4bit)):
                set_module_tensor_to_device(model, name, device, value=tensor.to(dtype))
                continue
            module.weight = _quantize(module.weight, tensor.to(dtype))
            layer = _layer_first(name)[0]
        done[layer] += 1
        if done[layer] == len(quantized_linears(layers[layer])) + (reader is not None) and not resident:
            weights = layer_weights(layers[layer])
            stream = stream or WeightStream(weights, len(layers), device, shards)
            visits[layer] = stream.put(layer, weights)
            point_layer_at(layers[layer], visits[layer])
    if reader is not None:
        reader.check_complete()
    if missing:
        raise UserError(f"the checkpoint in {path} lacks {len(missing)} tensors, {min(missing)} for one")
    if stream is not None:
        if shards is not None:
            shards.connect()
        attach_stream(model, stream, [visits[layer] for layer in range(len(visits))])


def _put_mixture(mlp: Any, prefix: str, reader: ExpertReader) -> set[str]:
    """Fill a layer's experts and router. Returns: the names of their parameters."""
    mixture = reader.layer(int(prefix.split(".")[2]))
    assert mixture is not None
    stacks = {
        name.rpartition(".")[2]: stack
        for name, stack in zip(EXPERT_STACKS, mixture.stacks, strict=True)
        if isinstance(stack, NF4Stack)
    }
    attach_stacks(mlp.experts, stacks)
    mlp.gate.weight = nn.Parameter(mixture.router, requires_grad=False)
    return {prefix + name for name in (*EXPERT_STACKS, "gate.weight")}


def _quantize(old: Any, tensor: Tensor) -> Any:
    from bitsandbytes.nn import Params4bit

    return Params4bit(tensor, requires_grad=False, **old.__dict__).to(tensor.device)


def _layer_first(name: str) -> tuple[int, str]:
    """Order of loading: layer by layer, so that few are incomplete at once; what belongs to no layer first."""
    parts = name.split(".")
    return (int(parts[2]) if parts[:2] == ["model", "layers"] else -1, name)
