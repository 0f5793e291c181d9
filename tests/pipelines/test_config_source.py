from dataclasses import replace

import pytest

from finemill.artifacts.ports import BASE_MODEL
from finemill.pipelines.catalog import PIPELINES
from finemill.pipelines.config_source import FILE, config_source
from finemill.pipelines.export import EXPORT
from finemill.pipelines.graph import task
from finemill.runtime.catalog import STEPS


def test_the_configurations_are_what_the_graphs_read() -> None:
    """`make components` writes them anew."""
    assert FILE.read_text() == config_source(PIPELINES.values())


def test_a_task_more_is_a_section_more() -> None:
    change = task("detect-change", dataset=EXPORT.values[2])
    prepared = task("data-prep")
    longer = replace(EXPORT, tasks=(*EXPORT.tasks, change, prepared))
    added = set(config_source([longer]).splitlines()) - set(config_source([EXPORT]).splitlines())
    # detect-change shares register's section, which is there.
    assert added == {
        "from finemill.components.data_prep.config import DataPrepConfig",
        "    data_prep: DataPrepConfig",
        '    """Which rows to read, how to clean and split them, and in which shares they are trained on."""',
    }


@pytest.mark.parametrize("name", list(PIPELINES))
def test_preflight_checks_the_base_model_and_every_other_section(name: str) -> None:
    pipeline = PIPELINES[name]
    (plan,) = (item for item in pipeline.tasks if item.step == STEPS["preflight"])
    fields = {field.alias or key for key, field in pipeline.config.model_fields.items()}
    sections = fields - {item.name for item in pipeline.values} - {"preflight"}
    assert {item.name for item in pipeline.checks(plan)} == {BASE_MODEL, *sections}
    assert not any(pipeline.checks(item) for item in pipeline.tasks if item != plan)
