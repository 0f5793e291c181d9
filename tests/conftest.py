"""Fixtures that several folders of tests share."""

import gc
import itertools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from finemill.artifacts.dataset import IGNORE_INDEX, DatasetRow, dataset_writer
from finemill.artifacts.evaluation import Sample, write_metrics, write_samples
from finemill.artifacts.files import REPORT_TEXT
from finemill.artifacts.manifest import Producer, Reference, new_manifest
from finemill.artifacts.metrics import ModelName
from finemill.artifacts.splits import Split
from finemill.storage.store import publish_artifact, staging_folder
from tests.recorder import ListRecorder

if TYPE_CHECKING:
    from finemill.runtime.context import StepContext

# Nothing in the tests may reach a model hub, report usage, or read the developer's own cache or credentials.
os.environ.update(HF_HUB_OFFLINE="1", MLFLOW_DISABLE_TELEMETRY="true", MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING="false")
# As the command line does, before anything imports torch: threads that wait do not spin.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Of several processes of tests each has its share of the cores: a thread that waits for one holds up all of its others.
if _workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // int(_workers))))
# A hundred processes import what the tests run: one compiles it, whatever the developer's shell says.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False
gc.disable()  # until all tests are imported, which makes no garbage


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests come first: of several processes, the one that starts such a file last ends last."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


def pytest_collection_finish() -> None:
    gc.enable()


@pytest.fixture(scope="module", autouse=True)
def loaded_modules_are_no_garbage() -> None:
    """Trainers collect garbage by hand: a second each time, if all that is imported for 5,000 tests is searched."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    """What libraries hold is freed at the exit as ever."""
    gc.unfreeze()


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
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URI of an empty PostgreSQL database, behind a socket in a folder of its own."""
    pytest.importorskip("psycopg2")
    if shutil.which("initdb") is None:
        pytest.skip("PostgreSQL is not installed here")
    # A short path: that of a socket may have a hundred characters. PostgreSQL does not run as root.
    folder = Path(f"/tmp/finemill-pg-{os.getpid()}")
    folder.mkdir()
    nobody = 65534
    user = {"user": nobody, "group": nobody, "extra_groups": []} if os.getuid() == 0 else {}
    if user:
        os.chown(folder, nobody, nobody)
    data = folder / "data"
    quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "check": True, **user}
    options = f"-c listen_addresses= -c unix_socket_directories={folder} -c fsync=off"
    subprocess.run(["initdb", "-D", data, "-A", "trust", "-U", "finemill", "--no-sync"], cwd=folder, **quiet)
    subprocess.run(["pg_ctl", "-D", data, "-o", options, "-l", folder / "log", "-w", "start"], cwd=folder, **quiet)
    yield f"postgresql+psycopg2://finemill@/postgres?host={folder}"
    subprocess.run(["pg_ctl", "-D", data, "-m", "immediate", "stop"], cwd=folder, **quiet)
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def quick_kfp(monkeypatch: pytest.MonkeyPatch) -> None:
    """KFP does without the name of its caller, which it wants for the text of an error.

    Each setter of a task calls `inspect.stack()`, which looks through every loaded module for the source of every
    frame: seconds per pipeline in a process that has loaded PyTorch.
    """
    from kfp.dsl import pipeline_task

    monkeypatch.setattr(pipeline_task, "inspect", SimpleNamespace(stack=lambda: [("a setter",) * 4] * 2))


@pytest.fixture(scope="session")
def tiny_model_dir() -> Path:
    """The base model that ships with the project."""
    from finemill.models.base.resolve import BUILTIN_MODELS

    return BUILTIN_MODELS["builtin:tiny-qwen3"]


@pytest.fixture(scope="session")
def tiny_mixture_dir(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen3-MoE of random weights, two layers of four experts, with that model's tokenizer, as on the hub."""
    import torch
    from transformers import AutoModelForCausalLM, Qwen3MoeConfig

    folder = tmp_path_factory.mktemp("mixture")
    copied = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")
    for name in copied:
        shutil.copy(tiny_model_dir / name, folder / name)
    like = json.loads((tiny_model_dir / "config.json").read_text(encoding="utf-8"))
    config = Qwen3MoeConfig(
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        intermediate_size=128,
        moe_intermediate_size=64,
        num_experts=4,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        vocab_size=like["vocab_size"],
        eos_token_id=like["eos_token_id"],
        pad_token_id=like["pad_token_id"],
        max_position_embeddings=like["max_position_embeddings"],
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def short_model_dir(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first two of its six layers: as good where a test asks how something is computed, in a third of the time."""
    from safetensors.torch import load_file, save_file
    from transformers import AutoConfig

    folder = tmp_path_factory.mktemp("base") / "short-qwen3"
    shutil.copytree(tiny_model_dir, folder)
    config = AutoConfig.from_pretrained(folder, num_hidden_layers=2)
    config.layer_types = config.layer_types[:2]
    config.save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    dropped = tuple(f"model.layers.{layer}." for layer in range(2, 6))
    kept = {name: weight for name, weight in weights.items() if not name.startswith(dropped)}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture(scope="session")
def four_bit_dir(short_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The short base in NF4, but for the MLP's last matrix of its first layer and attention's three of its second."""
    import torch

    from finemill.models.nf4.checkpoint import write_checkpoint
    from finemill.models.nf4.layers import quantized_layers
    from finemill.models.stored_model import StoredModel

    folder = tmp_path_factory.mktemp("base") / "four-bit-qwen3"
    folder.mkdir()
    attention = [f"model.layers.1.self_attn.{name}_proj" for name in "qkv"]
    kept = ["model.layers.0.mlp.down_proj", *attention]
    stored = StoredModel(short_model_dir)
    skipped = ["lm_head", *kept, "model.layers.1.self_attn.qkv_proj"]
    write_checkpoint(stored, set(quantized_layers(stored)) - set(kept), skipped, torch.bfloat16, folder)
    return folder


@pytest.fixture
def add_to_hub(tmp_path: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Fill a hub cache of the test's own: `add_to_hub(commit, branch)` puts that commit at the head of the branch.

    The model is `finemill/tiny`, a copy of the one that ships with the project. Returns: its folder, to be changed.
    """
    cache = tmp_path / "hub"
    monkeypatch.setenv("HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))

    def add(commit: str, branch: str = "main") -> Path:
        repository = cache / "models--finemill--tiny"
        (repository / "refs").mkdir(parents=True, exist_ok=True)
        (repository / "refs" / branch).write_text(commit)
        return Path(shutil.copytree(tiny_model_dir, repository / "snapshots" / commit))

    return add


@pytest.fixture(scope="session")
def tiny_adapter_dir(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA adapter on all linear layers of that model, its weights drawn so that it changes answers."""
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

    from transformers import AutoTokenizer

    from finemill.rows.examples.reasoning import reasoning_problem

    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    rng = Random(1)
    folder = tmp_path_factory.mktemp("dataset")
    counts: dict[Split, int] = {"train": 4, "test": 8}
    for split, count in counts.items():
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
                DatasetRow(
                    id=f"{split}-{index}",
                    source="example:chat" if chat else "example:reasoning",
                    messages=json.dumps(
                        [
                            {"role": "user", "content": problem["problem"]},
                            {"role": "assistant", "content": completion.removesuffix("<|im_end|>")},
                        ]
                    ),
                    tools=None,
                    chat_template_kwargs="{}",
                    input_ids=prompt_ids + completion_ids,
                    labels=[IGNORE_INDEX] * len(prompt_ids) + completion_ids,
                    prompt=user,
                    completion=completion,
                    answer=None if chat else problem["expected_answer"],
                    rejected=rejected,
                    rejected_input_ids=prompt_ids + rejected_ids if rejected else None,
                    rejected_labels=[IGNORE_INDEX] * len(prompt_ids) + rejected_ids if rejected else None,
                )
            )
        with dataset_writer(folder, split) as writer:
            writer.write(rows)
    return folder


@pytest.fixture(scope="session")
def step_context(tmp_path_factory: pytest.TempPathFactory) -> "StepContext":
    """What the harness hands to a step's function."""
    from finemill.runtime.context import Checkpoints, StepContext

    store = tmp_path_factory.mktemp("store").as_uri()
    return StepContext(
        store=store,
        key="test",
        references={
            "base_model": "builtin:tiny-qwen3",
            "adapter": f"file:///adapter@sha256:{'a' * 64}",
            "dataset": f"file:///dataset@sha256:{'d' * 64}",
        },
        manifests={},
        checkpoints=Checkpoints(f"{store}/checkpoints/test", Producer(step="test", version="0", code="test")),
        recorder=ListRecorder(),
    )


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An MLflow database without any run: made once, because making its tables takes a second.

    What this process writes to a database is not waited for until it is on the disk: no test switches the machine off.
    """
    from mlflow import MlflowClient
    from sqlalchemy import event
    from sqlalchemy.engine import Engine

    def without_sync(connection: Any, _record: Any) -> None:
        if "sqlite" in type(connection).__module__:
            connection.execute("PRAGMA synchronous=OFF")

    event.listen(Engine, "connect", without_sync)
    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def tracking_uri(empty_database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The URI of an empty MLflow database of the test's own, set as `MLFLOW_TRACKING_URI`."""
    shutil.copy(empty_database, tmp_path / "mlflow.db")
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    return uri


Publish = Callable[..., str]


@pytest.fixture
def publish(folder_store: str) -> Publish:
    """Publish an artifact: `publish(kind, files, parents, config, metrics)`; in `folder_store` by default.

    `write` puts further files into its folder.
    """

    number = itertools.count()

    def publish(
        kind: str,
        files: Mapping[str, str | bytes],
        parents: Mapping[str, str] | None = None,
        config: Mapping[str, object] | None = None,
        metrics: Mapping[str, float] | None = None,
        store: str = folder_store,
        write: Callable[[Path], None] = lambda folder: None,
    ) -> str:
        uri = f"{store}/{kind}/{next(number):04d}"
        staging = staging_folder(uri)
        for name, content in files.items():
            (staging / name).write_bytes(content.encode() if isinstance(content, str) else content)
        write(staging)
        made_by = Producer(step=kind, version="0.1.0", code="0" * 16, git_sha="c0ffee")
        manifest = new_manifest(kind, staging, made_by, parents=parents, config=config, metrics=metrics)
        return str(Reference(uri, publish_artifact(staging, uri, manifest).digest))

    return publish


@pytest.fixture
def trained(publish: Publish, folder_store: str) -> Callable[..., dict[str, str]]:
    """References of an adapter, its merged model, GGUF files and evaluation.

    `trained(name, right=90, loss=0.5, rows=100, dataset="first")`: `right` of the rows answered exactly, mean `loss`;
    the base answers 10 and has a loss of 2. Rows and their difficulty are the same for every model.
    """

    def trained(
        name: str,
        *,
        right: int = 90,
        loss: float = 0.5,
        rows: int = 100,
        dataset: str = "first",
        store: str = folder_store,
    ) -> dict[str, str]:
        put = partial(publish, store=store)
        data = f"file:///data/{dataset}@sha256:{dataset.encode().hex():0<64.64}"
        adapter = put("adapter", {"adapter_config.json": name}, {"base_model": "builtin:tiny-qwen3", "dataset": data})
        model = put("model", {"config.json": name}, {"base_model": "builtin:tiny-qwen3", "adapter": adapter})
        gguf = put("gguf", {"gguf.json": name}, {"model": model, "dataset": data})
        base, tuned = _samples("base", rows, right=10, loss=2.0), _samples("tuned", rows, right=right, loss=loss)
        metrics = {
            "eval/base/exact_match": 10 / rows,
            "eval/tuned/exact_match": right / rows,
            "eval/base/loss": _mean_loss(base),
            "eval/tuned/loss": _mean_loss(tuned),
            "eval/base/perplexity": 7.4,
            "eval/tuned/perplexity": 1.6,
        }

        def write(folder: Path) -> None:
            write_samples(folder, [*base, *tuned])
            write_metrics(folder, metrics)

        evaluation = put(
            "evaluation",
            {REPORT_TEXT: f"# {name}"},
            {"dataset": data, "base_model": "builtin:tiny-qwen3", "adapter": adapter},
            config={"seed": 0},
            metrics=metrics,
            write=write,
        )
        return {"adapter": adapter, "model": model, "gguf": gguf, "evaluation": evaluation}

    return trained


def _samples(model: ModelName, count: int, *, right: int, loss: float) -> list[Sample]:
    random = np.random.default_rng(7)
    hardness, tokens = random.uniform(0.5, 1.5, count), random.integers(5, 50, count)
    own = np.random.default_rng(right).normal(0, 0.02, count)
    return [
        Sample(
            id=f"{index:016x}",
            source="test",
            model=model,
            prompt=f"What is {index}?",
            completion="",
            reference="",
            exact_match=index < right,
            loss=float(loss * hardness[index] + own[index]),
            num_tokens=int(tokens[index]),
            num_generated_tokens=1,
            finished=True,
            format_ok=True,
        )
        for index in range(count)
    ]


def _mean_loss(samples: list[Sample]) -> float:
    losses = [sample.loss or 0.0 for sample in samples]
    return float(np.average(losses, weights=[sample.num_tokens for sample in samples]))
