"""The artifact `gguf`: files for llama.cpp, and how each compares with the merged model."""

from pathlib import Path

from finemill.artifacts.chain import ChainLink
from finemill.artifacts.files import GGUF_FILE
from finemill.artifacts.records import Record, read_record, write_record


class GGUFFileRecord(Record):
    """One file."""

    path: str
    """Name in the artifact's folder."""
    size_bytes: int
    num_parameters: int
    bits_per_weight: float
    tensor_types: dict[str, int]
    """Number of tensors of each GGML type."""
    fallbacks: dict[str, str]
    """Tensors that could not have the wanted type: name -> `Q4_K -> Q5_0`."""
    metrics: dict[str, float]
    """Against the merged model: `kl`, `max_kl`, `top1_agreement`, `exact_match` and so on."""


class GGUFRecord(Record):
    """All files of one model, by quantization."""

    name: str
    merged_exact_match: float | None
    """Share of `answers` that the merged model gets right."""
    kl_positions: int
    answers: int
    files: dict[str, GGUFFileRecord]
    chain: tuple[ChainLink, ...] = ()
    """From the merged model to each file; the way to the merged model is in its merge.json."""
    warnings: tuple[str, ...]


def write_gguf_record(folder: Path, record: GGUFRecord) -> None:
    """Put the record beside the files."""
    write_record(folder / GGUF_FILE, record)


def read_gguf_record(folder: Path) -> GGUFRecord:
    """Raises: UserError: there is none, or it is damaged."""
    return read_record(folder / GGUF_FILE, GGUFRecord, "gguf-quantize")
