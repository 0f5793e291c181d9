"""`finemill samples EVALUATION`: the rows of an evaluation as JSON lines, for other tools, `score` and data-prep."""

import argparse
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from finemill.artifacts.evaluation import SCORES, Sample, read_samples
from finemill.commands.parser import CommandParser
from finemill.components.eval.report import segments
from finemill.errors import UserError
from finemill.storage.store import artifact_folder


def execute(name: str, arguments: list[str]) -> int:
    """Print a line per row and model. Returns: the exit code."""
    parsed = _parser(name).parse_args(arguments)
    samples = read_samples(artifact_folder(parsed.evaluation, "evaluation", "eval"))
    models = list(dict.fromkeys(sample.model for sample in samples))
    if parsed.model:
        if parsed.model not in models:
            raise UserError(f"samples: no model '{parsed.model}' in the evaluation; it has {', '.join(models)}")
        samples = [sample for sample in samples if sample.model == parsed.model]
    for line in _FORMATS[parsed.format](samples):
        print(json.dumps(line, ensure_ascii=False, allow_nan=False))
    return 0


def _parser(name: str) -> argparse.ArgumentParser:
    parser = CommandParser(
        prog=f"finemill {name}",
        description="Print an evaluation's rows as JSON lines. `score` is what `finemill score` reads; `evalscope` is "
        "EvalScope's general_qa (query, or the messages of a longer chat, and the right response, a line per row), so "
        "that it asks any model the same; `weave` holds the arguments of weave.EvaluationLogger's log_example for each "
        "answer; `mlflow` is the data of mlflow.genai.evaluate, the answers given, so that its scorers judge them; "
        "`preferences` is what data-prep reads for DPO, the reference chosen and a model's own answer rejected (SPIN), "
        "where they differ.",
        allow_abbrev=False,
    )
    parser.add_argument("evaluation", metavar="EVALUATION", help="eval's reference, <uri>@sha256:<digest>, or folder")
    parser.add_argument("--format", choices=tuple(_FORMATS), default="score", help="default: score")
    parser.add_argument("--model", metavar="NAME", help="only these answers: base, tuned, or another model's")
    return parser


def _for_score(samples: Sequence[Sample]) -> Iterator[Mapping[str, Any]]:
    for sample in samples:
        yield {
            "prediction": sample.completion,
            "reference": sample.answer if sample.answer is not None else sample.reference,
            "source": sample.source,
            "prompt": sample.prompt,
            "finished": sample.finished,
            "id": sample.id,
            "model": sample.model,
        }


def _for_evalscope(samples: Sequence[Sample]) -> Iterator[Mapping[str, Any]]:
    for sample in {sample.id: sample for sample in samples}.values():
        messages = _messages(sample.prompt)
        response = sample.answer if sample.answer is not None else sample.reference
        asked = {message["role"]: message["content"] for message in messages}
        if len(asked) < len(messages) or not asked.keys() <= {"system", "user"}:
            yield {"messages": messages, "response": response}
        else:
            system = {"system": asked["system"]} if "system" in asked else {}
            yield {**system, "query": asked["user"], "response": response}


def _for_weave(samples: Sequence[Sample]) -> Iterator[Mapping[str, Any]]:
    for sample in samples:
        scores = {name: getattr(sample, name) for name in sorted(SCORES)}
        yield {
            "model": sample.model,
            "inputs": {
                "id": sample.id,
                "prompt": sample.prompt,
                "reference": sample.reference,
                "answer": sample.answer,
                "source": sample.source,
            },
            "output": sample.completion,
            "scores": {name: value for name, value in scores.items() if value is not None},
        }


def _for_mlflow(samples: Sequence[Sample]) -> Iterator[Mapping[str, Any]]:
    for sample in samples:
        expected = {"expected_response": sample.reference}
        yield {
            "inputs": {"id": sample.id, "prompt": sample.prompt},
            "outputs": sample.completion,
            "expectations": expected if sample.answer is None else {**expected, "answer": sample.answer},
            "tags": {"model": sample.model, "source": sample.source, "outcome": sample.outcome},
        }


def _for_preferences(samples: Sequence[Sample]) -> Iterator[Mapping[str, Any]]:
    for sample in samples:
        chosen, rejected = sample.reference, sample.completion
        if not sample.finished or not rejected.strip() or rejected.strip() == chosen.strip():
            continue
        yield {
            "prompt": _messages(sample.prompt),
            "chosen": [{"role": "assistant", "content": chosen}],
            "rejected": [{"role": "assistant", "content": rejected}],
        }


def _messages(prompt: str) -> list[dict[str, str]]:
    """The turns of a rendered prompt where its template's marks are known; else all of it as a question."""
    found: list[dict[str, str]] = []
    for kind, text in segments(prompt):
        if kind == "role":
            found.append({"role": text, "content": ""})
        elif kind == "text" and found:
            found[-1]["content"] += text
    turns = [message for message in found if message["content"]]
    return turns if any(turn["role"] == "user" for turn in turns) else [{"role": "user", "content": prompt}]


_FORMATS: Mapping[str, Callable[[Sequence[Sample]], Iterator[Mapping[str, Any]]]] = {
    "score": _for_score,
    "evalscope": _for_evalscope,
    "weave": _for_weave,
    "mlflow": _for_mlflow,
    "preferences": _for_preferences,
}
