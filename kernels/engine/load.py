"""Read a Hugging Face checkpoint straight into the engine: no transformers, PEFT or bitsandbytes import.

Those imports take longer than reading the weights of an 8B model (3.5 to 5.5 s; bench/levers.md). Threads read the
safetensors files into pinned buffers while the device quantizes what has arrived, with bitsandbytes' own library called
through ctypes, so that the NF4 codes are its codes.
"""

import json
import math
import queue
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from finemill.errors import UserError
from finemill.kernels.engine.adapters import LoraPair
from finemill.kernels.engine.expert_layout import EXPERT_STACKS, expert_shape
from finemill.kernels.engine.host_memory import pin
from finemill.kernels.engine.load_experts import ExpertReader
from finemill.kernels.engine.model import LINEARS, FastModel, LayerParts, assemble_model, stack_shape
from finemill.kernels.engine.nf4_quantize import quantize_nf4
from finemill.kernels.engine.plan import LayerShape
from finemill.kernels.ops.nf4 import NF4Tensor

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
READERS = 6
IN_FLIGHT = 12
"""Tensors read ahead; with 8B's widest matrices about 1.2 GB of pinned memory."""


@dataclass(frozen=True)
class LoraSettings:
    """Rank, alpha and dropout of the adapters to add to all linear layers, of experts to each one's."""

    rank: int = 16
    alpha: float = 16.0
    dropout: float = 0.0


@dataclass
class Rotary:
    """cos and sin tables from a configuration: the default and Llama 3's scaled frequencies."""

    config: dict[str, Any]
    head_dim: int
    device: torch.device

    def __call__(self, like: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return cos and sin (1, positions, D) of like's dtype."""
        angles = position_ids[..., None].float() * self._frequencies()
        both = torch.cat((angles, angles), dim=-1)
        return both.cos().to(like.dtype), both.sin().to(like.dtype)

    def _frequencies(self) -> Tensor:
        parameters = self.config.get("rope_parameters") or self.config.get("rope_scaling") or {}
        theta = float(parameters.get("rope_theta") or self.config.get("rope_theta", 10000.0))
        exponent = torch.arange(0, self.head_dim, 2, dtype=torch.int64).to(self.device, torch.float32) / self.head_dim
        inverse: Tensor = 1.0 / (theta**exponent)
        kind = parameters.get("rope_type", parameters.get("type", "default"))
        if kind == "default":
            return inverse
        if kind != "llama3":
            raise UserError(f"rope_type is {kind!r}: this loader knows 'default' and 'llama3'; load with transformers")
        old = parameters["original_max_position_embeddings"]
        low, high, factor = (float(parameters[k]) for k in ("low_freq_factor", "high_freq_factor", "factor"))
        wavelength = 2 * math.pi / inverse
        smooth: Tensor = ((old / wavelength - low) / (high - low)).clamp(0, 1)
        return (1 - smooth) * inverse / factor + smooth * inverse


def load_model(
    path: Path,
    *,
    device: torch.device,
    dtype: torch.dtype = torch.bfloat16,
    quantize: bool = True,
    lora: LoraSettings | None = None,
    embedding_on_host: bool = False,
) -> tuple[FastModel, dict[str, nn.Parameter]]:
    """Load a checkpoint of the Llama family, dense or a mixture of experts, with fresh adapters.

    A starts uniform, B zero, as in PEFT.

    Args:
        path: folder with config.json and safetensors files.
        device: where to compute.
        dtype: compute dtype.
        quantize: NF4 with double quantization for the linear layers, else `dtype`; never for a router.
        lora: adapters to add.
        embedding_on_host: keep an untied embedding in pinned host memory.
    Returns: the engine, and the LoRA parameters under PEFT's names (from "layers." on).
    """
    config = json.loads((path / "config.json").read_text())
    lora = lora or LoraSettings()
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    shape = LayerShape(
        config["hidden_size"],
        config["intermediate_size"],
        heads,
        config.get("num_key_value_heads", heads),
        head_dim,
        config["rms_norm_eps"],
        expert_shape(config),
    )
    if shape.experts is not None and lora.dropout:
        raise UserError(f"lora_dropout is {lora.dropout}: adapters of experts train without, as PEFT's do")
    found: dict[str, NF4Tensor | Tensor] = {}
    mixture = shape.experts
    experts = None if mixture is None else ExpertReader(mixture, shape.hidden, device, dtype, quantize=quantize)
    for name, tensor in stream_tensors(path, device):
        if experts is not None and experts.take(name, tensor):
            continue
        linear = quantize and name.endswith("_proj.weight")
        if linear:
            found[name] = quantize_nf4(tensor.to(dtype))
        elif name == "model.embed_tokens.weight" and embedding_on_host and not config["tie_word_embeddings"]:
            found[name] = pin(tensor.to(dtype))
        else:
            found[name] = tensor.to(dtype)
    parameters: dict[str, nn.Parameter] = {}
    parts = [
        _layer_parts(found, index, lora, parameters, shape, experts) for index in range(config["num_hidden_layers"])
    ]
    embedding = found["model.embed_tokens.weight"]
    model = assemble_model(
        parts,
        shape,
        embedding=embedding,  # type: ignore[arg-type]
        final_norm=found["model.norm.weight"],  # type: ignore[arg-type]
        head=found.get("lm_head.weight", embedding),  # type: ignore[arg-type]
        rotary=Rotary(config, head_dim, device),
        dropout=lora.dropout,
    )
    return model, parameters


def _layer_parts(
    found: dict[str, NF4Tensor | Tensor],
    index: int,
    lora: LoraSettings,
    parameters: dict[str, nn.Parameter],
    shape: LayerShape,
    experts: ExpertReader | None,
) -> LayerParts:
    prefix = f"model.layers.{index}."

    def tensor(name: str) -> Any:
        return found.pop(prefix + name, None)

    mixture = None if experts is None else experts.layer(index)
    norm = tensor("input_layernorm.weight")
    weights, biases, pairs = {}, {}, {}
    for name in LINEARS[:4] if mixture else LINEARS:
        module = f"self_attn.{name}" if name in LINEARS[:4] else f"mlp.{name}"
        weights[name] = tensor(f"{module}.weight")
        biases[name] = tensor(f"{module}.bias")
        n, k = weights[name].shape
        pairs[name] = _new_pair(lora, n, k, 1, norm.device)
        _name_pair(parameters, f"layers.{index}.{module}", pairs[name])
    for depth, name in enumerate(EXPERT_STACKS if mixture else ()):
        count, n, k = stack_shape(name, shape)
        pairs[name] = _new_pair(lora, n, k, count, norm.device)
        # PEFT wraps the second parameter's wrapper around the first's.
        module = "mlp.experts" + (".base_layer" if depth == 0 else "")
        _name_pair(parameters, f"layers.{index}.{module}", pairs[name])
    return LayerParts(
        weights,
        biases,
        pairs,
        norm,
        tensor("post_attention_layernorm.weight"),
        tensor("self_attn.q_norm.weight"),
        tensor("self_attn.k_norm.weight"),
        None if mixture is None else mixture.router,
        {} if mixture is None else dict(zip(EXPERT_STACKS, (mixture.gate_up, mixture.down), strict=True)),
    )


def _new_pair(lora: LoraSettings, n: int, k: int, count: int, device: torch.device) -> LoraPair:
    """Adapters of `count` matrices (n, k), as PEFT lays them out and starts them."""
    a = torch.empty((count * lora.rank, k), dtype=torch.float32, device=device)
    nn.init.kaiming_uniform_(a, a=math.sqrt(5))
    b = torch.zeros((n, lora.rank * count), dtype=torch.float32, device=device)
    return LoraPair(nn.Parameter(a), nn.Parameter(b), lora.alpha / lora.rank)


def _name_pair(parameters: dict[str, nn.Parameter], module: str, pair: LoraPair) -> None:
    parameters[f"{module}.lora_A.default.weight"] = pair.a
    parameters[f"{module}.lora_B.default.weight"] = pair.b


@dataclass(frozen=True)
class _Entry:
    file: Path
    begin: int
    size: int
    dtype: torch.dtype
    shape: tuple[int, ...]


def _entries(path: Path) -> dict[str, _Entry]:
    """Where every tensor of the checkpoint lies, from the safetensors headers."""
    found = {}
    for file in sorted(path.glob("*.safetensors")):
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(length))
        for name, entry in header.items():
            if name != "__metadata__":
                begin, end = entry["data_offsets"]
                found[name] = _Entry(
                    file, 8 + length + begin, end - begin, DTYPES[entry["dtype"]], tuple(entry["shape"])
                )
    if not found:
        raise UserError(f"no *.safetensors in {path}: pass the folder of a Hugging Face checkpoint")
    return found


def stream_tensors(
    path: Path, device: torch.device, *, order: Callable[[str], Any] | None = None
) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, tensor on the device) of a checkpoint, read by threads a few tensors ahead.

    Args:
        path: folder with safetensors files.
        device: where the tensors go.
        order: key by which names are sorted; the order of the files by default. Threads may change it a little.
    """
    entries = _entries(path)
    wanted: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    for name in [*(entries if order is None else sorted(entries, key=order)), *([None] * READERS)]:
        wanted.put(name)
    ready: queue.Queue[tuple[str, Tensor] | BaseException] = queue.Queue(IN_FLIGHT)
    cuda = device.type == "cuda"

    def read() -> None:
        try:
            while (name := wanted.get()) is not None:
                entry = entries[name]
                buffer = torch.empty(entry.size, dtype=torch.uint8, pin_memory=cuda)
                with entry.file.open("rb", buffering=0) as stream:
                    stream.seek(entry.begin)
                    view = memoryview(buffer.numpy())  # type: ignore[arg-type]
                    done = 0
                    while done < entry.size:
                        count = stream.readinto(view[done:])
                        if not count:
                            raise UserError(f"{entry.file} ends inside {name}: the checkpoint is incomplete")
                        done += count
                ready.put((name, buffer.view(entry.dtype).view(entry.shape)))
        except BaseException as error:
            ready.put(error)

    threads = [threading.Thread(target=read, daemon=True) for _ in range(READERS)]
    for thread in threads:
        thread.start()
    for _ in entries:
        item = ready.get()
        if isinstance(item, BaseException):
            raise item
        yield item[0], item[1].to(device, non_blocking=True)
