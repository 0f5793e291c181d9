"""Configuration of `synthesize`."""

from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from finemill.config import StepConfig

Task = Literal["question_answer", "rewrite", "extend", "translate", "back_translate", "judge"]


class SynthesizeConfig(StepConfig):
    """What a model behind an OpenAI-compatible address makes of the training rows, and what it may cost."""

    not_in_key: ClassVar[frozenset[str]] = frozenset(
        {
            *("url", "parallel", "max_retries", "max_failures", "requests_per_minute", "max_tokens", "max_cost"),
            *("price_per_million_prompt_tokens", "price_per_million_reply_tokens"),
        }
    )

    url: str
    """The address that `/chat/completions` follows; its key comes from OPENAI_API_KEY."""
    model_name: str | None = None
    """The server's name for the model. Default: the first that it lists."""
    task: Task
    """`question_answer`: questions about a document, with answers. `rewrite`: the same answers, better written.
    `extend`: one more question and answer. `translate`: a conversation in another language. `back_translate`: the
    question that a text answers; the text is the better answer to it, the model's own the worse one. `judge`: rows
    below `min_score` are left out."""
    instructions: str | None = None
    """What the model is told beside the task: tone, audience, what to leave alone."""
    language: str | None = None
    """The language of `translate`, as its name in English: German."""
    questions_per_document: int = Field(default=3, ge=1, le=50)
    """Questions asked for about each piece of a document."""
    min_score: int = Field(default=7, ge=1, le=10)
    """The lowest score, of 10, that `judge` keeps."""
    keep_source_rows: bool = False
    """Whether the rows that something is made of stay beside it; with `judge` they are all there is."""
    max_rows: int | None = Field(default=None, ge=1)
    """Take so many training rows at most, from the first, which stand in a random order."""
    max_characters: int = Field(default=8000, ge=200)
    """Longest piece of a document in a request; a longer one is cut at white space. A longer conversation is left
    out."""
    temperature: float = Field(default=0.7, ge=0)
    """How freely the model writes; `judge` and `translate` always take the likeliest token."""
    max_new_tokens: int = Field(default=2048, ge=16)
    """Longest reply in tokens, thinking included."""
    enable_thinking: bool | None = False
    """Whether the model thinks first, where its template has that switch; null leaves it to the server."""
    seed: int = Field(default=0, ge=0)
    """Sent with each request."""
    parallel: int = Field(default=8, ge=1, le=256)
    """Requests that the server gets at once."""
    requests_per_minute: float | None = Field(default=None, gt=0)
    """The server's rate limit. One that answers 429 is waited for in any case."""
    max_retries: int = Field(default=5, ge=0)
    """How often a request is repeated after the server failed; waits double from a second to a minute."""
    max_failures: int = Field(default=5, ge=1)
    """So many rows in a row that fail for good end the run: what is done is kept, and the same call goes on."""
    max_tokens: int | None = Field(default=None, ge=1)
    """The budget in tokens, of prompts and replies together. When it is spent the run ends; with a larger one the same
    call goes on."""
    max_cost: float | None = Field(default=None, gt=0)
    """The budget in the currency of the prices."""
    price_per_million_prompt_tokens: float = Field(default=0, ge=0)
    """What the server's prompts cost."""
    price_per_million_reply_tokens: float = Field(default=0, ge=0)
    """What its replies cost."""

    @model_validator(mode="after")
    def _check_fields_together(self) -> Self:
        if (self.task == "translate") != (self.language is not None):
            raise ValueError("language: task translate needs one, and no other task has one")
        if self.max_cost and not (self.price_per_million_prompt_tokens or self.price_per_million_reply_tokens):
            raise ValueError("max_cost: give a price per million tokens, or limit max_tokens")
        return self
