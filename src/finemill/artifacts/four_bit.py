"""What lies beside a base in 4 bits: which model it was made from, which layers have 16, and what that costs."""

from pathlib import Path

from finemill.artifacts.files import FOUR_BIT_FILE
from finemill.artifacts.records import Record, read_record, write_record


class FourBitSize(Record):
    """A choice of layers at a size: bytes of its weights, and how far it is from the model that it was made from.

    `kl` and `kl_p999` are KL divergence in nats per token, mean and 99.9th percentile over `positions`.
    """

    name: str
    size_bytes: int
    num_kept: int
    predicted_kl: float
    kl: float
    kl_p999: float
    perplexity: float
    top1_agreement: float
    positions: int


class FourBitRecord(Record):
    """How a base was quantized; `kept` names the linear layers that stay in 16 bits, `written` what is in the files."""

    base_model: str
    base_digest: str
    """Digest of the base model, as `models/base/resolve.py` computes it."""
    kept: tuple[str, ...]
    written: FourBitSize
    plain: FourBitSize


def write_four_bit(folder: Path, record: FourBitRecord) -> None:
    """Put the record beside the weights."""
    write_record(folder / FOUR_BIT_FILE, record)


def read_four_bit(folder: Path) -> FourBitRecord | None:
    """How a base was quantized; None for one that was not, or elsewhere. Raises: UserError: the record is damaged."""
    path = folder / FOUR_BIT_FILE
    return read_record(path, FourBitRecord, "quantize-4bit") if path.is_file() else None
