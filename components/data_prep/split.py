"""Which split a row belongs to: decided by its prompt alone, so that no other row can move it."""

import hashlib

from finemill.artifacts.splits import Split
from finemill.components.data_prep.config import DataPrepConfig


def split_of(source: int, prompt_key: bytes, config: DataPrepConfig) -> Split:
    """The split that the row's source goes to, or the one of its first question, of those that have no own source."""
    own = {other.into for other in config.sources}
    test_size = 0.0 if "test" in own else config.test_size
    validation_size = 0.0 if "validation" in own else config.validation_size
    into = config.sources[source].into
    return into or assign_split(prompt_key, test_size=test_size, validation_size=validation_size, seed=config.seed)


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
