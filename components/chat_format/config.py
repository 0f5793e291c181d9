"""Configuration of `chat-format`."""

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from finemill.artifacts.messages import Role
from finemill.components.chat_format.named_templates import TemplateName
from finemill.config import StepConfig


class TrainingEstimate(StepConfig):
    """What the data card says how long training takes on: the kernels' plan for one epoch of QLoRA with rank 16."""

    model: str
    """A model that the planner knows by name, as `qwen3-8b`: `finemill estimate --help` lists them."""
    gpu: str
    """A card whose rates are measured, as `h100`."""
    memory_gb: float = Field(default=80.0, gt=0)
    """Device memory that training may take, GiB."""
    global_batch_size: int = Field(default=8, ge=1)
    """Sequences per optimizer step: examples, or packs of them."""

    @model_validator(mode="after")
    def _check_names(self) -> Self:
        from finemill.kernels.planning.model_shapes import MIXTURES, SHAPES
        from finemill.kernels.planning.rates import RATES

        for field, name, known in (("model", self.model, [*SHAPES, *MIXTURES]), ("gpu", self.gpu, [*RATES])):
            if name not in known:
                raise ValueError(f"{field} '{name}' is not known: it is one of {', '.join(known)}")
        return self


class ChatFormatConfig(StepConfig):
    """How rows become token ids and labels."""

    not_in_key: ClassVar[frozenset[str]] = frozenset({"num_proc"})

    enable_thinking: bool | Literal["mixed"] = "mixed"
    """The template's `enable_thinking` for every row. `mixed`: true for rows with a thinking block, false for others;
    true: also rows without one learn to write an (empty) block; false: thinking blocks are removed."""
    system_prompt: str | None = None
    """Put before conversations that have no system message of their own."""
    unsupported_system: Literal["fold", "drop", "error"] = "fold"
    """A system message under a template that takes none (Gemma's): put before the first question, with a blank line
    between; the row left out and counted; or the end of the run."""
    unsupported_tools: Literal["drop", "fold", "error"] = "drop"
    """Functions and calls under a template that shows none: the row left out and counted; functions listed in the
    system message, calls as text in answers and results in turns of the user's, in Hermes' way, as the tuned model is
    to be asked then; or the end of the run."""
    chat_template: TemplateName | None = None
    """A template by name, used instead of the base model's own or for a base that has none. `chatml`, `qwen`, `llama3`
    and `gemma` need their control tokens in the tokenizer; `alpaca`, `vicuna` and `mistral` none. `qwen` has tools and
    thinking. The tuned model's tokenizer gets it."""
    chat_template_path: str | None = None
    """A Jinja file used instead of the base model's own chat template."""
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    """More variables for the template, for all rows, as `apply_chat_template` takes them; a template that prints the
    date needs its `date_string` here to give the same tokens every day."""
    new_tokens: tuple[str, ...] = ()
    """Tokens that the base's tokenizer lacks, as `[<step>, </step>]`: each is one token wherever it stands. Training
    finds them in the data set and learns their embeddings, which begin as the mean of all others."""
    assistant_turns: Literal["all", "last"] = "all"
    """Which assistant turns of a conversation are learned."""
    learned: Literal["assistant", "all"] | Annotated[tuple[Role, ...], Field(min_length=1)] = "assistant"
    """What is learned of a conversation: the assistant's turns, every token, or the turns of some roles, as
    `[assistant, tool]`: what each says and the token that ends it (preferences: the answers)."""
    rewritten_turns: Literal["unroll", "in_place", "skip"] = "unroll"
    """Turns that the template writes otherwise once more messages follow, as Qwen3 leaves out thinking blocks: each
    gets a training example that ends with it, so that what is learned is what will be asked; or is learned as it stands
    in the history, unless its thinking is lost (fewer tokens, but it teaches to answer without thinking); or is not."""
    max_unrolled_turns: int = Field(default=16, ge=1)
    """How many turns of a conversation get an example of their own at most: evenly spread ones, since each repeats all
    that stands before it. The others are not learned, and counted."""
    max_length: int | None = Field(default=2048, ge=8)
    """Longest sequence in tokens; null for no limit."""
    truncation: Literal["drop", "truncate"] = "drop"
    """Conversations longer than `max_length`, with either answer of a preference: left out and counted, or cut at the
    end (they then teach no end of turn). Texts are cut into pieces, of which none is lost."""
    rendered_text: Literal["drop", "tokens"] = "drop"
    """Text rows that a chat template wrote, markers of roles in them: left out and counted as `rendered_chat` (give
    messages instead, so that only answers are learned), or learned whole, their control tokens read as such."""
    estimate: TrainingEstimate | None = None
    """A model and a card, `{model: qwen3-8b, gpu: h100}`: the data card says in how many steps and hours that trains on
    the examples, packed and one by one."""
    num_proc: int = Field(default=2, ge=1, le=256)
    """How many processes format rows; what they write is the same for any number. Few rows take one."""

    @model_validator(mode="after")
    def _check_fields_together(self) -> Self:
        if self.chat_template is not None and self.chat_template_path is not None:
            raise ValueError("chat_template and chat_template_path are two templates: set one of them")
        for number, token in enumerate(self.new_tokens):
            if not token.strip() or token != token.strip():
                raise ValueError(
                    f"new_tokens: {token!r} is blank, or has white space at an end: a token is what stands"
                )
            if token in self.new_tokens[:number]:
                raise ValueError(f"new_tokens has {token!r} twice: leave one out")
        return self
