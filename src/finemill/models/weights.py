"""What lies in a folder of safetensors files, by their headers alone: no value is read."""

import json
import math
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from finemill.errors import UserError

INDEX_NAME = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
}  # fmt: skip
"""Dtypes by the names that the safetensors format gives them."""
NUM_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
"""Names that families give the number of experts in config.json."""
_FLOATS = ("F64", "F32", "F16", "BF16")
_POINTER = b"version https://git-lfs"


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a safetensors file: `dtype` as the format spells it (`BF16`), `shape` rows first."""

    path: Path
    dtype: str
    shape: tuple[int, ...]

    @property
    def is_float(self) -> bool:
        """Whether the values are floating-point numbers of 16 bits or more."""
        return self.dtype in _FLOATS

    @property
    def torch_dtype(self) -> torch.dtype:
        """The type as torch has it. Raises: UserError: torch has none, as of values of less than eight bits."""
        if self.dtype not in DTYPES:
            raise UserError(
                f"{self.path} holds tensors of type {self.dtype}, which cannot be read: pass the model in 16 bits"
            )
        return DTYPES[self.dtype]

    @property
    def num_elements(self) -> int:
        """Values in the tensor."""
        return math.prod(self.shape)


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of a model folder, in the order of the files.

    Raises: UserError: no weights, a damaged file, or a file or tensor that the folder's index names and that is not
    there.
    """
    paths = sorted(folder.glob("*.safetensors"))
    if not paths:
        raise UserError(f"no safetensors file in {folder}: pass a folder written by save_pretrained")
    # Some repositories hold the weights twice, or an adapter's or another format's beside them. transformers takes the
    # single file if there is one, else what the index names.
    if (folder / _SINGLE) in paths:
        return read_header(folder / _SINGLE)
    weight_map = _weight_map(folder / INDEX_NAME)
    missing = sorted(set(weight_map.values()) - {path.name for path in paths})
    if missing:
        raise UserError(
            f"{missing[0]} is missing in {folder} ({len(missing)} of {len(set(weight_map.values()))} files that "
            f"{INDEX_NAME} names): download or copy the model again"
        )
    used = set(weight_map.values()) or {path.name for path in paths}
    found = {name: tensor for path in paths if path.name in used for name, tensor in read_header(path).items()}
    absent = sorted(set(weight_map) - set(found))
    if absent:
        raise UserError(
            f"tensor {absent[0]} is not in {folder / weight_map[absent[0]]}, where {INDEX_NAME} places it "
            f"({len(absent)} of {len(weight_map)} are missing): download or copy the model again"
        )
    return found


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one safetensors file. Raises: UserError: the file is cut short or damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 safe_open is no mapping
            return {
                name: StoredTensor(path, part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()
            }
    except (SafetensorError, OSError, ValueError) as error:
        if is_pointer(path):
            raise UserError(f"{path} is Git LFS's note of the file and not the file: run git lfs pull") from None
        raise UserError(f"{path} is damaged ({error}): download or copy it again") from None


def is_pointer(path: Path) -> bool:
    """Whether a file is what Git leaves in its place where LFS is not set up."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(_POINTER)) == _POINTER


def _weight_map(path: Path) -> Mapping[str, str]:
    """Tensor -> file name, of an index; empty where there is none. Raises: UserError: it is no such map."""
    if not path.is_file():
        return {}
    try:
        weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        return {str(name): str(file) for name, file in weight_map.items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{path} is no index of safetensors files: download or copy the model again") from None


def holds_another_head(tensors: Mapping[str, StoredTensor]) -> bool:
    """Whether the files hold an output matrix beside the embedding that is not the same.

    transformers ties the two then not, whatever config.json says.
    """
    ends = [
        next((key for key in tensors if key.endswith(f"{name}.weight")), None) for name in ("embed_tokens", "lm_head")
    ]
    if not ends[0] or not ends[1] or tensors[ends[0]].shape != tensors[ends[1]].shape:
        return False
    with ExitStack() as stack:
        first, second = (
            stack.enter_context(safe_open(tensors[key].path, framework="pt")).get_tensor(key) for key in ends if key
        )
        return not (torch.equal(first[0], second[0]) and torch.equal(first, second))
