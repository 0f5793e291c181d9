"""What the harness hands to a training, made by hand."""

from finemill.artifacts.manifest import Producer
from finemill.runtime.context import Checkpoints, Recorder, StepContext


def training_context(
    store: str, recorder: Recorder, *, step: str = "train-qlora", key: str = "test", base: str = "builtin:tiny-qwen3"
) -> StepContext:
    """A context of its own over the checkpoints of `step` in `store`."""
    return StepContext(
        store=store,
        key=key,
        references={"base_model": base},
        manifests={},
        checkpoints=Checkpoints(f"{store}/checkpoints/{step}-test", Producer(step=step, version="0", code="test")),
        recorder=recorder,
    )
