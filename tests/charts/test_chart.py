import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft7Validator

from finemill.config import parse_config
from finemill.errors import UserError
from finemill.pipelines.cluster import ClusterConfig
from finemill.pipelines.names import NAME

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
    return objects_in(result.stdout)


def objects_in(text: str) -> list[dict[str, Any]]:
    # PyYAML's own loader takes a second for a chart.
    return [item for item in yaml.load_all(text, yaml.CSafeLoader) if item]


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
    # Compiled files ask for no disk: KFP's pods have no such field.
    no_disk = ",".join(f"resources.{size}.ephemeralStorage=" for size in ("small", "large", "gpu"))
    rendered = workflows(render("--set", f"store=s3://bucket/prefix,{no_disk}"))
    for name, template in rendered.items():
        compiled = yaml.safe_load((ROOT / "tests" / "pipelines" / "golden" / f"{name}-argo.yaml").read_text())
        for item in (template, compiled):
            for step in steps(item).values():
                del step["container"]["envFrom"]
                step["podSpecPatch"] = json.loads(step["podSpecPatch"])
                step["metadata"]["labels"].pop("app.kubernetes.io/instance", None)
                step["nodeSelector"] = step.get("nodeSelector") or {}
            for parameter in item["spec"]["arguments"]["parameters"]:
                if parameter["name"] == "preflight":
                    parameter["value"] = json.loads(parameter["value"])  # 30 is 30.0
            item["spec"]["serviceAccountName"] = ""
        assert by_name(template["spec"]["volumes"]) == by_name(compiled["spec"]["volumes"])
        assert steps(template) == steps(compiled)
        for key in ("entrypoint", "activeDeadlineSeconds", "podGC", "securityContext", "ttlStrategy", "arguments"):
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
            assert "workflow.parameters.gpus}}" in limits["amd.com/gpu"]
            assert ("num_nodes" in limits["amd.com/gpu"]) == (name == "train-qlora")
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
    assert json.loads(parameters["preflight"]["value"]) == {"gpu_memory_gib": 24, "host_memory_gib": 30}


@needs_helm
def test_the_cache_is_a_claim_or_scratch_space() -> None:
    volumes = by_name(workflows(render("--set", "cache.existingClaim=bases"))["finetune"]["spec"]["volumes"])
    assert volumes["cache"] == {"name": "cache", "persistentVolumeClaim": {"claimName": "bases"}}


@needs_helm
def test_the_training_runtime_is_restricted_and_starts_torchrun() -> None:
    (runtime,) = [item for item in render("--set", "trainingRuntime.enabled=true") if item["kind"] == "TrainingRuntime"]
    job = runtime["spec"]["template"]["spec"]["replicatedJobs"][0]["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    # The step that follows reads how its nodes ended, which no restart may hide, and makes the next job itself.
    assert (job["backoffLimit"], pod["restartPolicy"]) == (0, "Never")
    assert container["command"] == ["torchrun"]  # a TrainJob that a step makes has a command of its own
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 1
    assert pod["automountServiceAccountToken"] is False
    assert container["securityContext"]["readOnlyRootFilesystem"] is True


@needs_helm
def test_steps_may_make_train_jobs_where_there_is_a_runtime_and_nowhere_else() -> None:
    for enabled in ("true", "false"):
        documents = render("--set", f"trainingRuntime.enabled={enabled},gpu.queue=gpus,gpu.queuePriority=high")
        labels = steps(workflows(documents)["finetune"])["train-qlora"]["metadata"]["labels"]
        assert labels["kueue.x-k8s.io/priority-class"] == "high"
        settings = next(item["data"] for item in documents if item["kind"] == "ConfigMap") or {}
        role = next(item for item in documents if item["kind"] == "Role")
        verbs = {name: rule["verbs"] for rule in role["rules"] for name in rule["resources"]}
        runtimes = [item["metadata"]["name"] for item in documents if item["kind"] == "TrainingRuntime"]
        assert [settings[name] for name in settings if name == "FINEMILL_TRAINING_RUNTIME"] == runtimes
        assert settings.get("FINEMILL_TRAINING_QUEUE") == ("gpus" if runtimes else None)
        assert settings.get("FINEMILL_TRAINING_PRIORITY") == ("high" if runtimes else None)
        assert verbs.get("trainjobs") == (["create", "get", "delete"] if runtimes else None)
        assert verbs.get("pods/log") == (["get"] if runtimes else None)


def setting_as_values(setting: str) -> dict[str, Any]:
    """What Helm makes of `--set`: `a.b[0].c=x,d=y`, where a dot behind a backslash is none."""
    values: dict[str, Any] = {}
    for assignment in setting.split(","):
        path, _, text = assignment.partition("=")
        at = values
        *parents, last = re.split(r"(?<!\\)\.", path)
        for key in parents:
            name, _, position = key.partition("[")
            at = at.setdefault(name, [{}] if position else {})
            at = at[0] if isinstance(at, list) else at
        name, _, position = last.replace("\\.", ".").partition("[")
        at[name] = [yaml.safe_load(text)] if position else yaml.safe_load(text)
    return values


@pytest.fixture(scope="module")
def check_values() -> Draft7Validator:
    return Draft7Validator(json.loads((CHART / "values.schema.json").read_text()))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("imagez.registry=x", "imagez"),
        ("images.pullPolicy=Sometimes", "pullPolicy"),
        ("store=/mnt/models", "store"),
        ("schedule.cron=hourly", "cron"),
        ("gpu.count=two", "count"),
        ("resources.small.memory=lots", "memory"),
        ("resources.small.memory=2GB", "memory"),
        ("resources.smal.memory=2Gi", "smal"),
        ("schedule.cron=99 99 * * *", "cron"),
        ("schedule.cron=", "cron"),
        ("schedule.timezone=Mars/Base", "timezone"),
        ("images.registry=r.example/", "registry"),
        ("config.train_qlra.lora_r=64", "train_qlra"),
        ("config.train_qlora.lora_rank=64", "lora_rank"),
        ("config.train_qlora.lora_r=0", "lora_r"),
        ("config.data_prep.sources[0].url=s3://b/rows", "url"),
        ("config.base_model=5", "base_model"),
        ("gpu.tolerations[0].keys=x", "keys"),
        ("extraEnv[0].values=x", "values"),
        ("extraEnv[0].name=A,extraEnv[0].valueFrom.secretKeyReff.name=x", "secretKeyReff"),
        ("extraVolumes[0].name=x,extraVolumes[0].secret.name=x", "secret"),
        ("extraVolumeMounts[0].name=x,extraVolumeMounts[0].path=/x", "path"),
        ("affinity.nodeAfinity.a=b", "nodeAfinity"),
        ("networkPolicy.extraEgress[0].port=5", "port"),
        ("extraEnv[0].value=a{{x}},extraEnv[0].name=A", "value"),
        ("podAnnotations.a=a{{x}}", "podAnnotations"),
        ("podLabels.a=x y", "podLabels"),
        ("s3.endpointUrl=minio:9000", "endpointUrl"),
        ("hub.endpoint=hub.example", "endpoint"),
        ("mlflow.trackingUri=mlflow:5000", "trackingUri"),
        ("store=s3://b/{{x}}", "store"),
        ("s3.existingSecret=Keys_x", "existingSecret"),
        ("images.pullSecrets[0]=a b", "pullSecrets"),
        ("images.train.tag=a b", "tag"),
        ("images.train.repository=a b", "repository"),
        ("s3.endpointUrl=http://user:secret@minio", "endpointUrl"),
        ("mlflow.trackingUri=http://user:secret@mlflow", "trackingUri"),
        ("gpu.resource=gpu", "resource"),
        ("resources.gpu.cpu=0m", "cpu"),
        ("resources.gpu.cpu=-1", "cpu"),
        ("resources.gpu.memory=32", "memory"),
        ("priorityClassName=High Prio", "priorityClassName"),
        (f"workflow.namePrefix={'a' * 41}", "namePrefix"),
        ("podLabels.app\\.kubernetes\\.io/name=x", "app.kubernetes.io/name"),
        ("nodeSelector.a b=c", "a b"),
        ("tolerations[0].effect=Never", "effect"),
        ("extraEnv[0].name=a b", "a b"),
        ("extraVolumes[0].name=tmp", "name"),
        ("extraVolumeMounts[0].name=tmp,extraVolumeMounts[0].mountPath=/cache", "mountPath"),
        ("extraVolumeMounts[0].name=a,extraVolumeMounts[0].mountPath=/tmp/", "mountPath"),
        ("extraVolumeMounts[0].name=a,extraVolumeMounts[0].mountPath=data", "mountPath"),
        ("extraVolumeMounts[0].name=a,extraVolumeMounts[0].mountPath=/", "mountPath"),
        ("extraVolumeMounts[0].name=a,extraVolumeMounts[0].mountPath=/x,extraVolumeMounts[0].subPath=../y", "subPath"),
        ("extraVolumes[0].name=a", "extraVolumes.0"),
        ("extraVolumes[0].name=a,extraVolumes[0].emptyDir.medium=Memory,extraVolumes[0].nfs.path=/", "extraVolumes.0"),
        ("extraVolumes[0].name=A_b,extraVolumes[0].emptyDir.medium=Memory", "name"),
        ("extraEnv[0].name=A,extraEnv[0].value=x,extraEnv[0].valueFrom.fieldRef.fieldPath=x", "none beside a value"),
        ("extraEnv[0].name=A,extraEnv[0].valueFrom.fieldRef.key=x", "valueFrom"),
        ("extraEnv[0].name=HF_TOKEN,extraEnv[0].value=hf_x", "from a Secret"),
        ("tolerations[0].operator=Exists,tolerations[0].value=x", "value"),
        ("tolerations[0].value=x", "key"),
        ("gpu.tolerations[0].key=a b", "key"),
        (
            "tolerations[0].key=a,tolerations[0].effect=NoSchedule,tolerations[0].tolerationSeconds=5",
            "NoExecute",
        ),
        ("workflow.ttlSeconds=2147483648", "ttlSeconds"),
        ("gpu.queue=a.b", "queue"),
        (f"gpu.queue={'a' * 64}", "queue"),
        ("s3.existingSecret=a..b", "existingSecret"),
        (f"s3.existingSecret={'a' * 254}", "existingSecret"),
        ("serviceAccount.annotations.a b=c", "a b"),
        ("s3.endpointUrl=http://minio:99999", "endpointUrl"),
        ("mlflow.trackingUri=https://mlflow/?token=x", "trackingUri"),
        ("s3.region=eu central", "region"),
        ("extraEnv[0].name=HTTPS_PROXY,extraEnv[0].value=http://me:secret@proxy:3128", "value"),
        ("extraVolumes[0].name=var-run-argo,extraVolumes[0].emptyDir.medium=Memory", "name"),
        ("extraVolumeMounts[0].name=a,extraVolumeMounts[0].mountPath=/var/run/argo", "mountPath"),
        ("networkPolicy.extraEgress[0].ports[0].protocol=tcp", "protocol"),
        ("networkPolicy.extraEgress[0].ports[0].port=70000", "port"),
        ("networkPolicy.extraEgress[0].to[0].ipBlock.cidr=10.0.0.0", "cidr"),
        ("networkPolicy.extraEgress[0].to[0].ipBlock.cidr=10.0.0.300/8", "cidr"),
        ("networkPolicy.extraEgress[0].to[0].ipBlock.cidr=10.0.0.0/33", "cidr"),
        ("networkPolicy.extraEgress[0].to[0].ipBlok.cidr=10.0.0.0/8", "ipBlok"),
        ("networkPolicy.extraEgress[0].to[0].podSelector.matchLabel.a=b", "matchLabel"),
    ],
)
def test_wrong_values_are_refused(setting: str, message: str, check_values: Draft7Validator) -> None:
    errors = list(check_values.iter_errors(setting_as_values(setting)))
    assert any(message in f"{'.'.join(map(str, error.absolute_path))}: {error.message}" for error in errors)


def of_nodes(term: str) -> str:
    return f"nodeAffinity: {{requiredDuringSchedulingIgnoredDuringExecution: {{nodeSelectorTerms: {term}}}}}"


def of_pods(selector: str) -> str:
    term = f"{{topologyKey: a, labelSelector: {selector}}}"
    return f"podAffinity: {{requiredDuringSchedulingIgnoredDuringExecution: [{term}]}}"


@pytest.mark.parametrize(
    ("affinity", "problem"),
    [
        (of_nodes("[]"), "nodeSelectorTerms is empty"),
        (of_nodes("[{matchExpressions: [{key: a, operator: in, values: [b]}]}]"), "operator in is none of In, NotIn"),
        (of_nodes("[{matchExpressions: [{key: a, operator: In}]}]"), "operator In takes values"),
        (of_nodes("[{matchExpressions: [{key: a, operator: Exists, values: [b]}]}]"), "Exists takes no values"),
        (of_nodes("[{matchExpressions: [{key: a, operator: Gt, values: [b]}]}]"), "Gt takes one whole number"),
        (
            "nodeAffinity: {preferredDuringSchedulingIgnoredDuringExecution: [{weight: 0, preference: {}}]}",
            "weight 0 is none from 1 to 100",
        ),
        (
            "podAntiAffinity: {requiredDuringSchedulingIgnoredDuringExecution: [{topologyKey: ''}]}",
            "topologyKey is empty",
        ),
        (
            of_pods("{matchExpressions: [{key: a, operator: Lt, values: ['1']}]}"),
            "operator Lt is none of In, NotIn, Exists, DoesNotExist",
        ),
    ],
)
def test_an_affinity_that_kubernetes_refuses_is_refused_by_the_chart_and_the_cluster_s_file(
    affinity: str, problem: str, check_values: Draft7Validator
) -> None:
    values = {"affinity": yaml.safe_load(affinity)}
    assert not check_values.is_valid(values)
    with pytest.raises(UserError, match=problem):
        parse_config(ClusterConfig, values, "cluster.yaml")


def test_an_affinity_that_kubernetes_takes_is_taken(check_values: Draft7Validator) -> None:
    values = {"affinity": yaml.safe_load(of_nodes("[{matchExpressions: [{key: a/b, operator: Gt, values: ['8']}]}]"))}
    check_values.validate(values)
    assert parse_config(ClusterConfig, values, "cluster.yaml").affinity == values["affinity"]


@needs_helm
def test_steps_with_an_identity_of_the_cloud_reach_what_gives_it_out_and_others_do_not() -> None:
    for secret, is_open in (("", True), ("keys", False)):
        (policy,) = [item for item in render("--set", f"s3.existingSecret={secret}") if item["kind"] == "NetworkPolicy"]
        blocks = [peer["ipBlock"]["cidr"] for rule in policy["spec"]["egress"] for peer in rule.get("to", [])]
        assert ("169.254.0.0/16" in blocks) is is_open


@needs_helm
@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("imagez.registry=x", "imagez"),
        ("config.data_prep.sources[0].url=s3://b/rows", "url"),
        ("extraVolumeMounts[0].name=x,extraVolumeMounts[0].mountPath=/x", "there is no volume 'x'"),
        ("extraEnv[0].name=A,extraEnv[0].value=x,extraEnv[1].name=A", "extraEnv: 'A' is there twice"),
        ("serviceAccount.create=false", "name the one to use in serviceAccount.name"),
        ("schedule.enabled=true,schedule.cron=0 22-06 * * *", "'22-06' falls"),
        ("schedule.enabled=true,schedule.cron=0 3 * * Fri-Mon", "'5-1' falls"),
        ("schedule.enabled=true,schedule.cron=0 3 30\\,31 FEB ?", "a day that its months do not have"),
        ("schedule.enabled=true,schedule.cron=0 3 31 4\\,6 *", "a day that its months do not have"),
        ("gpu.queuePriority=high", "name it in gpu.queue"),
        ("gpu.sharedMemory=32Gi", "gpu.sharedMemory counts into resources.gpu.memory"),
        ("gpu=null", "gpu: null is no section"),
        ("images.train=null", "images.train: null is no section"),
        ("images.cpu.repository=null", "images.cpu.repository names no image"),
    ],
)
def test_helm_refuses_wrong_values(setting: str, message: str) -> None:
    assert message in render_error("--set", setting)


@needs_helm
def test_a_list_that_is_null_is_empty() -> None:
    names = (
        "config",
        "extraEnv",
        "extraVolumes",
        "tolerations",
        "gpu.tolerations",
        "gpu.nodeSelector",
        "networkPolicy.hubPorts",
    )
    options = ("trainingRuntime.enabled=true", *(f"{name}=null" for name in names))
    found = steps(workflows(render("--set", ",".join(options)))["finetune"])
    assert not found["train-qlora"]["tolerations"]


@needs_helm
def test_seconds_of_a_month_are_whole_numbers(tmp_path: Path) -> None:
    """Helm reads numbers of a file as floats, and writes those above a million with an exponent."""
    month = 2592000
    values = tmp_path / "values.yaml"
    values.write_text(
        f"trainingRuntime: {{enabled: true}}\nworkflow: {{ttlSeconds: {month}, terminationGracePeriodSeconds: {month}}}"
    )
    objects = render("-f", str(values))
    assert workflows(objects)["finetune"]["spec"]["ttlStrategy"] == {"secondsAfterCompletion": month}
    (runtime,) = [item for item in objects if item["kind"] == "TrainingRuntime"]
    pod = runtime["spec"]["template"]["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    assert repr(pod["terminationGracePeriodSeconds"]) == str(month)


@needs_helm
def test_variables_of_a_platform_win_over_those_of_the_steps() -> None:
    options = (
        "extraEnv[0].name=HF_HOME,extraEnv[0].value=/models",
        "caBundle.configMap=ca",
        "trainingRuntime.enabled=true",
    )
    objects = render("--set", ",".join(options))
    (runtime,) = [item for item in objects if item["kind"] == "TrainingRuntime"]
    pod = runtime["spec"]["template"]["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    containers = [step["container"] for step in steps(workflows(objects)["finetune"]).values()]
    for container in (*containers, *pod["containers"]):
        names = [variable["name"] for variable in container["env"]]
        assert len(names) == len(set(names))
        assert by_name(container["env"])["HF_HOME"]["value"] == "/models"


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


PLATFORM = """
extraEnv:
  - {name: HTTPS_PROXY, value: "http://proxy:3128"}
  - {name: PROXY_PASSWORD, valueFrom: {secretKeyRef: {name: proxy, key: password}}}
extraVolumes: [{name: extra, emptyDir: {sizeLimit: 1Gi}}]
extraVolumeMounts: [{name: extra, mountPath: /etc/extra}]
podLabels: {sidecar.istio.io/inject: "false"}
podAnnotations: {cluster-autoscaler.kubernetes.io/safe-to-evict: "false"}
priorityClassName: batch
nodeSelector: {kubernetes.io/arch: amd64}
tolerations: [{key: team, operator: Exists, effect: NoExecute, tolerationSeconds: 60}]
affinity:
  podAntiAffinity:
    preferredDuringSchedulingIgnoredDuringExecution:
      - {weight: 1, podAffinityTerm: {topologyKey: host, labelSelector: {matchLabels: {a: b}}}}
caBundle: {configMap: corporate-ca}
resources: {small: {ephemeralStorage: 20Gi}, gpu: {ephemeralStorage: 50Gi}}
gpu: {nodeSelector: {accelerator: a100}}
workflow: {podDisruptionBudget: true, namePrefix: team-a-}
images: {pullSecrets: [regcred]}
cache: {existingClaim: models}
trainingRuntime: {enabled: true}
schedule: {enabled: true}
"""


@pytest.fixture
def platform(tmp_path: Path) -> list[dict[str, Any]]:
    values = tmp_path / "platform.yaml"
    values.write_text(PLATFORM)
    return render("-f", str(values))


@needs_helm
def test_what_a_platform_adds_reaches_every_step(platform: list[dict[str, Any]]) -> None:
    templates = workflows(platform)
    assert set(templates) == {"team-a-finetune", "team-a-align", "team-a-retrain", "team-a-export"}
    for template in templates.values():
        spec = template["spec"]
        assert spec["podMetadata"]["labels"] == {"sidecar.istio.io/inject": "false"}
        assert spec["podMetadata"]["annotations"] == {"cluster-autoscaler.kubernetes.io/safe-to-evict": "false"}
        assert (spec["podPriorityClassName"], list(spec["affinity"])) == ("batch", ["podAntiAffinity"])
        assert spec["nodeSelector"] == {"kubernetes.io/arch": "amd64"}
        assert spec["podDisruptionBudget"]["minAvailable"] > 100
        assert {"extra", "ca-bundle"} <= set(by_name(spec["volumes"]))
        for step in steps(template).values():
            variables = by_name(step["container"]["env"])
            assert variables["HTTPS_PROXY"]["value"] == "http://proxy:3128"
            assert variables["AWS_CA_BUNDLE"]["value"] == "/etc/finemill/ca/ca.crt"
            mounts = by_name(step["container"]["volumeMounts"])
            assert mounts["extra"]["mountPath"] == "/etc/extra"
            assert mounts["ca-bundle"]["mountPath"] == "/etc/finemill/ca"
    found = steps(templates["team-a-finetune"])
    assert found["data-prep"]["container"]["resources"]["limits"]["ephemeral-storage"] == "20Gi"
    assert found["merge"]["container"]["resources"]["limits"]["ephemeral-storage"] == "64Gi"
    training = found["train-qlora"]
    assert training["nodeSelector"] == {"accelerator": "a100", "kubernetes.io/arch": "amd64"}
    assert [item["key"] for item in training["tolerations"]] == ["nvidia.com/gpu", "team"]
    (cron,) = [item for item in platform if item["kind"] == "CronWorkflow"]
    assert cron["spec"]["workflowSpec"]["workflowTemplateRef"] == {"name": "team-a-retrain"}


@needs_helm
def test_the_training_runtime_has_what_the_steps_have(platform: list[dict[str, Any]]) -> None:
    (runtime,) = [item for item in platform if item["kind"] == "TrainingRuntime"]
    template = runtime["spec"]["template"]["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]
    assert template["metadata"]["labels"]["sidecar.istio.io/inject"] == "false"
    assert template["metadata"]["annotations"]
    pod = template["spec"]
    assert pod["imagePullSecrets"] == [{"name": "regcred"}]
    assert by_name(pod["volumes"])["cache"]["persistentVolumeClaim"] == {"claimName": "models"}
    assert pod["priorityClassName"] == "batch"
    (container,) = pod["containers"]
    step = steps(workflows(platform)["team-a-finetune"])["train-qlora"]["container"]
    variables, of_step = by_name(container["env"]), by_name(step["env"])
    threads = variables["OMP_NUM_THREADS"]["valueFrom"]["resourceFieldRef"]
    assert threads.items() <= of_step["OMP_NUM_THREADS"]["valueFrom"]["resourceFieldRef"].items()
    assert variables == {**of_step, "OMP_NUM_THREADS": variables["OMP_NUM_THREADS"]}
    assert by_name(container["volumeMounts"]) == by_name(step["volumeMounts"])


def allowed_ports(objects: list[dict[str, Any]]) -> set[tuple[int, str]]:
    (policy,) = [item for item in objects if item["kind"] == "NetworkPolicy"]
    return {(item["port"], item["protocol"]) for rule in policy["spec"]["egress"] for item in rule.get("ports", [])}


@needs_helm
def test_the_network_policy_lets_through_what_the_values_name() -> None:
    settings = [
        "s3.endpointUrl=http://ceph.example.com:7480",
        "mlflow.trackingUri=http://user@mlflow.mlops:8080/path",
        "hub.endpoint=http://mirror",
        "extraEnv[0].name=https_proxy",
        "extraEnv[0].value=proxy:3128",
        "extraEnv[1].name=AWS_ENDPOINT_URL_S3",
        "extraEnv[1].value=https://[fd00::1]:9443",
        "extraEnv[2].name=MLFLOW_REGISTRY_URI",
        "extraEnv[2].value=postgresql+psycopg2://registry/mlflow",
        "config.promote.webhook_url=https://hooks.example.com:8443/x",
        "config.data_prep.sources[0].uri=https://files.example.com:8444/x.jsonl",
    ]
    ports = allowed_ports(render(*[part for setting in settings for part in ("--set-string", setting)]))
    assert {(port, "TCP") for port in (7480, 8080, 80, 3128, 9443, 5432, 8443, 8444)} <= ports
    # OpenShift's name service listens at 5353.
    assert {(port, protocol) for port in (53, 5353) for protocol in ("UDP", "TCP")} <= ports


@needs_helm
@pytest.mark.parametrize(("release", "namespace"), [("a" * 49 + ".b", "123"), ("1.5", "true"), ("null", "null")])
def test_objects_have_names_that_kubernetes_takes(release: str, namespace: str) -> None:
    options = ("--namespace", namespace, "--kube-version", "1.34.0", "--set", "trainingRuntime.enabled=true")
    objects = objects_in(helm("template", release, str(CHART), *options).stdout)
    assert {item["metadata"]["namespace"] for item in objects} == {namespace}
    assert all(re.fullmatch(NAME, item["metadata"]["name"]) for item in objects)


@needs_helm
def test_a_release_and_what_it_names_may_be_called_by_numbers() -> None:
    numbers = ("cache.existingClaim=7", "images.pullSecrets[0]=7", "s3.existingSecret=7", "gpu.queue=7")
    named = [part for number in numbers for part in ("--set-string", number)]
    options = ("--kube-version", "1.34.0", "--set", "trainingRuntime.enabled=true", *named)
    for item in objects_in(helm("template", "123", str(CHART), *options).stdout):
        assert all(isinstance(value, str) for value in item["metadata"]["labels"].values())
        assert not [name for name in named_in(item) if not isinstance(name, str)]


def named_in(value: Any) -> Iterator[Any]:
    """Whatever stands under a name, or a claim's, at any depth."""
    if isinstance(value, dict):
        yield from (item for key, item in value.items() if key in ("name", "claimName"))
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from named_in(item)


@needs_helm
def test_a_version_with_build_metadata_is_no_label_with_a_plus(tmp_path: Path) -> None:
    """Flux appends a digest to a chart's version."""
    versions = ("--version", "0.1.0+g1234567", "--app-version", "0.1.0+g1234567")
    helm("package", str(CHART), *versions, "-d", str(tmp_path))
    result = helm("template", "mill", str(tmp_path / "finemill-0.1.0+g1234567.tgz"), "--kube-version", "1.34.0")
    objects = objects_in(result.stdout)
    assert {item["metadata"]["labels"]["helm.sh/chart"] for item in objects} == {"finemill-0.1.0_g1234567"}
    assert "0.1.0+g" not in result.stdout


@needs_helm
@pytest.mark.parametrize(("enabled", "count"), [("true", 10), ("false", 0)])
def test_a_chart_that_holds_this_one_switches_it_on_and_off(enabled: str, count: int, tmp_path: Path) -> None:
    shutil.copytree(CHART, tmp_path / "charts" / "finemill")
    dependency = "{name: finemill, version: 0.1.0, condition: finemill.enabled}"
    (tmp_path / "Chart.yaml").write_text(
        f"apiVersion: v2\nname: platform\nversion: 1.0.0\ndependencies: [{dependency}]\n"
    )
    (tmp_path / "values.yaml").write_text(f"finemill: {{enabled: {enabled}, store: s3://models/finemill}}")
    result = helm("template", "mill", str(tmp_path), "--kube-version", "1.34.0")
    assert result.returncode == 0, result.stderr
    assert len(objects_in(result.stdout)) == count


@needs_helm
def test_texts_in_the_configuration_hold_nothing_for_argo_to_evaluate(tmp_path: Path) -> None:
    prompt = 'Put $$\\boxed{}$$, {{=1+1}}, $(HOME) and "quotes"'
    values = tmp_path / "values.yaml"
    values.write_text(json.dumps({"config": {"chat_format": {"system_prompt": prompt}}}))
    parameters = by_name(workflows(render("-f", str(values)))["finetune"]["spec"]["arguments"]["parameters"])
    text = parameters["chat_format"]["value"]
    assert "{{" not in text
    assert json.loads(text) == {"system_prompt": prompt}


@needs_helm
def test_pods_run_as_whom_the_platform_says(tmp_path: Path) -> None:
    """Helm reads a whole number of a file as a fraction; OpenShift's are long enough to be written with an exponent."""
    given = {"runAsUser": 1000680000, "fsGroup": 1000680000, "supplementalGroups": [5]}
    values = tmp_path / "values.yaml"
    values.write_text(yaml.safe_dump({"podSecurityContext": given, "trainingRuntime": {"enabled": True}}))
    objects = render("-f", str(values))
    runtime = next(item for item in objects if item["kind"] == "TrainingRuntime")
    [job] = runtime["spec"]["template"]["spec"]["replicatedJobs"]
    node = job["template"]["spec"]["template"]["spec"]
    for spec in (node, *(item["spec"] for item in workflows(objects).values())):
        assert given.items() <= spec["securityContext"].items()
        assert spec["securityContext"]["fsGroupChangePolicy"] == "OnRootMismatch"
        assert spec["securityContext"]["runAsNonRoot"]
    assert "minimum: got 0" in render_error("--set", "podSecurityContext.runAsUser=0")
