"""Configuration of `data-prep`."""

from typing import Literal, Self

from pydantic import Field, model_validator

from finemill.config import StepConfig
from finemill.rows.shapes import ShapeName


class Source(StepConfig):
    """One place that rows come from."""

    uri: str = Field(min_length=1)
    """A file or folder (`path`, `file://`, `s3://bucket/key`), `hf://datasets/org/name@revision`, or `example:NAME`.

    A folder, prefix or data set gives all its data files in order of their paths."""
    weight: float | None = Field(default=None, gt=0)
    """Share of this source in every split, relative to the other sources' weights (75 and 25, 3 and 1). Without
    weights every row is kept; give a weight to all sources or to none."""
    format: Literal["auto", "json", "jsonl", "parquet", "arrow", "csv", "text"] = "auto"
    """File format; `auto` goes by the file name's ending. `text`: documents separated by blank lines."""
    shape: ShapeName | None = None
    """The shape of all rows; without it each row's is found by its columns."""
    columns: dict[str, str] = Field(default_factory=dict)
    """Columns to read under another name, known name first: `{prompt: input_text, completion: target}`. All others keep
    theirs; a row may lack a column that others have."""
    remove_columns: list[str] = Field(default_factory=list)
    """Columns to take as if they were not there: `[image]` learns the texts of rows that have pictures."""
    name: str | None = None
    """Only files in the folder of this name: a data set's configuration on the Hugging Face hub."""
    split: str | None = None
    """Only files of this split, by their path: `train` takes train.jsonl, train-00000-of-00002.parquet, train/x.csv."""
    max_rows: int | None = Field(default=None, ge=1)
    """Read at most so many rows, from the first; for `example:` the number of rows made (default 2000)."""


class DataPrepConfig(StepConfig):
    """Which rows to read, how to clean, mix and split them."""

    sources: list[Source] = Field(min_length=1)
    """Where rows come from."""
    mix_by: Literal["rows", "characters"] = "rows"
    """What the weights share out: rows (exact to one row), or characters (to one row's length; near to tokens)."""
    mix_policy: Literal["downsample", "upsample"] = "downsample"
    """When the sources do not have the weights' proportions: leave out rows of those that have too many, or repeat rows
    of those that have too few (training rows only)."""
    test_size: float = Field(default=0.05, ge=0, lt=1)
    """Share of prompts held out for `eval`. A prompt's hash decides, so that adding data moves no row."""
    validation_size: float = Field(default=0.05, ge=0, lt=1)
    """Share of prompts held out for the loss during training."""
    dedup: Literal["none", "exact", "normalized", "minhash"] = "normalized"
    """Which rows count as repeated: the same content; the same text but for case, width and spaces; or also an
    estimated word-triple overlap of `minhash_threshold`. The first one read is kept."""
    minhash_threshold: float = Field(default=0.8, gt=0, lt=1)
    """Share of word triples (Jaccard) from which `dedup: minhash` takes two rows for near-duplicates."""
    min_characters: int = Field(default=1, ge=0)
    """Shortest row kept, prompt and answer together, in characters."""
    max_characters: int | None = Field(default=None, ge=1)
    """Longest row kept, prompt and answer together, in characters; `chat-format` limits tokens."""
    max_damaged_rows: int = Field(default=10, ge=0)
    """How many rows of a source may be damaged: lines that are no JSON, rows with another number of cells. They are
    left out, counted and named; one more ends the run."""
    unknown_rows: Literal["drop", "error"] = "drop"
    """What to do with rows of no known shape when other rows of the source have one: leave them out and count them, or
    stop. A source without any known row always stops."""
    seed: int = Field(default=0, ge=0)
    """Decides the splits, the order of rows and the example data."""

    @model_validator(mode="after")
    def _check_fields_together(self) -> Self:
        if self.test_size + self.validation_size >= 1:
            raise ValueError(
                f"test_size {self.test_size} and validation_size {self.validation_size} leave no training rows: "
                "their sum must be below 1"
            )
        weighted = sum(source.weight is not None for source in self.sources)
        if weighted not in (0, len(self.sources)):
            raise ValueError(
                f"sources: {weighted} of {len(self.sources)} have a weight; give a weight to all of them or to none"
            )
        if self.max_characters is not None and self.max_characters < self.min_characters:
            raise ValueError(
                f"max_characters {self.max_characters} is below min_characters {self.min_characters}: no row would fit"
            )
        return self
