"""The model card of an adapter: its base, how it was trained, and what opens it."""

from pathlib import Path

from finemill.artifacts.adapter import Curve, TrainingRecord
from finemill.models.adapter import more_than_lora, read_adapter_config
from finemill.models.base.resolve import ResolvedBase, hub_name
from finemill.models.model_card import write_card


def write_adapter_card(folder: Path, base: ResolvedBase, record: TrainingRecord) -> None:
    """Write README.md beside the adapter's weights.

    Args:
        record: how it was trained.
    """
    commands = [
        ("finemill", "finemill chat ."),
        ("As a model of its own", f"finemill merge --base-model {base.id} --adapter ADAPTER"),
    ]
    if (on_hub := hub_name(base.id)) and not more_than_lora(read_adapter_config(folder)):
        commands.append(("vLLM", f"vllm serve {on_hub[0]} --enable-lora --lora-modules tuned=."))
    write_card(
        folder,
        title="Adapter",
        base_model=base.id,
        form="lora",
        summary=f"An adapter for `{base.id}`, trained for {record.num_steps} steps by finemill.",
        commands=commands,
        table={"validation": _ends(record.validation_losses)} if record.validation_losses else {},
    )


def _ends(curve: Curve) -> dict[str, str]:
    return {"loss at first": f"{curve[0][1]:.4g}", "at the end": f"{curve[-1][1]:.4g}"}
