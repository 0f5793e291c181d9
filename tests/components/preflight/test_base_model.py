import json
import shutil
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from finemill.components.preflight.base_model import inspect_base_model
from finemill.errors import TemporaryError, UserError
from finemill.models.base.resolve import BUILTIN_MODELS, _resolve

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOKENIZER = ["config.json", "tokenizer.json"]


@pytest.fixture(autouse=True)
def nothing_remembered() -> Iterator[None]:
    _resolve.cache_clear()
    yield
    _resolve.cache_clear()


@pytest.fixture
def hub(add_to_hub: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """A hub whose one model has the files of this list; of them config.json is in the local cache."""
    files: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            found = self.path == f"/api/models/finemill/tiny/revision/{COMMIT}"
            siblings = [{"rfilename": name} for name in files]
            data = json.dumps({"id": "finemill/tiny", "sha": COMMIT, "siblings": siblings}).encode()
            self.send_response(200 if found else 404)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *arguments: Any) -> None:
            """Nothing on stderr."""

    for path in add_to_hub(COMMIT).iterdir():
        if path.name != "config.json":
            path.unlink()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    yield files
    server.shutdown()
    server.server_close()


def test_a_folder_with_pickled_weights_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "base"
    shutil.copytree(BUILTIN_MODELS["builtin:tiny-qwen3"], folder)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="needs safetensors weights"):
        inspect_base_model(str(folder))


def test_a_hub_model_is_known_by_the_names_of_its_files(hub: list[str]) -> None:
    hub += [*TOKENIZER, "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    facts = inspect_base_model(f"hf://finemill/tiny@{COMMIT}")
    assert facts.id == f"hf://finemill/tiny@{COMMIT}"
    assert facts.config["model_type"] == "qwen3"


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([*TOKENIZER, "pytorch_model.bin"], r"found only pytorch_model\.bin, which can run code when loaded"),
        ([*TOKENIZER, "original/model.safetensors"], "needs safetensors weights, found none"),
        (["config.json", "model.safetensors"], "has no tokenizer"),
    ],
)
def test_what_a_hub_model_lacks_is_said_before_it_is_fetched(files: list[str], message: str, hub: list[str]) -> None:
    hub += files
    with pytest.raises(UserError, match=message):
        inspect_base_model(f"hf://finemill/tiny@{COMMIT}")


def test_a_hub_out_of_reach_may_come_back(hub: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    with pytest.raises(TemporaryError, match="the hub is out of reach"):
        inspect_base_model(f"hf://finemill/tiny@{COMMIT}")


def test_offline_the_cache_is_looked_at(add_to_hub: Callable[..., Path]) -> None:
    snapshot = add_to_hub(COMMIT)
    assert inspect_base_model("hf://finemill/tiny").id == f"hf://finemill/tiny@{COMMIT}"
    (snapshot / "model.safetensors").unlink()
    with pytest.raises(UserError, match="needs safetensors weights"):
        inspect_base_model("hf://finemill/tiny")
