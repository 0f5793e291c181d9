"""Every pipeline by name."""

from collections.abc import Mapping

from finemill.errors import UserError
from finemill.pipelines.align import ALIGN
from finemill.pipelines.export import EXPORT
from finemill.pipelines.finetune import FINETUNE
from finemill.pipelines.graph import Pipeline
from finemill.pipelines.retrain import RETRAIN

PIPELINES: Mapping[str, Pipeline] = {pipeline.name: pipeline for pipeline in (FINETUNE, ALIGN, RETRAIN, EXPORT)}


def get_pipeline(name: str) -> Pipeline:
    """Raises: UserError: there is no pipeline of that name."""
    if name not in PIPELINES:
        raise UserError(f"unknown pipeline '{name}'; the pipelines are {', '.join(PIPELINES)}")
    return PIPELINES[name]
