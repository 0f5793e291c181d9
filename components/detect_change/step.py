"""Is there anything new to train on? The registry knows what the newest version was trained on."""

from collections.abc import Mapping
from pathlib import Path

from finemill.artifacts.change import Change, write_change
from finemill.registry.config import RegisterConfig
from finemill.registry.snapshot import Version, read_registered_model
from finemill.runtime.context import StepContext
from finemill.tracking.settings import Tracking

DATASET_TAG = "dataset.digest"


def newest_version(inputs: Mapping[str, str], config: RegisterConfig, tracking: Tracking) -> dict[str, str]:
    """The state that the comparison depends on: the newest version, and what it was trained on."""
    newest = _newest(config, tracking)
    return {"version": str(newest.number), "dataset": newest.tags.get(DATASET_TAG, "")} if newest else {}


def run(*, dataset: Path, output_dir: Path, config: RegisterConfig, context: StepContext) -> dict[str, float]:
    """Compare the dataset's digest with that of the newest registered version, whether that was promoted or not.

    A version that lost against the champion counts: training again on the same data would give it again.
    """
    newest = _newest(config, context.tracking)
    known = newest.tags.get(DATASET_TAG) if newest else None
    digest = context.manifests["dataset"].digest
    changed = digest != known
    change = Change(
        registered_model_name=config.registered_model_name,
        newest_version=newest.number if newest else None,
        trained_on=known,
        dataset=digest,
        changed=changed,
    )
    write_change(output_dir, change)
    against = f"version {newest.number}" if newest else "no version"
    context.recorder.log_progress(f"{'new data' if changed else 'unchanged'} against {against}")
    return {"detect_change/changed": float(changed)}


def _newest(config: RegisterConfig, tracking: Tracking) -> Version | None:
    model = read_registered_model(tracking.registry, config.registered_model_name)
    return model.newest if model else None
