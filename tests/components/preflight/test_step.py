import json
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from finemill.artifacts.manifest import Reference
from finemill.components.preflight.base_model import inspect_base_model
from finemill.components.preflight.step import check_tracking_server
from finemill.errors import TemporaryError, UserError
from finemill.models.base.resolve import BUILTIN_MODELS
from finemill.runtime.run import run_step
from finemill.storage.store import fetch_artifact


def preflight(store: str, **config: Any) -> Any:
    values = {"base_model": "builtin:tiny-qwen3", **config}
    return run_step("preflight", store=store, inputs={}, config=values)


@pytest.fixture
def tracking_server() -> Iterator[tuple[str, list[int]]]:
    """A server that answers with the code in the list."""
    answer = [200]

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(answer[0])
            self.end_headers()

        def log_message(self, *arguments: Any) -> None:
            """Nothing on stderr."""

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", answer
    server.shutdown()
    server.server_close()


def test_the_plan_holds_the_resolved_configuration_and_the_estimate(store: str) -> None:
    result = preflight(store, steps={"train_qlora": {"lora_r": 32}, "merge": {}})
    folder, _ = fetch_artifact(Reference.parse(str(result.reference)))
    plan = json.loads((folder / "plan.json").read_text())
    assert plan["base_model"] == "builtin:tiny-qwen3"
    assert plan["steps"]["train_qlora"]["lora_r"] == 32
    assert plan["steps"]["train_qlora"]["lora_alpha"] == 32
    assert "max_shard_size" in plan["steps"]["merge"]
    assert 0 < result.manifest.metrics["preflight/gpu_memory_gib"] < 2


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
        ({"steps": {"train_qlora": {"memory_gb": 0.1}}}, r"needs .* at least, memory_gb is 0\.1: lower"),
        (
            {"steps": {"train_qlora": {}}, "gpu_memory_gib": 0.1},
            r"needs .* at least, the GPU has 0\.1: lower",
        ),
    ],
)
def test_what_would_fail_later_fails_now(config: dict[str, Any], message: str, folder_store: str) -> None:
    with pytest.raises(UserError, match=message):
        preflight(folder_store, **config)


def test_a_tracking_server_that_is_well_passes(tracking_server: tuple[str, list[int]]) -> None:
    check_tracking_server(tracking_server[0])
    check_tracking_server("sqlite:////somewhere/mlflow.db")


def test_a_tracking_server_that_refuses_is_the_user_s_error(tracking_server: tuple[str, list[int]]) -> None:
    uri, answer = tracking_server
    answer[0] = 401
    with pytest.raises(UserError, match="answers 401: check the credentials"):
        check_tracking_server(uri)


def test_a_tracking_server_out_of_reach_may_come_back(tracking_server: tuple[str, list[int]]) -> None:
    uri, answer = tracking_server
    answer[0] = 503
    with pytest.raises(TemporaryError, match="answers 503"):
        check_tracking_server(uri)
    with pytest.raises(TemporaryError, match="is out of reach"):
        check_tracking_server("http://127.0.0.1:1")


def test_a_base_with_pickled_weights_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "base"
    shutil.copytree(BUILTIN_MODELS["builtin:tiny-qwen3"], folder)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="needs safetensors weights"):
        inspect_base_model(str(folder))
