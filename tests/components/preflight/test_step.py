from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from finemill.artifacts.manifest import Producer, Reference
from finemill.artifacts.plan import read_plan
from finemill.components.preflight.config import PreflightConfig
from finemill.components.preflight.step import check_configs, check_registry
from finemill.errors import TemporaryError, UserError
from finemill.models.base.pin import pin_base_model
from finemill.models.base.resolve import _resolve
from finemill.runtime.run import run_step
from finemill.storage.store import fetch_artifact
from finemill.tracking.settings import NOWHERE, Tracking
from tests.tracking.front import registry_front


def preflight(store: str, **config: Any) -> Any:
    values = {"base_model": "builtin:tiny-qwen3", **config}
    return run_step("preflight", store=store, inputs={}, config=values, tracking=Tracking.of_environment())


def test_the_plan_holds_the_resolved_configuration_and_the_estimate(store: str) -> None:
    result = preflight(store, steps={"train_qlora": {"lora_r": 32}, "merge": {}})
    folder, _ = fetch_artifact(Reference.parse(str(result.reference)))
    plan = read_plan(folder)
    assert plan.base_model == "builtin:tiny-qwen3"
    assert plan.steps["train_qlora"]["lora_r"] == 32
    assert plan.steps["train_qlora"]["lora_alpha"] == 32
    assert "max_shard_size" in plan.steps["merge"]
    assert plan.gpu_memory_gib is not None
    assert 0 < plan.gpu_memory_gib < 2
    assert result.manifest.metrics["preflight/gpu_memory_gib"] == plan.gpu_memory_gib


def test_every_run_checks_anew(folder_store: str) -> None:
    assert [preflight(folder_store).reused for _ in range(2)] == [False, False]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"steps": {"train_qlora": {"lora_rank": 8}}}, "train_qlora: unknown key 'lora_rank'"),
        ({"steps": {"training": {}}}, "no step reads the section training"),
        ({"steps": {"promote": {}}}, "MLFLOW_TRACKING_URI is not set"),
        ({"base_model": "/no/such/folder"}, "base model '/no/such/folder' not found"),
        ({"base_model": "builtin:huge"}, "base model 'builtin:huge' not found"),
        ({"steps": {"train_dpo": {"label_smoothing": 0.1}}}, "train_dpo: .*label_smoothing acts with"),
        (
            {"steps": {"train_dpo": {}}, "gpu_memory_gib": 0.1},
            r"needs .* at least, the GPU has 0\.1: lower",
        ),
        (
            {"steps": {"train_qlora": {"kernels": "on"}, "chat_format": {"new_tokens": ["<a>"]}}},
            "kernels 'on', and the data set has 1 new tokens",
        ),
        ({"steps": {"train_qlora": {"memory_gb": 0.1}}}, r"needs .* at least, memory_gb is 0\.1: lower"),
        (
            {"steps": {"train_qlora": {}}, "gpu_memory_gib": 0.1, "host_memory_gib": 5},
            r"at least beside a container of 5, the GPU has 0\.1: lower",
        ),
        (
            {"steps": {"train_qlora": {}}, "gpu_memory_gib": 0.1},
            r"needs .* at least, the GPU has 0\.1: lower",
        ),
    ],
)
def test_what_would_fail_later_fails_now(config: dict[str, Any], message: str, folder_store: str) -> None:
    with pytest.raises(UserError, match=message):
        preflight(folder_store, **config)


@pytest.mark.parametrize("section", ["register", "promote"])
def test_the_registry_is_asked_with_the_credentials_that_the_steps_have(
    section: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "secret")
    sections = check_configs(PreflightConfig(steps={section: {}}))
    with registry_front(authorization="Bearer secret", prefix="/mlflow") as uri:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        check_registry(sections, Tracking.of_environment())
        monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "another")
        with pytest.raises(UserError, match="refuses the credentials"):
            check_registry(sections, Tracking.of_environment())
    with pytest.raises(TemporaryError, match="is out of reach"):
        check_registry(sections, Tracking.of_environment())
    with registry_front(broken=True) as uri:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        with pytest.raises(TemporaryError, match="503"):
            check_registry(sections, Tracking.of_environment())


def test_a_registry_of_its_own_needs_no_tracking_server(
    folder_store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_REGISTRY_URI", f"sqlite:///{tmp_path / 'registry.db'}")
    assert not preflight(folder_store, steps={"register": {}, "promote": {}}).reused


def test_a_run_that_registers_nothing_asks_for_no_registry() -> None:
    check_registry(check_configs(PreflightConfig(steps={"merge": {}, "eval": {}})), NOWHERE)


def test_plan_names_the_commit_that_the_run_s_other_steps_will_take(
    folder_store: str, add_to_hub: Callable[..., Path]
) -> None:
    first, second = "1" * 40, "2" * 40
    add_to_hub(first)
    _resolve.cache_clear()
    config = {"base_model": "hf://finemill/tiny"}
    result = run_step("preflight", store=folder_store, inputs={}, config=config, run_id="run")
    plan = read_plan(fetch_artifact(result.reference)[0])
    assert plan.base_model == f"hf://finemill/tiny@{first}"
    add_to_hub(second)
    _resolve.cache_clear()
    made_by = Producer(step="chat-format", version="0", code="c")
    assert pin_base_model("hf://finemill/tiny", folder_store, "run", made_by) == plan.base_model
