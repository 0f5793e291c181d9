from pathlib import Path

import pytest

from finemill.artifacts.plan import RunPlan, read_plan, write_plan
from finemill.errors import UserError


def test_a_plan_survives_its_file(tmp_path: Path) -> None:
    record = RunPlan(base_model="builtin:tiny-qwen3", store="file:///store", steps={"merge": {"max_shard_size": "5GB"}})
    write_plan(tmp_path, record)
    assert read_plan(tmp_path) == record


def test_a_missing_plan_says_who_writes_it(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"plan\.json not found: preflight writes it"):
        read_plan(tmp_path)
