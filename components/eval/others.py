"""Further models on the same rows: merged, GGUF, champion, endpoint, each asked in chats with its own template."""

import gc
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from finemill.artifacts.chain import ChainLink
from finemill.artifacts.dataset import DatasetRow, read_dataset_rows, spread
from finemill.artifacts.evaluation import Sample
from finemill.artifacts.files import GGUF_FILE
from finemill.artifacts.gguf import read_gguf_record
from finemill.artifacts.metrics import delta_metric, model_metric
from finemill.artifacts.model import read_merge
from finemill.asking.find_model import FoundModel, find_model
from finemill.asking.open_model import OpenModel, open_model
from finemill.components.eval.config import EvalConfig
from finemill.components.eval.metrics import deltas, score
from finemill.components.eval.sample import score_answer
from finemill.models.generation import Answer
from finemill.models.reply import Reply
from finemill.models.sampling import Sampling

# Chats that a GGUF file answers at once.
_PARALLEL = 4


def find_others(config: EvalConfig, base_model: str) -> dict[str, FoundModel]:
    """The further models by name, before anything is spent on the first. Raises: UserError: one is not there."""
    return {name: find_model(model, base_model=base_model) for name, model in config.models.items()}


def read_chain(found: Iterable[FoundModel]) -> list[ChainLink]:
    """How the models that were exported differ from what they were made of, as merge and gguf-quantize recorded it."""
    links: dict[tuple[str, str], ChainLink] = {}
    for model in found:
        merged = read_merge(model.folder) if model.folder and not model.adapter else None
        files = model.gguf.parent if model.gguf else None
        quantized = read_gguf_record(files).chain if files and (files / GGUF_FILE).is_file() else ()
        links.update({(link.name, link.against): link for link in (*(merged.chain if merged else ()), *quantized)})
    return sorted(links.values(), key=lambda link: link.against == "merged")


def ask_others(
    found: Mapping[str, FoundModel],
    dataset: Path,
    config: EvalConfig,
    stops: Sequence[str],
    on_progress: Callable[[str], None],
) -> dict[str, list[Sample]]:
    """Every model's scored answers; rows with tools, which a chat here does not offer, are left out.

    Args:
        stops: texts that end a turn, which a reference ends with.
    """
    rows = _rows(dataset, config)
    answered: dict[str, list[Sample]] = {}
    for name, model in found.items():
        on_progress(f"{name}: loading")
        _free_memory()
        with open_model(model, load_in_4bit=config.load_in_4bit, parallel=_PARALLEL) as opened:
            replies = _ask(opened, rows, config)
        on_progress(f"{name}: {len(rows)} rows answered")
        answered[name] = [_scored(row, name, reply, stops, config) for row, reply in zip(rows, replies, strict=True)]
    return answered


def summarize_others(base: Sequence[Sample], others: Mapping[str, Sequence[Sample]]) -> dict[str, float]:
    """`eval/<name>/<metric>`, and `eval/<name>/delta/<metric>`: less base on the same rows, with standard errors."""
    by_id = {sample.id: sample for sample in base}
    metrics: dict[str, float] = {}
    for name, samples in others.items():
        scores = score(samples)
        if not any(sample.num_generated_tokens for sample in samples):
            # An endpoint that does not say how long its answers are.
            del scores["generated_tokens"]
        metrics |= {model_metric(name, metric): value for metric, value in scores.items()}
        changes = deltas([by_id[sample.id] for sample in samples], samples)
        prefix = delta_metric("").removeprefix("eval/")
        metrics |= {model_metric(name, f"{prefix}{metric}"): value for metric, value in changes.items()}
    return metrics


def _rows(dataset: Path, config: EvalConfig) -> list[DatasetRow]:
    rows = read_dataset_rows(dataset, config.split)
    return [row for row in spread(rows, config.max_rows or len(rows)) if not row.tools and _asked(row)]


def _asked(row: DatasetRow) -> list[dict[str, str]]:
    """The chat up to the answer that is wanted; none for a text without turns."""
    messages: list[dict[str, str]] = json.loads(row.messages)
    return messages[:-1] if len(messages) > 1 and messages[-1]["role"] == "assistant" else []


def _ask(model: OpenModel, rows: Sequence[DatasetRow], config: EvalConfig) -> list[Reply]:
    """The replies in the order of the rows; rows that think are asked apart from those that do not."""
    sampling = Sampling(config.temperature, config.top_p, config.top_k, config.min_p, config.seed)
    switches = [json.loads(row.chat_template_kwargs).get("enable_thinking") for row in rows]
    replies: dict[int, Reply] = {}
    for thinking in dict.fromkeys(switches):
        indices = [index for index, other in enumerate(switches) if other is thinking]
        found = model.answers(
            [_asked(rows[index]) for index in indices],
            sampling=sampling,
            max_new_tokens=config.max_new_tokens,
            thinking=thinking,
        )
        replies.update(zip(indices, found, strict=True))
    return [replies[index] for index in range(len(rows))]


def _scored(row: DatasetRow, name: str, reply: Reply, stops: Sequence[str], config: EvalConfig) -> Sample:
    # The reply has its own opening mark: the prompt's would make thinking of the answer.
    plain = replace(row, prompt="") if not reply.thinking else row
    answer = Answer(reply.text, reply.num_tokens or 0, reply.finished)
    schema = json.dumps(config.json_schema) if config.json_schema else None
    sample = score_answer(plain, name, answer, (0.0, 0), stops, schema=schema, pattern=config.pattern)
    return replace(sample, prompt=row.prompt)


def _free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
