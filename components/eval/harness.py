"""Tasks of lm-evaluation-harness, by files that a user brings, for base and tuned; nothing is fetched."""

import contextlib
import io
import logging
import os
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import yaml

from finemill.artifacts.metrics import MODELS, ModelName, delta_metric, metric_parts, model_metric, stderr_of
from finemill.errors import UserError
from finemill.metrics.statistics import mean, paired_rate_error, rate_error, standard_error

PREFIX = "lm_eval"
_FORMATS = ("json", "csv", "parquet", "arrow", "text")
# What runs Python, reads other files, or asks a server for a prompt.
_REFUSED = ("include", "custom_dataset", "use_prompt", "unsafe_code", "group", "class")
Scores = Mapping[str, Mapping[int, float]]
"""The value of each row by the row's number, by `<task>/<metric>`."""


def task_files(paths: Sequence[str]) -> list[Path]:
    """The task files and the data files that they name. Raises: UserError: one is missing or cannot be used."""
    found = []
    for path in paths:
        found += [Path(path).expanduser(), *(Path(name) for name in _data_files(_read(path)))]
    return found


def read_tasks(paths: Sequence[str]) -> list[dict[str, Any]]:
    """The tasks as lm-evaluation-harness takes them, data files by their whole path.

    Raises: UserError: a file is missing, is no task, or asks for code or for data that is not there.
    """
    tasks = [_read(path) for path in paths]
    names = [task["task"] for task in tasks]
    if len(set(names)) < len(names):
        raise UserError(
            f"eval: lm_eval_tasks has a task twice: {', '.join(sorted(names))}; give each a name of its own"
        )
    return tasks


def _read(text: str) -> dict[str, Any]:
    path = Path(text).expanduser()
    try:
        task = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"eval: lm_eval_tasks: {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        said = " ".join(str(error).split())[:160]
        raise UserError(f"eval: lm_eval_tasks: {path}: {said}; a task here names no Python code (!function)") from None
    if not isinstance(task, dict) or not isinstance(task.get("task"), str):
        raise UserError(f"eval: lm_eval_tasks: {path} is no task of lm-evaluation-harness: it has no name under `task`")
    refused = sorted(task.keys() & set(_REFUSED))
    if refused:
        raise UserError(f"eval: lm_eval_tasks: {path} uses {', '.join(refused)}: write the task in one file, as data")
    arguments = task.get("dataset_kwargs") or {}
    if task.get("dataset_path") not in _FORMATS or "data_files" not in arguments:
        raise UserError(
            f"eval: lm_eval_tasks: {path}: nothing is fetched: `dataset_path` is one of {', '.join(_FORMATS)}, and "
            "`dataset_kwargs.data_files` names files beside the task"
        )
    task["dataset_kwargs"] = {**arguments, "data_files": _absolute(arguments["data_files"], path.parent)}
    for name in _data_files(task):
        if not Path(name).is_file():
            raise UserError(f"eval: lm_eval_tasks: {path}: no file {name}")
    return task


def _absolute(files: Any, folder: Path) -> Any:
    if isinstance(files, Mapping):
        return {split: _absolute(names, folder) for split, names in files.items()}
    if isinstance(files, list):
        return [_absolute(name, folder) for name in files]
    return str((folder / str(files)).absolute())


def _data_files(task: Mapping[str, Any]) -> list[str]:
    files = task["dataset_kwargs"]["data_files"]
    groups = files.values() if isinstance(files, Mapping) else (files,)
    return [name for group in groups for name in (group if isinstance(group, list) else [group])]


def score_tasks(
    tasks: Sequence[Mapping[str, Any]],
    tuned: Any,
    tokenizer: Any,
    switches: Mapping[ModelName, Callable[[], AbstractContextManager[Any]]],
    *,
    batch_size: int,
    limit: int | None,
    chat: bool,
) -> dict[str, float]:
    """`eval/<model>/lm_eval/<task>/<metric>` with errors, and the paired changes.

    Args:
        tuned: a PEFT model; each of `switches` makes it answer as one of the models.
        limit: most rows of a task.
        chat: whether questions are put in the tokenizer's chat template.
    Raises: UserError: the library is not installed, or it refuses a task.
    """
    try:
        from lm_eval import evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import get_task_dict
    except ImportError:
        raise UserError(
            "eval: lm_eval_tasks are answered by lm-evaluation-harness, which is not installed: "
            "pip install 'finemill[lm-eval]'"
        ) from None
    scores: dict[ModelName, Scores] = {}
    with tempfile.TemporaryDirectory() as cache, _quiet():
        known = [{**task, "dataset_kwargs": {**task["dataset_kwargs"], "cache_dir": cache}} for task in tasks]
        for name, switch in switches.items():
            with switch():
                model = HFLM(pretrained=tuned.get_base_model(), tokenizer=tokenizer, batch_size=batch_size)
                try:
                    found = evaluate(
                        model, get_task_dict(known), limit=limit, bootstrap_iters=0, apply_chat_template=chat
                    )
                except Exception as error:
                    said = " ".join(str(error).split())[:200]
                    raise UserError(f"eval: lm-evaluation-harness refuses a task: {said}") from error
            scores[name] = _by_row(found["samples"])
    return summarize_tasks(scores)


def _by_row(samples: Mapping[str, Sequence[Mapping[str, Any]]]) -> Scores:
    """Metrics whose value for a row is a number, by the name that the harness prints them under."""
    found: dict[str, dict[int, float]] = defaultdict(dict)
    parts = metric_parts(samples)
    for task, rows in samples.items():
        for row in rows:
            chosen = "" if row["filter"] == "none" else f"_{row['filter']}"
            for metric in row["metrics"]:
                if isinstance(row[metric], int | float):
                    found[f"{parts[task]}/{metric}{chosen}"][row["doc_id"]] = float(row[metric])
    return found


def summarize_tasks(scores: Mapping[ModelName, Scores]) -> dict[str, float]:
    """Means, standard errors and the change from base to tuned, row by row."""
    metrics: dict[str, float] = {}
    for name, base in scores["base"].items():
        key = f"{PREFIX}/{name}"
        rate = all(value in (0.0, 1.0) for model in MODELS for value in scores[model][name].values())
        for model in MODELS:
            values = list(scores[model][name].values())
            metrics[model_metric(model, key)] = mean(values)
            metrics[stderr_of(model_metric(model, key))] = rate_error(values) if rate else standard_error(values)
        changes = [scores["tuned"][name][row] - value for row, value in base.items()]
        metrics[delta_metric(key)] = mean(changes)
        metrics[stderr_of(delta_metric(key))] = paired_rate_error(changes) if rate else standard_error(changes)
    return metrics


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the library's bars and notes; and without a hub, which a metric or a data set would be fetched from."""
    offline = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_EVALUATE_OFFLINE")
    before = {name: os.environ.get(name) for name in offline}
    os.environ.update(dict.fromkeys(offline, "1"))
    logger, level = logging.getLogger("lm_eval"), logging.getLogger("lm_eval").level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)
        for name, value in before.items():
            if value is None:
                os.environ.pop(name)
            else:
                os.environ[name] = value
