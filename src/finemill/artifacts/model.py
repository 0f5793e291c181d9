"""The artifact `model`: a Hugging Face folder with weights of its own, and how it was merged."""

from pathlib import Path

from finemill.artifacts.chain import ChainLink
from finemill.artifacts.files import MERGE_FILE
from finemill.artifacts.records import Record, read_record, write_record


class LandedTensor(Record):
    """What came of the adapter's change to one parameter."""

    name: str
    meant: float
    """Norm of the change in float32."""
    lost: float
    """Norm of what rounding took from it or added to it."""
    share: float
    """How much of the change is in the written tensor, along its own direction: 1 is all of it. Changes smaller than a
    rounding step vanish."""
    experts: tuple[float, ...] = ()
    """Norm of each expert's change, of a stack: 0 for one that no token of the training came to."""


class ScaledAdapter(Record):
    """An adapter that was merged beside the first one."""

    adapter: str
    scale: float


class MergeRecord(Record):
    """From what a model was merged, and how closely it agrees with that."""

    base_model: str
    base_known_by: str
    """How the base is known to be the one the adapter was trained on; `forced: ...` if it is not."""
    adapter: str
    scale: float
    dtype: str
    kl: float
    max_abs_diff: float
    top1_agreement: float
    max_kl: float
    min_top1_agreement: float
    share_landed: float
    min_share_landed: float
    tensors: tuple[LandedTensor, ...]
    base: str = "unquantized"
    """What the adapter was added to: the base, or what training in 4 bits computed with (`dequantized`)."""
    chain: tuple[ChainLink, ...] = ()
    """From the base in 4 bits with the adapter, where the training had one, to the merged model, and to that in 4 bits,
    where it was asked for, on probe chats."""
    further_adapters: tuple[ScaledAdapter, ...] = ()


def write_merge(folder: Path, record: MergeRecord) -> None:
    """Put the record beside the merged weights."""
    write_record(folder / MERGE_FILE, record)


def read_merge(folder: Path) -> MergeRecord | None:
    """How a model was merged; None for one that was not. Raises: UserError: the record is damaged."""
    path = folder / MERGE_FILE
    return read_record(path, MergeRecord, "merge") if path.is_file() else None
