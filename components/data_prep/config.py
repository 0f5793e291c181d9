"""Configuration of `data-prep`."""

from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from finemill.artifacts.rows import Mix, MixBy, MixPolicy
from finemill.artifacts.splits import Split
from finemill.components.data_prep.quality import Flag
from finemill.config import StepConfig
from finemill.rows.shapes import ShapeName


class Source(StepConfig):
    """One place that rows come from."""

    uri: str = Field(min_length=1)
    """A file or folder (`path`, `file://`, `s3://bucket/key`), `hf://datasets/org/name@revision`, or `example:NAME`.

    A folder, prefix or data set gives all its data files in order of their paths."""
    weight: float | None = Field(default=None, gt=0)
    """Share of this source in what is trained on and in each held-out split, relative to the other sources' weights (75
    and 25, 3 and 1). Without weights every row is kept; give a weight to all sources or to none."""
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
    """Only files of this split, by their path: `train` takes train.jsonl, train-00000-of-00002.parquet, train/x.csv.
    A part of its rows in `datasets`' way: `train[:30%]`, `train[1000:2000]`, `[-10%:]`."""
    max_rows: int | None = Field(default=None, ge=1)
    """Read at most so many rows, from the first; for `example:` the number of rows made (default 2000)."""
    sample: float | None = Field(default=None, gt=0, le=1)
    """Take a random share of the rows; a row's hash decides, so that adding data moves no row."""
    into: Split | None = None
    """The split that all rows of this source go to: a test or validation file of your own. No other source then gives
    rows to that split, and rows elsewhere that begin with one of its questions are left out of training."""


class DataPrepConfig(StepConfig):
    """Which rows to read, how to clean and split them, and in which shares they are trained on."""

    not_in_key: ClassVar[frozenset[str]] = frozenset({"num_proc"})

    sources: list[Source] = Field(min_length=1)
    """Where rows come from."""
    mix_by: MixBy = "rows"
    """What the weights share out among the examples that training gets, after chat-format's cutting, unrolling and
    leaving out: their number, their tokens, or the tokens that are learned."""
    mix_policy: MixPolicy = "downsample"
    """When the sources do not have the weights' proportions: leave out rows of those that have too many, repeat rows of
    those that have too few (training rows only), or end the run."""
    max_repeats: int = Field(default=4, ge=1)
    """How often `mix_policy: upsample` takes the same row at most; what is missing then is left out elsewhere."""
    test_size: float = Field(default=0.05, ge=0, lt=1)
    """Share of prompts held out for `eval`. A prompt's hash decides, so that adding data moves no row."""
    validation_size: float = Field(default=0.05, ge=0, lt=1)
    """Share of prompts held out for the loss during training."""
    dedup: Literal["none", "exact", "normalized", "minhash"] = "normalized"
    """Which rows count as repeated: the same content; the same text but for case, width and spaces; or also an
    estimated overlap of word triples (of letters in scripts without spaces) of `minhash_threshold`, within and across
    splits. The first one read is kept."""
    minhash_threshold: float = Field(default=0.8, gt=0, lt=1)
    """Share of word triples (Jaccard) from which `dedup: minhash` takes two rows for near-duplicates."""
    benchmarks: list[str] = Field(default_factory=list)
    """Files of benchmarks (URIs as in `sources`): a row that shares a run of `benchmark_ngram` words with one of their
    questions or answers is left out as `benchmark`; of shorter ones of eight words and more the whole counts."""
    benchmark_ngram: int = Field(default=13, ge=5)
    """Words, or letters in scripts without spaces, that a row may not share in a run with a benchmark."""
    drop_flagged: list[Flag] = Field(default_factory=list)
    """Which doubtful rows are left out; all are counted by name in data.json, report.md and the data card."""
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
    labelled_bad: Literal["drop", "keep"] = "drop"
    """What to do with rows whose label (`label`, `kto_tag`, `is_correct` and the like) says that the answer is bad:
    leave them out and count them, or keep them for `train-dpo` with `loss_type: kto`; no other training learns them."""
    seed: int = Field(default=0, ge=0)
    """Decides the splits, the order of rows and the example data."""
    num_proc: int = Field(default=2, ge=1, le=256)
    """How many processes read and clean rows; what they write is the same for any number. Small sources take one."""

    @property
    def source_names(self) -> list[str]:
        """A name for each source: its URI, with its number where several have the same."""
        uris = [source.uri for source in self.sources]
        return [uri if uris.count(uri) == 1 else f"{uri} ({number})" for number, uri in enumerate(uris, start=1)]

    @property
    def mix(self) -> Mix | None:
        """What chat-format keeps to, None without weights."""
        weights = {
            name: source.weight
            for name, source in zip(self.source_names, self.sources, strict=True)
            if source.weight is not None
        }
        if not weights:
            return None
        return Mix(by=self.mix_by, policy=self.mix_policy, max_repeats=self.max_repeats, weights=weights)

    @model_validator(mode="after")
    def _check_fields_together(self) -> Self:
        if self.test_size + self.validation_size >= 1:
            raise ValueError(
                f"test_size {self.test_size} and validation_size {self.validation_size} leave no training rows: "
                "their sum must be below 1"
            )
        held_out = [source for source in self.sources if source.into in ("validation", "test")]
        trained = [source for source in self.sources if source not in held_out]
        if any(source.weight is not None for source in held_out):
            raise ValueError("sources: one that goes into validation or test has no weight: it is kept whole")
        weighted = sum(source.weight is not None for source in trained)
        if weighted not in (0, len(trained)):
            raise ValueError(
                f"sources: {weighted} of {len(trained)} have a weight; give a weight to all of them or to none"
            )
        if self.max_characters is not None and self.max_characters < self.min_characters:
            raise ValueError(
                f"max_characters {self.max_characters} is below min_characters {self.min_characters}: no row would fit"
            )
        return self
