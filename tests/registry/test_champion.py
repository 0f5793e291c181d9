"""A champion that was scored on other rows than the new version is scored again, by the real evaluation."""

from collections.abc import Callable
from pathlib import Path

import pytest
from mlflow import MlflowClient

from finemill.artifacts.champion import read_champion
from finemill.artifacts.decision import read_decision
from finemill.artifacts.manifest import Reference
from finemill.errors import UserError
from finemill.models.base.resolve import BUILTIN_MODELS
from finemill.runtime.run import run_step
from finemill.storage.store import fetch_artifact, read_artifact
from finemill.tracking.settings import Tracking

pytestmark = pytest.mark.slow
_BASE = "builtin:tiny-qwen3"


def dataset(store: str, seed: int) -> str:
    sources = [{"uri": "example:reasoning", "max_rows": 60}]
    rows = run_step("data-prep", store=store, inputs={}, config={"sources": sources, "test_size": 0.2, "seed": seed})
    inputs = {"rows": str(rows.reference), "base_model": _BASE}
    return str(run_step("chat-format", store=store, inputs=inputs, config={}).reference)


def adapter_files(folder: Path) -> dict[str, bytes]:
    """An adapter as training begins: it changes nothing."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(BUILTIN_MODELS[_BASE])
    config = LoraConfig(r=4, target_modules=["q_proj"])
    get_peft_model(model, config).save_pretrained(folder)
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix in (".json", ".safetensors")}


def test_champion_is_scored_on_the_new_versions_rows(
    tracking_uri: str,
    folder_store: str,
    tmp_path: Path,
    publish: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    files = adapter_files(tmp_path / "adapter")
    lines, versions = [], []
    for seed in (0, 1):
        data = dataset(folder_store, seed)
        adapter = publish("adapter", {**files, "seed": str(seed)}, {"base_model": _BASE, "dataset": data})
        inputs = {"dataset": data, "base_model": _BASE, "adapter": adapter}
        config = {"max_rows": 5, "max_new_tokens": 4}
        evaluation = str(run_step("eval", store=folder_store, inputs=inputs, config=config).reference)
        model = publish("model", {"config.json": str(seed)}, {"adapter": adapter})
        gguf = publish("gguf", {"gguf.json": str(seed)}, {"model": model})
        line = {"adapter": adapter, "model": model, "gguf": gguf, "evaluation": evaluation}
        versions.append(
            str(
                run_step(
                    "register", store=folder_store, inputs=line, config={}, tracking=Tracking.of_environment()
                ).reference
            )
        )
        lines.append({**line, "dataset": data})
    MlflowClient(tracking_uri).set_registered_model_alias("finemill", "champion", "1")
    inputs = {"version": versions[1], "evaluation": lines[1]["evaluation"]}

    with monkeypatch.context() as without_torch:
        without_torch.setattr("importlib.util.find_spec", lambda name: None)
        with pytest.raises(UserError, match=r"version 1 was scored on other rows .* needs torch"):
            run_step("promote", store=folder_store, inputs=inputs, config={}, tracking=Tracking.of_environment())

    champion = run_step(
        "score-champion",
        store=folder_store,
        inputs={"evaluation": inputs["evaluation"]},
        config={},
        tracking=Tracking.of_environment(),
    )
    record = read_champion(fetch_artifact(champion.reference)[0])
    assert record.champion == 1

    with monkeypatch.context() as without_torch:
        without_torch.setattr("importlib.util.find_spec", lambda name: None)
        result = run_step("promote", store=folder_store, inputs=inputs, config={}, tracking=Tracking.of_environment())
    assert record.evaluation is not None
    decision = read_decision(fetch_artifact(result.reference)[0])
    assert decision.champion_evaluation == record.evaluation
    again = read_artifact(Reference.parse(record.evaluation))
    assert (again.parents["adapter"], again.parents["dataset"]) == (lines[0]["adapter"], lines[1]["dataset"])
    # Both adapters change nothing: the same scores on the same rows.
    against = [gate for gate in decision.gates if gate.rule.endswith("champion")]
    assert [gate.difference for gate in against] == [pytest.approx(0, abs=1e-6)] * len(against)
    assert "loss" in {gate.metric for gate in against}
    assert not decision.promoted
