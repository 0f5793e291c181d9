"""Which split a row belongs to: decided by its prompt alone, so that no other row can move it."""

import hashlib

from finemill.artifacts.splits import Split


def assign_split(prompt_key: bytes, *, test_size: float, validation_size: float, seed: int) -> Split:
    """The split of every row with this prompt.

    A hash of the prompt is a number in [0, 1): below `test_size` is test, the next `validation_size` is validation, the
    rest train. Rows with the same normalized prompt share a split, so that nothing held out is trained on; a changed
    `validation_size` leaves test as it was.
    """
    digest = hashlib.sha256(b"%d:" % seed + prompt_key).digest()
    position = int.from_bytes(digest[:8], "big") / 2**64
    if position < test_size:
        return "test"
    return "validation" if position < test_size + validation_size else "train"


def is_sampled(row_id: str, share: float, seed: int) -> bool:
    """Whether a row is in a random share of its source."""
    digest = hashlib.sha256(f"sample:{seed}:{row_id}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64 < share


def order_key(row_id: str, seed: int) -> bytes:
    """Sorts rows into a random order that others coming or going do not change."""
    return hashlib.sha256(f"{seed}:{row_id}".encode()).digest()
