"""Fixtures that several folders of tests share."""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from finemill.components.context import StepContext

# Nothing in the tests may reach a model hub, report usage, or read the developer's own cache or credentials.
os.environ.update(HF_HUB_OFFLINE="1", MLFLOW_DISABLE_TELEMETRY="true", MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING="false")


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """A cache of the test session's own, and none of the variables that steps react to."""
    monkeypatch.setenv("FINEMILL_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
    for name in [name for name in os.environ if name.startswith(("AWS_", "MLFLOW_TRACKING", "MLFLOW_RUN"))]:
        monkeypatch.delenv(name)
    monkeypatch.delenv("FINEMILL_EVENTS", raising=False)


@pytest.fixture(scope="session")
def s3_endpoint() -> Iterator[str]:
    """The address of an S3 server that runs as long as the tests do."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def s3_store(s3_endpoint: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    """The URI of an empty prefix in a bucket on that server, credentials set."""
    import boto3

    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_endpoint)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test-key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test-secret")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    boto3.client("s3").create_bucket(Bucket="finemill-test")
    return f"s3://finemill-test/{abs(hash(request.node.nodeid)):x}"


@pytest.fixture
def folder_store(tmp_path: Path) -> str:
    """The URI of an empty folder."""
    return (tmp_path / "store").as_uri()


@pytest.fixture(params=["folder_store", "s3_store"])
def store(request: pytest.FixtureRequest) -> str:
    """Each kind of store in turn."""
    uri: str = request.getfixturevalue(request.param)
    return uri


@pytest.fixture(scope="session")
def tiny_model_dir() -> Path:
    """The base model that ships with the project."""
    from finemill.components.base_model.resolve import BUILTIN_MODELS

    return BUILTIN_MODELS["builtin:tiny-qwen3"]


@pytest.fixture(scope="session")
def tiny_adapter_dir(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA adapter on all linear layers of that model, its weights drawn so that it changes answers."""
    import shutil

    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("adapter")
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    # PEFT draws the other factor from the global generator, whose state depends on the tests before.
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.05, generator=generator)
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(tiny_model_dir / name, folder / name)
    return folder


@pytest.fixture(scope="session")
def tiny_dataset_dir(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four training and eight held-out rows of the example data, as chat-format writes them."""
    from random import Random

    import pyarrow as pa
    import pyarrow.parquet as pq
    from transformers import AutoTokenizer

    from finemill.components.example_data.reasoning import reasoning_problem

    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    rng = Random(1)
    folder = tmp_path_factory.mktemp("dataset")
    for split, count in {"train": 4, "test": 8}.items():
        rows = []
        for index in range(count):
            problem = reasoning_problem(rng).row()
            chat = index % 4 == 3
            user = f"<|im_start|>user\n{problem['problem']}<|im_end|>\n<|im_start|>assistant\n"
            completion = "It is a nice day.<|im_end|>" if chat else f"{problem['generated_solution']}<|im_end|>"
            prompt_ids, completion_ids = tokenizer(user)["input_ids"], tokenizer(completion)["input_ids"]
            rejected = "Day the is nice a.<|im_end|>" if chat else None
            rejected_ids = tokenizer(rejected)["input_ids"] if rejected else []
            rows.append(
                {
                    "id": f"{split}-{index}",
                    "source": "example:chat" if chat else "example:reasoning",
                    "input_ids": prompt_ids + completion_ids,
                    "labels": [-100] * len(prompt_ids) + completion_ids,
                    "prompt": user,
                    "completion": completion,
                    "answer": None if chat else problem["expected_answer"],
                    "rejected": rejected,
                    "rejected_input_ids": prompt_ids + rejected_ids if rejected else None,
                    "rejected_labels": [-100] * len(prompt_ids) + rejected_ids if rejected else None,
                }
            )
        pq.write_table(pa.Table.from_pylist(rows), folder / f"{split}.parquet")
    return folder


class Lines:
    """A recorder that keeps the lines of progress."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Metrics are returned, not recorded live, by the steps that use this."""

    def log_progress(self, text: str) -> None:
        self.lines.append(text)


@pytest.fixture(scope="session")
def step_context(tmp_path_factory: pytest.TempPathFactory) -> "StepContext":
    """What the harness hands to a step's function."""
    from finemill.components.artifacts import Producer
    from finemill.components.context import Checkpoints, StepContext

    store = tmp_path_factory.mktemp("store").as_uri()
    return StepContext(
        store=store,
        key="test",
        references={"base_model": "builtin:tiny-qwen3", "adapter": f"file:///adapter@sha256:{'a' * 64}"},
        manifests={},
        checkpoints=Checkpoints(f"{store}/checkpoints/test", Producer(step="test", version="0", code="test")),
        recorder=Lines(),
    )
