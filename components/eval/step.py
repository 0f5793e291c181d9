"""The step eval: base and tuned model answer the same held-out rows."""

import itertools
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from finemill.artifacts.adapter import has_tokenizer
from finemill.artifacts.dataset import HeldOutRow, prompt_ids, read_held_out, spread
from finemill.artifacts.evaluation import Sample, write_metrics, write_samples
from finemill.artifacts.metrics import ModelName
from finemill.components.eval.answer import answer_both, switches
from finemill.components.eval.config import EvalConfig
from finemill.components.eval.harness import read_tasks, score_tasks
from finemill.components.eval.loss import assistant_losses
from finemill.components.eval.metrics import summarize
from finemill.components.eval.others import ask_others, find_others, read_chain, summarize_others
from finemill.components.eval.regression import read_regression_set, score_regression
from finemill.components.eval.report import write_reports
from finemill.components.eval.sample import score_answer
from finemill.errors import UserError
from finemill.metrics.rules import keeps_pattern, read_schema
from finemill.metrics.statistics import detectable_change
from finemill.models.adapter import check_base, load_adapter
from finemill.models.base.resolve import resolve_base_model
from finemill.models.causal_lm import load_causal_lm, suitable_threads
from finemill.models.generation import Answer, stop_token_ids
from finemill.models.sampling import Sampling
from finemill.models.token_rows import check_token_ids
from finemill.runtime.context import StepContext

logger = logging.getLogger(__name__)

_TASK_BATCH = 16
"""Rows at once of a task of lm-evaluation-harness, where none is asked for."""


def run(
    *, dataset: Path, base_model: Path, adapter: Path, output_dir: Path, config: EvalConfig, context: StepContext
) -> Mapping[str, float]:
    """Write metrics.json, samples.parquet, report.html and report.md; return the metrics.

    Both models are one load: the base is the tuned model with its adapter switched off.

    Raises: UserError: the split is empty, the base is not the adapter's own, the dataset is of another tokenizer, or a
        loss is no number.
    """
    from transformers import AutoTokenizer

    _check_rules(config)
    _check_base(adapter, config, context)
    further = find_others(config, context.references["base_model"])
    links = read_chain(further.values())
    rows = read_held_out(dataset, config.split)
    rows = spread(rows, config.max_rows or len(rows))
    context.recorder.log_progress(f"loading the model for {len(rows)} rows")
    num_problems = sum(row.answer is not None for row in rows)
    if num_problems:
        points = 100 * detectable_change(num_problems)
        context.recorder.log_progress(f"{num_problems} rows with a known answer can show {points:.0f} points")
    tokenizer = AutoTokenizer.from_pretrained(
        adapter if has_tokenizer(adapter) else base_model, trust_remote_code=False
    )
    questions = read_regression_set(tokenizer) if config.regression else None
    tasks = read_tasks(config.lm_eval_tasks)
    tuned = load_adapter(_load_base(base_model, config), adapter)
    check_token_ids((row.input_ids for row in rows), tuned.get_input_embeddings().weight.shape[0], dataset)
    stops = stop_token_ids(tokenizer, base_model)
    answers = answer_both(
        tuned,
        adapter,
        tokenizer,
        [*(prompt_ids(row, tokenizer) for row in rows), *(questions.token_ids if questions else ())],
        stop_token_ids=stops,
        max_new_tokens=config.max_new_tokens,
        sampling=Sampling(config.temperature, config.top_p, config.top_k, config.min_p, config.seed),
        batch_size=config.batch_size,
        on_progress=context.recorder.log_progress,
    )
    samples: dict[ModelName, list[Sample]] = {}
    for name, switch in switches(tuned).items():
        with switch(), suitable_threads(tuned):
            samples[name] = score_rows(tuned, tokenizer, rows, answers[name][: len(rows)], name, stops, config)
    of_tasks: dict[str, float] = {}
    if tasks:
        context.recorder.log_progress(f"{len(tasks)} tasks of lm-evaluation-harness")
        of_tasks = score_tasks(
            tasks,
            tuned,
            tokenizer,
            switches(tuned),
            batch_size=config.batch_size or _TASK_BATCH,
            limit=config.max_rows,
            chat=config.lm_eval_chat,
        )
    # A model at a time: the memory of this one is needed.
    del tuned, switch
    stop_texts = tokenizer.convert_ids_to_tokens(list(stops))
    others = ask_others(further, dataset, config, stop_texts, context.recorder.log_progress)
    metrics = summarize(samples["base"], samples["tuned"]) | summarize_others(samples["base"], others) | of_tasks
    if questions:
        metrics |= score_regression(questions, {name: found[len(rows) :] for name, found in answers.items()})
    write_metrics(output_dir, metrics)
    write_samples(output_dir, [*samples["base"], *samples["tuned"], *itertools.chain(*others.values())])
    write_reports(output_dir, samples["base"], samples["tuned"], others, metrics, adapter, config, context, links)
    return metrics


def _check_rules(config: EvalConfig) -> None:
    """Raises: UserError: the schema is no JSON schema, or the pattern no regular expression."""
    if config.json_schema:
        read_schema(config.json_schema)
    if config.pattern:
        keeps_pattern("", config.pattern)


def _check_base(adapter: Path, config: EvalConfig, context: StepContext) -> None:
    """Raises: UserError: the base is another than the adapter was trained on, or there is no telling."""
    manifest = context.manifests.get("adapter")
    try:
        check_base(adapter, manifest.parents if manifest else {}, resolve_base_model(context.references["base_model"]))
    except UserError as error:
        if not config.force:
            raise UserError(f"eval: {error}; --force true scores them all the same") from None
        logger.warning("forced: %s", error)


def _load_base(base_model: Path, config: EvalConfig) -> Any:
    """Raises: UserError: there is no such device."""
    if config.device == "cuda" and not torch.cuda.is_available():
        raise UserError("eval: device is cuda, and PyTorch finds no GPU here: use device auto or cpu")
    return load_causal_lm(
        base_model,
        device=None if config.device == "auto" else torch.device(config.device),
        dtype=None if config.dtype == "auto" else getattr(torch, config.dtype),
        load_in_4bit=config.load_in_4bit,
    )


def score_rows(
    model: Any,
    tokenizer: Any,
    rows: Sequence[HeldOutRow],
    answers: Sequence[Answer],
    name: ModelName,
    stops: Sequence[int],
    config: EvalConfig,
) -> list[Sample]:
    """Score the `answers` of `model`, which the samples call `name`, and its losses on the references."""
    losses = assistant_losses(model, rows)
    _check_finite(losses, rows, name)
    worse = {index: other for index, row in enumerate(rows) if (other := row.with_rejected)}
    rejected_losses = dict(zip(worse, assistant_losses(model, list(worse.values())), strict=True))
    stop_texts = tokenizer.convert_ids_to_tokens(list(stops))
    schema = read_schema(config.json_schema) if config.json_schema else None
    return [
        score_answer(
            row, name, answer, loss, stop_texts, rejected_losses.get(index), schema=schema, pattern=config.pattern
        )
        for index, (row, answer, loss) in enumerate(zip(rows, answers, losses, strict=True))
    ]


def _check_finite(losses: Sequence[tuple[float, int]], rows: Sequence[HeldOutRow], name: ModelName) -> None:
    """Raises: UserError: the model's numbers have overflowed, so that none of its scores means anything."""
    broken = [row.id for row, (total, _) in zip(rows, losses, strict=True) if not math.isfinite(total)]
    if broken:
        raise UserError(
            f"eval: the {name} model's loss is no number on {len(broken)} of {len(rows)} rows, first on {broken[0]}: "
            "its weights or its arithmetic overflow; try dtype bfloat16 or float32, or train with a lower learning_rate"
        )
