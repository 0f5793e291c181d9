"""What a training set is good for, and what would make more of it: by its size, the base, lengths and thinking."""

from collections.abc import Iterator

from finemill.components.chat_format.config import ChatFormatConfig
from finemill.components.chat_format.report import SplitCounts

_FEWEST_FOR_PRETRAINED = 300
_MUCH_LOST = 0.02
_MUCH_PADDING = 0.3
_FEW_THINK = 0.1


def advice_on(
    train: SplitCounts, config: ChatFormatConfig, padding: float, *, size: str | None, has_own_template: bool
) -> Iterator[str]:
    """Sentences, the most important first; none where there is nothing to say.

    Args:
        train: the counts of the training rows.
        config: the step's.
        padding: share of padding in batches of eight.
        size: what data-prep says of the number of rows.
        has_own_template: whether the base brings a chat template: one that does not was most likely only pre-trained.
    """
    if size:
        yield size
    if not has_own_template and train.examples < _FEWEST_FOR_PRETRAINED:
        yield (
            f"The base has no chat template of its own, so it was most likely only pre-trained: {train.examples} "
            "examples hardly teach it to answer; take one that is tuned for chat"
        )
    too_long, read = train.rows_dropped["too_long"], train.read.total()
    if too_long > _MUCH_LOST * read:
        yield (
            f"{too_long} of {read} rows ({too_long / read:.0%}) are longer than max_length {config.max_length} and "
            "left out: raise it, or set truncation to truncate"
        )
    if train.truncated > _MUCH_LOST * train.examples:
        yield (
            f"{train.truncated} of {train.examples} examples ({train.truncated / train.examples:.0%}) are cut at "
            f"max_length {config.max_length} and teach no end of turn: raise it"
        )
    if padding > _MUCH_PADDING:
        yield f"{padding:.0%} of batches of eight would be padding: train with packing"
    if 0 < train.thinking < _FEW_THINK * train.examples:
        yield (
            f"Only {train.thinking} of {train.examples} examples think: a model that is to do both wants more of them, "
            "one that is not wants enable_thinking false"
        )
