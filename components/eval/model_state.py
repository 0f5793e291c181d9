"""What further models are at the moment: their digests, so that another file under the same name is another evaluation.

Light to import: an evaluation that is there already needs nothing else.
"""

from collections.abc import Mapping
from pathlib import Path

from finemill.components.eval.config import EvalConfig
from finemill.storage.file_digests import digest_of_files
from finemill.tracking.settings import Tracking


def model_state(inputs: Mapping[str, str], config: EvalConfig, tracking: Tracking) -> dict[str, str]:
    """A digest for each of `models` that does not name one: files by their bytes, a registered version by its artifact.

    An endpoint is known by its address alone. The files of `lm_eval_tasks` count, too.
    Raises: UserError: one of them is not there.
    """
    state = {f"models.{name}": found for name, model in config.models.items() if (found := _identity(model))}
    if config.lm_eval_tasks:
        from finemill.components.eval.harness import task_files

        digests = digest_of_files(task_files(config.lm_eval_tasks))
        state["lm_eval_tasks"] = " ".join(digest.sha256[:16] for digest in digests)
    return state


def _identity(model: str) -> str:
    if model.startswith(("http://", "https://")) or "@sha256:" in model:
        return ""
    if model.startswith("models:/"):
        from finemill.asking.find_model import registered_artifact

        return registered_artifact(model).digest
    path = Path(model).expanduser()
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    if files:
        return " ".join(digest.sha256[:16] for digest in digest_of_files(files))
    from finemill.models.base.resolve import base_digest

    return base_digest(model)
