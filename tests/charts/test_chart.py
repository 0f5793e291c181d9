import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
CHART = ROOT / "charts" / "finemill"
# `make helm` builds it beside the tests' Python. Where everything has to be tested, its absence is a failure.
HELM = shutil.which("helm", path=f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}")
needs_helm = pytest.mark.skipif(HELM is None and not os.environ.get("CI"), reason="helm is not installed: make helm")


def helm(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(HELM), *arguments], capture_output=True, text=True, check=False)


def render(*options: str) -> list[dict[str, Any]]:
    result = helm("template", "mill", str(CHART), "--namespace", "ml", "--kube-version", "1.34.0", *options)
    assert result.returncode == 0, result.stderr
    return [item for item in yaml.safe_load_all(result.stdout) if item]


def render_error(*options: str) -> str:
    result = helm("template", "mill", str(CHART), "--kube-version", "1.34.0", *options)
    assert result.returncode != 0
    return result.stderr


def workflows(objects: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {item["metadata"]["name"]: item for item in objects if item["kind"] == "WorkflowTemplate"}


def steps(template: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {item["name"]: item for item in template["spec"]["templates"] if "container" in item}


def test_generated_files_are_in_step_with_the_pipelines_and_the_values() -> None:
    """After a change on purpose: `make chart`, and read the difference."""
    spec = importlib.util.spec_from_file_location("generate", ROOT / "charts" / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for file, content in module.generate().items():
        assert file.read_text() == content, file


def test_every_value_is_explained() -> None:
    readme = (CHART / "README.md").read_text()
    rows = [line for line in readme.splitlines() if line.startswith("| `")]
    assert rows
    assert all(len(line.split("|")[3].strip()) > 10 for line in rows)


def test_every_value_is_used() -> None:
    def leaves(value: Any, path: str) -> list[str]:
        if isinstance(value, dict) and value:
            return [leaf for key, item in value.items() for leaf in leaves(item, f"{path}.{key}")]
        return [path]

    templates = "\n".join(file.read_text() for file in (CHART / "templates").iterdir())
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    # Sizes and image roles are looked up by the labels that the pipelines' steps carry.
    looked_up = (".resources.", ".images.cpu.", ".images.train.")
    for leaf in leaves(values, ""):
        name = leaf.rsplit(".", 1)[1] if leaf.startswith(looked_up) else leaf
        assert name in templates, leaf


@needs_helm
@pytest.mark.parametrize("values", [None, "values-dev.yaml"])
def test_lint_finds_nothing(values: str | None) -> None:
    result = helm("lint", "--strict", str(CHART), *(["-f", str(CHART / values)] if values else []))
    assert result.returncode == 0, result.stdout


@needs_helm
def test_defaults_make_the_pipelines_and_no_schedule() -> None:
    objects = render()
    assert sorted(item["kind"] for item in objects) == [
        "ConfigMap",
        "NetworkPolicy",
        "Role",
        "Role",
        "RoleBinding",
        "ServiceAccount",
        *["WorkflowTemplate"] * 4,
    ]
    assert set(workflows(objects)) == {"finetune", "align", "retrain", "export"}
    assert all(item["metadata"]["namespace"] == "ml" for item in objects)


@needs_helm
def test_the_pipelines_are_the_compiled_ones_but_for_the_release_s_own_values() -> None:
    """With the settings of the compiled files, the chart changes labels and names of secrets only."""
    rendered = workflows(render("--set", "store=s3://bucket/prefix"))
    for name, template in rendered.items():
        compiled = yaml.safe_load((ROOT / "tests" / "pipelines" / "golden" / f"{name}-argo.yaml").read_text())
        for item in (template, compiled):
            for step in steps(item).values():
                del step["container"]["envFrom"]
                step["podSpecPatch"] = json.loads(step["podSpecPatch"])
                step["metadata"]["labels"].pop("app.kubernetes.io/instance", None)
                step["nodeSelector"] = step.get("nodeSelector") or {}
            item["spec"]["serviceAccountName"] = ""
        assert by_name(template["spec"]["volumes"]) == by_name(compiled["spec"]["volumes"])
        assert steps(template) == steps(compiled)
        for key in ("entrypoint", "podGC", "securityContext", "ttlStrategy", "arguments"):
            assert template["spec"][key] == compiled["spec"][key], key


def by_name(items: list[dict[str, Any]]) -> dict[str, Any]:
    return {item["name"]: item for item in items}


@needs_helm
def test_images_by_digest_and_registry() -> None:
    digest = "sha256:" + "0" * 64
    options = ["--set", "images.registry=r.example/team", "--set", f"images.train.digest={digest}"]
    found = steps(workflows(render(*options))["finetune"])
    assert found["train-qlora"]["container"]["image"] == f"r.example/team/finemill-train@{digest}"
    assert found["data-prep"]["container"]["image"] == "r.example/team/finemill-cpu:0.1.0"
    for step in found.values():
        assert by_name(step["container"]["env"])["FINEMILL_IMAGE"]["value"] == step["container"]["image"]


@needs_helm
def test_gpu_placement_reaches_gpu_steps_only() -> None:
    values = ["gpu.count=2", "gpu.queue=training", "gpu.nodeSelector.accelerator=a100", "gpu.resource=amd.com/gpu"]
    template = workflows(render(*[part for value in values for part in ("--set", value)]))["finetune"]
    found = steps(template)
    for name, step in found.items():
        patch = json.loads(step["podSpecPatch"])
        if name in ("train-qlora", "eval", "score-champion"):
            limits = patch["containers"][0]["resources"]["limits"]
            assert limits == {"amd.com/gpu": "{{workflow.parameters.gpus}}"}
            assert step["nodeSelector"] == {"accelerator": "a100"}
            assert step["tolerations"] == [{"key": "nvidia.com/gpu", "operator": "Exists"}]
            assert step["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "training"
        else:
            assert set(patch) == {"terminationGracePeriodSeconds"}
            assert "tolerations" not in step
    assert {"name": "gpus", "value": "2"}.items() <= by_name(template["spec"]["arguments"]["parameters"])[
        "gpus"
    ].items()


@needs_helm
def test_secrets_come_by_name_and_only_where_given() -> None:
    container = steps(workflows(render())["finetune"])["register"]["container"]
    assert container["envFrom"] == [{"configMapRef": {"name": "mill"}}]
    options = ["--set", "s3.existingSecret=bucket-keys", "--set", "mlflow.existingSecret=tracking"]
    container = steps(workflows(render(*options))["finetune"])["register"]["container"]
    assert container["envFrom"][1:] == [{"secretRef": {"name": "bucket-keys"}}, {"secretRef": {"name": "tracking"}}]


@needs_helm
def test_no_setting_means_no_variable() -> None:
    """An empty AWS variable would switch a pod's own identity off."""
    (config,) = [item for item in render() if item["kind"] == "ConfigMap"]
    assert not config.get("data")
    (config,) = [item for item in render("--set", "s3.region=eu-central-1") if item["kind"] == "ConfigMap"]
    assert config["data"] == {"AWS_DEFAULT_REGION": "eu-central-1"}


@needs_helm
def test_the_executor_s_role_has_two_verbs_on_one_resource() -> None:
    roles = {item["metadata"]["name"]: item["rules"] for item in render() if item["kind"] == "Role"}
    assert roles["mill"] == [
        {"apiGroups": ["argoproj.io"], "resources": ["workflowtaskresults"], "verbs": ["create", "patch"]}
    ]
    assert not any("*" in rule["verbs"] or "secrets" in rule["resources"] for rules in roles.values() for rule in rules)


@needs_helm
def test_the_schedule_keeps_its_name_from_version_to_version() -> None:
    (cron,) = [item for item in render("--set", "schedule.enabled=true") if item["kind"] == "CronWorkflow"]
    assert cron["metadata"]["name"] == "retrain"
    assert cron["spec"]["concurrencyPolicy"] == "Forbid"
    assert cron["spec"]["workflowSpec"]["workflowTemplateRef"] == {"name": "retrain"}


@needs_helm
def test_configuration_reaches_the_parameters() -> None:
    options = ["--set", "config.base_model=hf://Qwen/Qwen3-0.6B@abc", "--set", "config.train_qlora.lora_r=32"]
    parameters = by_name(workflows(render(*options))["finetune"]["spec"]["arguments"]["parameters"])
    assert parameters["base_model"]["value"] == "hf://Qwen/Qwen3-0.6B@abc"
    assert json.loads(parameters["train_qlora"]["value"]) == {"lora_r": 32}
    parameters = by_name(workflows(render("--set", "gpu.memoryGiB=24"))["finetune"]["spec"]["arguments"]["parameters"])
    assert json.loads(parameters["preflight"]["value"]) == {"gpu_memory_gib": 24}


@needs_helm
def test_the_cache_is_a_claim_or_scratch_space() -> None:
    volumes = by_name(workflows(render("--set", "cache.existingClaim=bases"))["finetune"]["spec"]["volumes"])
    assert volumes["cache"] == {"name": "cache", "persistentVolumeClaim": {"claimName": "bases"}}


@needs_helm
def test_the_training_runtime_is_restricted_and_starts_torchrun() -> None:
    (runtime,) = [item for item in render("--set", "trainingRuntime.enabled=true") if item["kind"] == "TrainingRuntime"]
    pod = runtime["spec"]["template"]["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert container["command"] == ["torchrun"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 1
    assert pod["automountServiceAccountToken"] is False
    assert container["securityContext"]["readOnlyRootFilesystem"] is True


@needs_helm
@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("imagez.registry=x", "imagez"),
        ("images.pullPolicy=Sometimes", "pullPolicy"),
        ("store=/mnt/models", "store"),
        ("schedule.cron=hourly", "cron"),
        ("gpu.count=two", "count"),
        ("resources.small.memory=lots", "memory"),
    ],
)
def test_wrong_values_are_refused(setting: str, message: str) -> None:
    assert message in render_error("--set", setting)


@needs_helm
def test_nodes_of_a_training_reach_each_other_and_nothing_else_of_the_release() -> None:
    documents = render("--set", "trainingRuntime.enabled=true")
    (policy,) = [item for item in documents if item["metadata"]["name"].endswith("-training")]
    (runtime,) = [item for item in documents if item["kind"] == "TrainingRuntime"]
    pod = runtime["spec"]["template"]["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]
    nodes = policy["spec"]["podSelector"]
    assert nodes["matchLabels"].items() <= pod["metadata"]["labels"].items()
    assert policy["spec"]["ingress"] == [{"from": [{"podSelector": nodes}]}]
    assert policy["spec"]["egress"] == [{"to": [{"podSelector": nodes}]}]
