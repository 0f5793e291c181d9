"""An adapter as a GGUF file, which llama.cpp adds to the base's GGUF file while it runs (`llama-server --lora`).

Each adapted tensor has two, `<name>.lora_a` and `<name>.lora_b`; llama.cpp adds alpha / rank times their product
(https://github.com/ggml-org/llama.cpp/tree/master/tools/export-lora).
"""

# E experts, R rank

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from finemill.components.gguf_quantize.convert import Array, SourceModel, text_name
from finemill.errors import UserError
from finemill.models.adapter import WEIGHTS_NAME, load_adapter
from finemill.models.stored_model import StoredModel
from finemill.models.weights import read_header

_ALPHA = 1.0


def write_lora(base_model: Path, adapter: Path, path: Path) -> int:
    """Write the adapter in `adapter`, trained on the model in `base_model`, as `path`, float32.

    Returns: how many tensors of the base it changes.
    Raises: UserError: an architecture that llama.cpp has no counterpart for; an adapter that does not fit the base, or
    is more than LoRA on linear layers and experts.
    """
    source = SourceModel(base_model)
    source.check()
    for name in read_header(adapter / WEIGHTS_NAME) if (adapter / WEIGHTS_NAME).is_file() else ():
        if ".lora_" not in name:
            name = name.removeprefix("base_model.model.").replace(".base_layer", "")
            raise _not_plain(name, "is trained as a whole")
    tuned = load_adapter(StoredModel(base_model).model, adapter, assign=True)
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[source.architecture])
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, _ALPHA)
    count = 0
    for name, a, b in _factors(source, tuned):
        writer.add_tensor(f"{name}.lora_a", np.ascontiguousarray(a))
        writer.add_tensor(f"{name}.lora_b", np.ascontiguousarray(b))
        count += 1
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return count


def _factors(source: SourceModel, tuned: Any) -> Iterator[tuple[str, Array, Array]]:
    """GGUF name, A and B of each adapted tensor: (R, in) and (out, R), of a stack with E in front."""
    from peft.tuners.lora.layer import Linear, LoraLayer, ParamWrapper
    from peft.utils.other import AuxiliaryTrainingWrapper

    names = source.names()
    for path, module in tuned.get_base_model().named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper) or (isinstance(module, LoraLayer) and module.lora_variant):
            raise _not_plain(path, "is trained as a whole, in rows of new tokens, or with DoRA")
        if isinstance(module, ParamWrapper):
            yield from _of_stack(source, path.replace(".base_layer", ""), module)
        elif isinstance(module, LoraLayer):
            key = text_name(f"{path}.weight")
            if type(module) is not Linear or any(module.lora_bias.values()) or key not in names:
                raise _not_plain(path, "is no linear layer without a bias of the adapter's own")
            a, b = (factor["default"].weight.detach().float().numpy() for factor in (module.lora_A, module.lora_B))
            yield names[key], a, _scaled(source.reorder(key, b), module.scaling["default"])


def _of_stack(source: SourceModel, path: str, module: Any) -> Iterator[tuple[str, Array, Array]]:
    """Of `gate_up_proj`, whose halves are two tensors with the same A, or of `down_proj`."""
    parts = {"gate_up_proj": ("gate", "up"), "down_proj": ("down",)}.get(module.parameter_name)
    if parts is None or module.num_experts < 2:
        raise _not_plain(f"{path}.{module.parameter_name}", "is no stack of experts")
    left, right, scaling = module.get_delta_factors("default")
    layer = path.removeprefix("model.layers.").partition(".")[0]
    a = right.detach().float().numpy()
    for part, b in zip(parts, np.split(left.detach().float().numpy(), len(parts), axis=1), strict=True):
        name = f"blk.{layer}.ffn_{part}_exps.weight"
        assert name in source.sources, name
        yield name, a, _scaled(b, scaling)


def _scaled(b: Array, scaling: float) -> Array:
    """B such that alpha / rank is the factor: every tensor may have a rank and a factor of its own."""
    scaled: Array = (b * (scaling * b.shape[-1] / _ALPHA)).astype(np.float32)
    return scaled


def _not_plain(path: str, problem: str) -> UserError:
    return UserError(
        f"gguf-lora: {path} {problem}, and llama.cpp adds LoRA to linear layers and stacks of experts only: merge the "
        "adapter, and quantize the merged model"
    )
