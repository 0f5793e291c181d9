"""What is known of a row that can be used."""

from dataclasses import dataclass

from finemill.artifacts.splits import Split


@dataclass(frozen=True, slots=True)
class Record:
    """A row, and what decides whether and where it stays.

    `number` counts from 1 in the source of number `source`. `row_id` and the keys are sha256 digests: of the row, of
    its normalized first question, of everything it says, normalized; `sketch` is the MinHash signature of the latter
    where near-duplicates are searched for. `position` sorts the row among the others of its split; `text` is its JSON.
    """

    source: int
    number: int
    row_id: str
    shape: str
    prompt_key: bytes
    text_key: bytes
    sketch: bytes | None
    num_characters: int
    split: Split
    position: bytes
    text: str
