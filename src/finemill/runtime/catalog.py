"""The steps by name: what each reads, what it writes, and where its code is.

A new step is one line here and one folder. The line is data and light to import, so that `finemill --help`, both
pipeline renderers and the component wrappers agree without importing what a step computes with.
"""

import atexit
import gc
from collections.abc import Callable, Mapping
from importlib import import_module
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

from finemill.artifacts.files import REPORT_PAGE, REPORT_TEXT
from finemill.artifacts.ports import BASE_MODEL
from finemill.errors import UserError

if TYPE_CHECKING:
    from finemill.config import StepConfig
    from finemill.models.base.resolve import Part


class Step(NamedTuple):
    """One step of the line.

    Its folder has the step's name. In `step.py` there, `run(**inputs, output_dir, config, context)` gets a local folder
    per input and returns the metrics, finite numbers by name. `state(inputs, config, tracking)`, where there is one,
    names what the output depends on besides inputs, configuration and code: files outside the store, the champion of a
    registry.
    """

    name: str
    summary: str
    """One sentence: what `finemill --help` says of it."""
    inputs: tuple[str, ...]
    output: str
    config_name: str
    """The class in the folder's `config.py`."""
    image: str
    state_name: str | None = None
    """`<module>:<function>` in the folder: light to import, because a step whose output is there runs nothing else."""
    verdict: str | None = None
    """Name of a yes or no besides the output; its value is the metric `<module name>/<verdict>`, 1 or 0."""
    shown: Mapping[str, str] = MappingProxyType({})
    """Small files of the output that KFP's page shows, HTML or Markdown, by the name of the component's port."""
    output_kind: str | None = None
    """The kind of artifact that it writes, where the output has a name of its own: a step that reads the same kind."""
    section: str | None = None
    """The section of a pipeline's configuration that this step reads, where it shares another step's."""
    section_class_name: str | None = None
    """The class in the folder's `config.py` of what that section holds, where it is not the whole configuration."""
    base_part: "Part" = "model"
    """The part of the base model that it reads: no other is fetched, nor changes its output."""
    multi_process: bool = False
    """Whether several processes can compute it together, one a GPU; of another step only the main process computes."""
    fetches_inputs: bool = True
    """Whether the function gets the inputs' folders: one that only refers to models should not fetch them."""
    needs_registry: bool = False
    """Whether it reads or writes MLflow's model registry: preflight asks for it where a pipeline has such a step."""
    checks_sections: bool = False
    """Whether its configuration gets a pipeline's base model and the other steps' sections, to check them."""
    cluster_only: bool = False
    """Whether a pipeline on one machine goes without it, since the caller or another step does there what it does."""

    @property
    def outputs(self) -> tuple[str, ...]:
        """Every output port: the artifact, what is shown of it, the verdict."""
        return (self.output, *self.shown, *([self.verdict] if self.verdict else []))

    @property
    def kind(self) -> str:
        """The kind of artifact that it writes: an input of that name takes it."""
        return self.output_kind or self.output

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
    def config(self) -> "type[StepConfig]":
        """The configuration class."""
        loaded: type[StepConfig] = self._load(f"config:{self.config_name}")
        return loaded

    @property
    def section_class(self) -> "type[StepConfig]":
        """The class of its section in a pipeline's configuration."""
        loaded: type[StepConfig] = self._load(f"config:{self.section_class_name or self.config_name}")
        return loaded

    @property
    def function(self) -> Callable[..., Mapping[str, float]]:
        """The function that does the work; imports what it computes with."""
        # A million objects and no garbage: to search them meanwhile takes a quarter of the time, and again for each
        # collection that a trainer asks for.
        collecting = gc.isenabled()
        gc.disable()
        try:
            if self.image == "train" and BASE_MODEL in self.inputs:
                from finemill.models.bitsandbytes_import import import_bitsandbytes

                import_bitsandbytes()
            loaded: Callable[..., Mapping[str, float]] = self._load("step:run")
        finally:
            gc.freeze()
            atexit.register(gc.unfreeze)  # libraries complain of what is left at the exit
            if collecting:
                gc.enable()
        return loaded

    @property
    def state(self) -> Callable[..., Mapping[str, str]] | None:
        """What else the output depends on, see the class."""
        return self._load(self.state_name) if self.state_name else None

    def _load(self, path: str) -> Any:
        module, name = path.split(":")
        return getattr(import_module(f"finemill.components.{self.module_name}.{module}"), name)


_ALL = (
    Step(
        "preflight",
        "Check configuration, store, tracking server, base model and GPU memory before anything is spent.",
        inputs=(),
        output="plan",
        config_name="PreflightConfig",
        image="cpu",
        state_name="step:check_time",
        section_class_name="PreflightSettings",
        checks_sections=True,
        # `finemill run` has checked configuration and store.
        cluster_only=True,
    ),
    Step(
        "data-prep",
        "Read raw rows, clean, deduplicate and split them.",
        inputs=(),
        output="rows",
        config_name="DataPrepConfig",
        image="cpu",
        state_name="load:source_digests",
    ),
    Step(
        "synthesize",
        "Have a model behind an OpenAI-compatible address write, translate or judge training rows.",
        inputs=("rows",),
        output="synthetic_rows",
        output_kind="rows",
        config_name="SynthesizeConfig",
        image="cpu",
    ),
    Step(
        "chat-format",
        "Apply the model's own chat template to rows, label the assistant's turns, keep the sources' shares.",
        inputs=("rows", BASE_MODEL),
        output="dataset",
        config_name="ChatFormatConfig",
        image="cpu",
        state_name="template:template_state",
        base_part="tokenizer",
    ),
    Step(
        "detect-change",
        "Tell whether the dataset differs from the one behind the newest registered version.",
        inputs=("dataset",),
        output="change",
        config_name="RegisterConfig",
        image="cpu",
        state_name="step:newest_version",
        verdict="changed",
        section="register",
        needs_registry=True,
    ),
    Step(
        "train-qlora",
        "Train LoRA adapters on the 4-bit base.",
        inputs=("dataset", BASE_MODEL),
        output="adapter",
        config_name="TrainQLoRAConfig",
        image="train",
        multi_process=True,
    ),
    Step(
        "train-dpo",
        "Train LoRA adapters on preferences, the 4-bit base as reference (DPO, ORPO, KTO).",
        inputs=("dataset", BASE_MODEL),
        output="adapter",
        config_name="TrainDPOConfig",
        image="train",
        multi_process=True,
    ),
    Step(
        "eval",
        "Score base and tuned model on held-out rows, and write the report.",
        inputs=("dataset", BASE_MODEL, "adapter"),
        output="evaluation",
        config_name="EvalConfig",
        image="train",
        state_name="model_state:model_state",
        shown={"report": REPORT_PAGE, "summary": REPORT_TEXT},
    ),
    Step(
        "merge",
        "Merge the adapter into the unquantized base, 16 bit, and check its logits.",
        inputs=(BASE_MODEL, "adapter"),
        output="model",
        config_name="MergeConfig",
        image="train",
    ),
    Step(
        "gguf-quantize",
        "Write GGUF files, load each in llama.cpp, and compare them with the merged model.",
        inputs=("model", "dataset"),
        output="gguf",
        config_name="GGUFQuantizeConfig",
        image="train",
    ),
    Step(
        "register",
        "Record the results as a version in MLflow's model registry.",
        inputs=("adapter", "model", "gguf", "evaluation"),
        output="version",
        config_name="RegisterConfig",
        image="cpu",
        state_name="step:registry_state",
        fetches_inputs=False,
        needs_registry=True,
    ),
    Step(
        "score-champion",
        "Score the champion on the rows that the new version was scored on, unless it was before.",
        inputs=("evaluation",),
        output="champion",
        config_name="RegisterConfig",
        image="train",
        state_name="step:champion_state",
        section="register",
        fetches_inputs=False,
        needs_registry=True,
        # `promote` can score a champion by itself where it runs with torch.
        cluster_only=True,
    ),
    Step(
        "promote",
        "Compare the new version with the champion and move the alias if it wins.",
        inputs=("version", "evaluation"),
        output="decision",
        config_name="PromoteConfig",
        image="cpu",
        state_name="step:champion_state",
        verdict="promotion_passed",
        needs_registry=True,
    ),
)

STEPS: Mapping[str, Step] = {step.name: step for step in _ALL}
SECTIONS: Mapping[str, Step] = {
    step.module_name: step for step in _ALL if step.section is None and not step.checks_sections
}
"""Sections of a pipeline's configuration, each with the step that it is named after."""


def get_step(name: str) -> Step:
    """Raises: UserError: there is no step of that name."""
    if name not in STEPS:
        raise UserError(f"unknown step '{name}'; the steps are {', '.join(STEPS)}")
    return STEPS[name]
