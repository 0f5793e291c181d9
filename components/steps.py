"""The steps by name: what each reads, what it writes, and where its code is.

A new step is one line here and one folder. The line is data, so that `--help`, both pipeline renderers and the
component wrappers agree without importing what a step computes with.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from finemill.components.config import StepConfig
from finemill.components.errors import UserError

BASE_MODEL = "base_model"
"""The one input that is not written by a step: a model reference, resolved by `base_model/resolve.py`."""


@dataclass(frozen=True)
class Step:
    """One step of the line.

    `function(**inputs, output_dir, config, context) -> Mapping[str, float]` gets a local folder per input and returns
    the metrics. `state(inputs, config) -> Mapping[str, str]`, where there is one, names what the output depends on
    besides inputs, configuration and code: files outside the store, the champion of a registry.
    """

    name: str
    summary: str
    inputs: tuple[str, ...]
    output: str
    config_path: str
    function_path: str
    image: str
    state_path: str | None = None
    verdict: str | None = None
    """Name of a yes or no besides the output; its value is the metric `<module name>/<verdict>`, 1 or 0."""
    section: str | None = None
    """The section of a pipeline's configuration that this step reads, where it shares another step's."""
    multi_process: bool = False
    """Whether several processes can compute it together, one a GPU; of another step only the main process computes."""
    fetches_inputs: bool = True
    """Whether the function gets the inputs' folders: one that only refers to models should not fetch them."""

    @property
    def config_section(self) -> str:
        """Where a pipeline's configuration holds this step's."""
        return self.section or self.module_name

    @property
    def module_name(self) -> str:
        """The step's folder: its name in snake case."""
        return self.name.replace("-", "_")

    def verdict_text(self, metrics: Mapping[str, float]) -> str:
        """The verdict as both engines compare it, `true` or `false`."""
        return "true" if metrics[f"{self.module_name}/{self.verdict}"] else "false"

    @property
    def config(self) -> type[StepConfig]:
        """The configuration class; light to import."""
        loaded: type[StepConfig] = _load(self.config_path)
        return loaded

    @property
    def function(self) -> Callable[..., Mapping[str, float]]:
        """The function that does the work; imports what it computes with."""
        loaded: Callable[..., Mapping[str, float]] = _load(self.function_path)
        return loaded

    @property
    def state(self) -> Callable[..., Mapping[str, str]] | None:
        """What else the output depends on, see the class."""
        return _load(self.state_path) if self.state_path else None


def _load(path: str) -> Any:
    module, name = path.split(":")
    return getattr(import_module(f"finemill.components.{module}"), name)


_ALL = (
    Step(
        "preflight",
        "Check store, credentials, tracking server, base model, configuration and GPU memory before anything is spent.",
        (),
        "plan",
        "preflight.config:PreflightConfig",
        "preflight.check:check_run",
        image="cpu",
        state_path="preflight.check:check_time",
    ),
    Step(
        "data-prep",
        "Read raw rows, clean, deduplicate, mix and split them.",
        (),
        "rows",
        "data_prep.config:DataPrepConfig",
        "data_prep.prepare:prepare_data",
        image="cpu",
        state_path="data_prep.load:source_digests",
    ),
    Step(
        "chat-format",
        "Turn rows into messages, apply the model's own chat template, label the assistant's turns.",
        ("rows", BASE_MODEL),
        "dataset",
        "chat_format.config:ChatFormatConfig",
        "chat_format.format:format_chats",
        image="cpu",
        state_path="chat_format.template:template_state",
    ),
    Step(
        "detect-change",
        "Tell whether the dataset differs from the one behind the newest registered version.",
        ("dataset",),
        "change",
        "register.config:RegisterConfig",
        "detect_change.detect:detect_change",
        image="cpu",
        state_path="detect_change.detect:newest_version",
        verdict="changed",
        section="register",
    ),
    Step(
        "train-qlora",
        "Train LoRA adapters on the 4-bit base.",
        ("dataset", BASE_MODEL),
        "adapter",
        "train_qlora.config:TrainQLoRAConfig",
        "train_qlora.train:train_qlora",
        image="train",
        multi_process=True,
    ),
    Step(
        "train-dpo",
        "Train LoRA adapters on preferences, the 4-bit base as reference (DPO).",
        ("dataset", BASE_MODEL),
        "adapter",
        "train_dpo.config:TrainDPOConfig",
        "train_dpo.train:train_dpo",
        image="train",
        multi_process=True,
    ),
    Step(
        "eval",
        "Score base and tuned model on held-out rows, and write the report.",
        ("dataset", BASE_MODEL, "adapter"),
        "evaluation",
        "eval.config:EvalConfig",
        "eval.evaluate:evaluate",
        image="train",
    ),
    Step(
        "merge",
        "Merge the adapter into the unquantized base, 16 bit, and check its logits.",
        (BASE_MODEL, "adapter"),
        "model",
        "merge.config:MergeConfig",
        "merge.merge:merge_adapter",
        image="train",
    ),
    Step(
        "gguf-quantize",
        "Write GGUF files, load each in llama.cpp, and compare them with the merged model.",
        ("model", "dataset"),
        "gguf",
        "gguf_quantize.config:GGUFQuantizeConfig",
        "gguf_quantize.quantize:quantize_gguf",
        image="train",
    ),
    Step(
        "register",
        "Record the results as a version in MLflow's model registry.",
        ("adapter", "model", "gguf", "evaluation"),
        "version",
        "register.config:RegisterConfig",
        "register.register:register_version",
        image="cpu",
        state_path="register.register:registry_state",
        fetches_inputs=False,
    ),
    Step(
        "score-champion",
        "Score the champion on the rows that the new version was scored on, unless it was before.",
        ("evaluation",),
        "champion",
        "register.config:RegisterConfig",
        "score_champion.score:score_champion",
        image="train",
        state_path="score_champion.score:champion_state",
        section="register",
        fetches_inputs=False,
    ),
    Step(
        "promote",
        "Compare the new version with the champion and move the alias if it wins.",
        ("version", "evaluation"),
        "decision",
        "promote.config:PromoteConfig",
        "promote.promote:promote_version",
        image="cpu",
        state_path="promote.promote:champion_state",
        verdict="promotion_passed",
    ),
)

STEPS: Mapping[str, Step] = {step.name: step for step in _ALL}


def get_step(name: str) -> Step:
    """Raises: UserError: there is no step of that name."""
    if name not in STEPS:
        raise UserError(f"unknown step '{name}'; the steps are {', '.join(STEPS)}")
    return STEPS[name]
