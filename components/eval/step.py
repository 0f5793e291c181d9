"""The step eval: base and tuned model answer the same held-out rows."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from finemill.artifacts.adapter import has_tokenizer
from finemill.artifacts.dataset import HeldOutRow, prompt_ids, read_held_out, spread
from finemill.artifacts.evaluation import Sample, write_metrics, write_samples
from finemill.artifacts.metrics import ModelName
from finemill.components.eval.config import EvalConfig
from finemill.components.eval.loss import assistant_losses
from finemill.components.eval.metrics import summarize
from finemill.components.eval.report import write_reports
from finemill.components.eval.sample import score_answer
from finemill.models.adapter import load_adapter
from finemill.models.causal_lm import load_causal_lm, suitable_threads
from finemill.models.generation import Sampling, generate_answers, stop_token_ids
from finemill.runtime.context import StepContext


def run(
    *, dataset: Path, base_model: Path, adapter: Path, output_dir: Path, config: EvalConfig, context: StepContext
) -> Mapping[str, float]:
    """Write metrics.json, samples.parquet, report.html and report.md; return the metrics.

    Both models are one load: the base is the tuned model with its adapter switched off.

    Raises: UserError: the split is empty, or the adapter does not fit the base.
    """
    from transformers import AutoTokenizer

    rows = read_held_out(dataset, config.split)
    rows = spread(rows, config.max_rows or len(rows))
    context.recorder.log_progress(f"loading the model for {len(rows)} rows")
    tokenizer = AutoTokenizer.from_pretrained(
        adapter if has_tokenizer(adapter) else base_model, trust_remote_code=False
    )
    tuned = load_adapter(load_causal_lm(base_model), adapter)
    stops = stop_token_ids(tokenizer, base_model)
    samples: dict[ModelName, list[Sample]] = {}
    switches: dict[ModelName, AbstractContextManager[Any]] = {"base": tuned.disable_adapter(), "tuned": nullcontext()}
    for name, switch in switches.items():
        with switch, suitable_threads(tuned):
            samples[name] = score_rows(tuned, tokenizer, rows, name, stops, config, context)
    metrics = summarize(samples["base"], samples["tuned"])
    write_metrics(output_dir, metrics)
    write_samples(output_dir, [*samples["base"], *samples["tuned"]])
    write_reports(output_dir, samples["base"], samples["tuned"], metrics, adapter, config, context)
    return metrics


def score_rows(
    model: Any,
    tokenizer: Any,
    rows: Sequence[HeldOutRow],
    name: ModelName,
    stops: Sequence[int],
    config: EvalConfig,
    context: StepContext,
) -> list[Sample]:
    """Answer and score every row with `model`, which the samples call `name`."""
    losses = assistant_losses(model, rows)
    worse = {index: other for index, row in enumerate(rows) if (other := row.with_rejected)}
    rejected_losses = dict(zip(worse, assistant_losses(model, list(worse.values())), strict=True))
    answers = generate_answers(
        model,
        tokenizer,
        [prompt_ids(row, tokenizer) for row in rows],
        stop_token_ids=stops,
        max_new_tokens=config.max_new_tokens,
        sampling=Sampling(config.temperature, config.top_p, config.top_k, config.seed),
        batch_size=config.batch_size,
        on_progress=lambda done: context.recorder.log_progress(f"{name}: {done} of {len(rows)} rows"),
    )
    stop_texts = tokenizer.convert_ids_to_tokens(list(stops))
    return [
        score_answer(row, name, answer, loss, stop_texts, rejected_losses.get(index))
        for index, (row, answer, loss) in enumerate(zip(rows, answers, losses, strict=True))
    ]
