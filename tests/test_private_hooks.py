"""What we use of other libraries below their public interface is still there: a test per library.

Pins leave room for updates, so a library that moved one of these fails here, in one readable line.
"""

import ast
import importlib.util
import inspect
import re
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pytest


def missing(owner: Any, *names: str) -> list[str]:
    """The names that an object does not have."""
    return [name for name in names if not hasattr(owner, name)]


def parameters(function: Callable[..., Any]) -> list[str]:
    return [name for name in inspect.signature(function).parameters if name != "self"]


def test_transformers() -> None:
    """kernels/engine_trainer.py and kernels/trainer.py override these methods of Trainer.

    training/log_window.py saves its sums.
    """
    trainer = pytest.importorskip("transformers").Trainer
    assert parameters(trainer._save_rng_state) == ["output_dir"]
    assert parameters(trainer._load_optimizer_and_scheduler) == ["checkpoint"]
    assert parameters(trainer._clip_grad_norm) == ["model"]
    assert parameters(trainer._get_grad_norm) == ["model", "grad_norm"]
    assert parameters(trainer.get_batch_samples) == ["epoch_iterator", "num_batches", "device"]
    sums = ("_tr_loss", "_total_loss_scalar", "_globalstep_last_logged", "_initial_global_step")
    begun = inspect.getsource(trainer._inner_training_loop).partition("on_train_begin")[0]
    assert [name for name in sums if f"self.{name} = " not in begun] == []


def test_trl() -> None:
    """kernels/trainer.py adds to SFTTrainer's sums; components/train_dpo/trainers.py keeps TRL from tokenizing.

    kernels/accelerate.py answers the call that asks for log probabilities.
    """
    trl = pytest.importorskip("trl")
    written = inspect.getsource(trl.SFTTrainer)
    assert [name for name in ("_metrics", "_total_train_tokens") if f"self.{name}" not in written] == []
    for trainer in (trl.DPOTrainer, trl.KTOTrainer):
        assert parameters(trainer._prepare_dataset)[0] == "dataset"
        assert "labels=labels, fused_lm_head=True" in inspect.getsource(trainer).replace("completion_labels", "labels")
        assert parameters(trainer._precompute_ref_logps) == ["dataset", "name", "batch_size"]
    assert parameters(trl.DPOTrainer._compute_loss) == ["model", "inputs", "return_outputs"]


def test_accelerate() -> None:
    """training/hollow_base.py fills each module where Accelerate calls PyTorch's function that cuts it."""
    prepare = pytest.importorskip("accelerate.utils.fsdp_utils").fsdp2_prepare_model
    assert re.search(r"from torch\.distributed\.fsdp import .*\bfully_shard\b", inspect.getsource(prepare))


def test_datasets() -> None:
    """components/train_dpo/trainers.py gives all processes the main one's folder."""
    datasets = pytest.importorskip("datasets")
    assert parameters(datasets.Dataset._get_cache_file_path) == ["fingerprint"]


def test_torch() -> None:
    """kernels/ops/attention.py calls FlashAttention-2 below autograd, in its deterministic mode."""
    torch = pytest.importorskip("torch")
    assert missing(torch._C, "_set_deterministic_algorithms") == []
    forward, backward = torch.ops.aten._flash_attention_forward, torch.ops.aten._flash_attention_backward
    shared = ["cum_seq_q", "cum_seq_k", "max_q", "max_k", "dropout_p", "is_causal"]
    # Given by position; what lies between and behind has had several names.
    named = [argument.name for argument in forward.default._schema.arguments]
    assert named[:10] == ["query", "key", "value", *shared, "return_debug_mask"]
    assert "scale" in named
    assert len(forward.default._schema.returns) == 5
    named = [argument.name for argument in backward.default._schema.arguments]
    assert named[:12] == ["grad_out", "query", "key", "value", "out", "logsumexp", *shared]
    assert named[14] == "scale"
    # Weights divided among GPUs, which map each other's memory (kernels/engine/weight_shards.py).
    assert missing(torch._C, "_accelerator_setAllocatorSettings") == []
    storage = ("_share_cuda_", "_new_shared_cuda", "_share_filename_cpu_", "_new_shared_filename_cpu")
    assert missing(torch.UntypedStorage, *storage) == []
    # The built-in model's training and weights streamed from a file.
    assert missing(torch, "_foreach_add_", "_foreach_sub_") == []
    assert isinstance(torch.nn.Module()._buffers, dict)


def test_flash_attn_4() -> None:
    """kernels/ops/attention_fa4.py calls the kernels without autograd around them."""
    try:
        version("flash-attn-4")
    except PackageNotFoundError:
        pytest.skip("flash-attn-4 is not installed: finemill[long] brings it")
    spec = importlib.util.find_spec("flash_attn")
    assert spec is not None
    assert spec.submodule_search_locations
    (folder,) = spec.submodule_search_locations
    # Read, not imported: that takes seconds, and a GPU.
    tree = ast.parse((Path(folder) / "cute" / "interface.py").read_text())
    taken = {
        node.name: {argument.arg for argument in (*node.args.args, *node.args.kwonlyargs)}
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef)
    }
    shared = {"softmax_scale", "causal", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"}
    assert {*shared, "out", "return_lse"} <= taken["_flash_attn_fwd"]
    assert {*shared, "deterministic", "dq", "dk", "dv"} <= taken["_flash_attn_bwd"]


def test_kfp() -> None:
    """commands/engine_kfp.py asks whether a server answers, and deletes a schedule but not its runs."""
    kfp = pytest.importorskip("kfp")
    written = inspect.getsource(kfp.Client.__init__)
    assert [name for name in ("_healthz_api", "_recurring_run_api") if f"self.{name} =" not in written] == []
    server = pytest.importorskip("kfp_server_api")
    assert missing(server.HealthzServiceApi, "healthz_service_get_healthz") == []
    delete = server.RecurringRunServiceApi.recurring_run_service_delete_recurring_run
    assert "propagation_policy" in inspect.getsource(delete) + inspect.getsource(
        server.RecurringRunServiceApi.recurring_run_service_delete_recurring_run_with_http_info
    )


def test_kubernetes() -> None:
    """commands/kubernetes_client.py sets retries on the configuration that every client starts from."""
    kubernetes = pytest.importorskip("kubernetes")
    assert missing(kubernetes.client.Configuration, "_default") == []
    assert missing(kubernetes.client.Configuration(), "retries") == []


def test_mlflow() -> None:
    """registry/snapshot.py reads an SQLite registry without importing MLflow."""
    models = pytest.importorskip("mlflow.store.model_registry.dbmodels.models")
    columns = {
        "registered_models": {"name", "creation_time"},
        "registered_model_tags": {"key", "value"},
        "registered_model_aliases": {"alias", "version"},
        "model_versions": {"version", "creation_time", "current_stage"},
        "model_version_tags": {"version", "key", "value"},
    }
    tables = models.Base.metadata.tables
    assert {table: names - set(tables[table].columns.keys()) for table, names in columns.items()} == {
        table: set() for table in columns
    }
