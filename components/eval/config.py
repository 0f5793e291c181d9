"""Configuration of eval."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from finemill.config import StepConfig


class EvalConfig(StepConfig):
    """Which held-out rows are scored, and how the answers are generated."""

    split: Literal["test", "validation"] = "test"
    """Split whose rows are scored; neither is trained on."""

    max_rows: int | None = Field(default=None, ge=1)
    """Score at most this many rows, evenly spread over the split. Default: all."""

    max_new_tokens: int = Field(default=512, ge=1)
    """Longest answer, in tokens. An answer cut here counts as unfinished; a thinking model needs thousands."""

    batch_size: int | None = Field(default=None, ge=1)
    """Answers written at once, of base and tuned together. Default: what fits, at most 256 on a GPU, 64 on a CPU."""

    device: Literal["auto", "cuda", "cpu"] = "auto"
    """Where the model runs; `auto` takes the GPU if there is one."""

    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Type of weights and arithmetic; `auto` is bfloat16 on a GPU that has it, else float16, and float32 on a CPU."""

    load_in_4bit: bool = False
    """Quantize the base to NF4 as training does, so that a card that trained a model can evaluate it. The scores are
    those of the quantized base with the adapter."""

    force: bool = False
    """Evaluate although nothing shows that the base is the one the adapter was trained on."""

    temperature: float = Field(default=0.0, ge=0)
    """0 takes the likeliest token each time, which repeats exactly; Qwen3 recommends 0.6 for thinking."""

    top_p: float = Field(default=1.0, gt=0, le=1)
    """With a temperature: draw from the likeliest tokens that make up this probability."""

    top_k: int = Field(default=0, ge=0)
    """With a temperature: draw from this many likeliest tokens; 0 for all."""

    min_p: float = Field(default=0.0, ge=0, le=1)
    """With a temperature: leave out tokens less likely than this share of the likeliest one; 0 for none."""

    seed: int = 0
    """With a temperature: seed of the draws."""

    models: dict[Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,40}$")], str] = Field(default_factory=dict)
    """Further models that answer the same rows, by a name each: a merged model, a GGUF file, an adapter, the champion
    (`models:/name@champion`), the address of an OpenAI-compatible server. They are asked in chats, with their own
    templates, and stand beside base and tuned in every table; no gate of promote looks at them."""

    regression: bool = False
    """Also ask base and tuned 45 questions that come with the project (instructions, arithmetic, reading): whether
    tuning forgot what the base knew. A gate of promote on `regression/accuracy` guards it."""

    lm_eval_tasks: list[str] = Field(default_factory=list)
    """Task files (YAML) of lm-evaluation-harness that base and tuned answer, too, by that library, at most `max_rows`
    rows of each. Nothing is fetched: `dataset_path` is json, csv, parquet or text, and `dataset_kwargs.data_files`
    lie beside the task. A gate of promote on `lm_eval/<task>/<metric>` guards one."""

    lm_eval_chat: bool = False
    """Put the questions of those tasks in the model's chat template, as `lm_eval --apply_chat_template` does."""

    json_schema: dict[str, Any] | None = None
    """JSON schema that every answer should keep; `schema_ok_rate` counts those that do."""

    pattern: str | None = None
    """Regular expression that every answer should match as a whole; `pattern_ok_rate` counts those that do."""

    report_rows: int = Field(default=200, ge=0)
    """Rows whose answers the report shows side by side; samples.parquet has them all."""

    @model_validator(mode="after")
    def _has_names_of_its_own(self) -> Self:
        taken = sorted({"base", "tuned", "delta", "rows", "fixed", "broken"} & self.models.keys())
        if taken:
            raise ValueError(f"models: {', '.join(taken)} has a meaning already: give the model another name")
        return self
