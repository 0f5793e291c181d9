"""The forward pass of one token per row as a CUDA graph: a model's thousands of kernels start at once.

A pass of an 8B model over a batch is about 10 ms of a GPU's time and 130 ms of Python's.
"""

# B rows, H heads, D head width, T columns, V vocabulary

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from finemill.models.row_cache import RowCache
from finemill.models.weights import NUM_EXPERTS

_logger = logging.getLogger(__name__)
_ATTENTION = "finemill_one_token"
# What changes attention and is not here: soft caps, sinks, biases by position.
_UNKNOWN = ("softcap", "s_aux", "sliding_window", "position_bias")


class CaptureError(Exception):
    """The model does something in its forward pass that no graph can hold."""


class DecodeGraph:
    """One token more of every row of a cache, as long as its memory stays where it is.

    Args:
        newest_B: each row's newest token, which is read at every call.

    Raises: CaptureError: the caller has to run the model itself.
    """

    def __init__(self, model: Any, cache: RowCache, newest_B: torch.Tensor) -> None:
        self.version = cache.version
        past = cache.for_model(slice(0, cache.mask_BT.shape[1]))

        def forward() -> torch.Tensor:
            cache.mask_BT.index_fill_(1, cache.column, True)
            output = model(
                input_ids=newest_B[:, None],
                attention_mask=cache.mask_BT[:, None, None],
                position_ids=cache.lengths_B[:, None],
                past_key_values=past,
                use_cache=True,
            )
            logits: torch.Tensor = output.logits[:, -1]
            return logits

        self._graph = torch.cuda.CUDAGraph()
        self._logits_BV = _capture(self._graph, model, forward)

    def __call__(self) -> torch.Tensor:
        """The logits of the next token, shape (B, V): until the next call."""
        self._graph.replay()
        return self._logits_BV


def can_capture(model: Any) -> bool:
    """Whether it is worth a try: experts are chosen on the host."""
    config = model.config.get_text_config()
    return model.device.type == "cuda" and not any(getattr(config, name, None) for name in NUM_EXPERTS)


def _capture(graph: torch.cuda.CUDAGraph, model: Any, forward: Callable[[], torch.Tensor]) -> torch.Tensor:
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    try:
        with _attention(model):
            stream.wait_stream(torch.cuda.current_stream())
            # What is set up at the first call is no part of the graph.
            with torch.cuda.stream(stream):
                forward()
            torch.cuda.current_stream().wait_stream(stream)
            with torch.cuda.graph(graph):
                return forward()
    except torch.cuda.OutOfMemoryError:
        raise
    except (RuntimeError, CaptureError) as error:
        _logger.info("answers are written without a CUDA graph: %s", error)
        raise CaptureError from error


@contextmanager
def _attention(model: Any) -> Iterator[None]:
    AttentionInterface.register(_ATTENTION, attend)
    config = model.config.get_text_config()
    usual = config._attn_implementation
    config._attn_implementation = _ATTENTION
    try:
        yield
    finally:
        config._attn_implementation = usual


def attend(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor,
    scaling: float | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of one token per row, which reads each key once for all heads that share it.

    Args:
        query: shape (B, H, 1, D).
        key, value: shape (B, key heads, T, D).
        attention_mask: bool, shape (B, 1, 1, T).

    Returns: shape (B, 1, H, D).
    Raises: CaptureError: an option that is not here.
    """
    if unknown := [name for name in _UNKNOWN if options.get(name) is not None]:
        raise CaptureError(f"attention with {unknown[0]}")
    B, H, _, D = query.shape
    # Heads that share a key are as queries of one head: no kernel of torch's takes both a mask and shared keys.
    grouped = query.reshape(B, key.shape[1], H // key.shape[1], D)
    mixed = scaled_dot_product_attention(grouped, key, value, attn_mask=attention_mask, scale=scaling)
    return mixed.reshape(B, 1, H, value.shape[-1]), None
