import json
import re
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

import finemill
from finemill.cli import main
from finemill.pipelines.argo_container import RETRY_EXPRESSION
from finemill.pipelines.catalog import PIPELINES
from finemill.pipelines.graph import SMALL, Task
from finemill.transport import unpack
from tests.pipelines.compiled import CompiledTask, read_argo, read_kfp

pytestmark = pytest.mark.usefixtures("quick_kfp")

GOLDEN = Path(__file__).parent / "golden"
CLUSTER = """
gpu_node_selector: {accelerator: a100}
gpu_tolerations: [{key: nvidia.com/gpu, operator: Exists, effect: NoSchedule}]
queue: training
cache_claim: bases
sizes: {small: {cpu: 500m, memory: 1Gi}}
"""


def compile_both(name: str, folder: Path, *options: str) -> tuple[Any, Any]:
    files = {engine: folder / f"{engine}.yaml" for engine in ("kfp", "argo")}
    for engine, file in files.items():
        assert main(["compile", name, "--engine", engine, "-o", str(file), *options]) == 0
    return read_kfp(files["kfp"]), read_argo(files["argo"])


@pytest.mark.parametrize("name", list(PIPELINES))
def test_both_engines_get_the_same_steps_edges_parameters_conditions_retries_and_resources(
    name: str, tmp_path: Path
) -> None:
    (kfp_parameters, kfp), (argo_parameters, argo) = compile_both(name, tmp_path, "--store", "s3://bucket/prefix")
    assert kfp_parameters == argo_parameters
    assert set(kfp) == set(argo) == {task.name for task in PIPELINES[name].tasks}
    for task in kfp:
        assert kfp[task] == argo[task], task


@pytest.mark.parametrize(
    ("status", "exit_code", "message", "again"),
    [
        ("Error", -1, "pod deleted", True),  # its node was drained, or is gone
        ("Failed", 75, "main: Error (exit code 75)", True),  # and it had time for a checkpoint
        ("Failed", 143, "main: Error (exit code 143)", True),
        ("Failed", 137, "main: Error (exit code 137)", True),
        ("Failed", 137, "The node was low on resource: memory. Threshold quantity: 100Mi, available: 50Mi. ", True),
        ("Failed", -1, "The node was low on resource: ephemeral-storage. ", True),
        ("Failed", 137, "main: OOMKilled (exit code 137)", False),
        ("Failed", 137, "Pod ephemeral local storage usage exceeds the total limit of containers 64Gi. ", False),
        ("Failed", 143, 'Container main exceeded its local ephemeral storage limit "64Gi". ', False),
        ("Failed", -1, 'Usage of EmptyDir volume "shared-memory" exceeds the limit "2Gi". ', False),
        ("Failed", 2, "main: Error (exit code 2)", False),
        ("Failed", 1, "main: Error (exit code 1)", False),
    ],
)
def test_argo_tries_again_what_may_pass_elsewhere(status: str, exit_code: int, message: str, again: bool) -> None:
    """The messages are the kubelet's and Argo's, the expression's language is Python's but for its signs."""
    spelled = RETRY_EXPRESSION.replace("||", "or").replace("&&", "and").replace("!(", "not (")
    spelled = re.sub(r"lastRetry\.message matches ('[^']*')", r"re.search(\1, lastRetry.message)", spelled)
    last = SimpleNamespace(status=status, exitCode=str(exit_code), message=message)
    assert bool(eval(spelled, {"re": re, "asInt": int, "lastRetry": last})) is again


def test_the_cluster_s_settings_reach_both_engines(tmp_path: Path) -> None:
    settings = tmp_path / "cluster.yaml"
    settings.write_text(CLUSTER)
    (_, kfp), (_, argo) = compile_both("finetune", tmp_path, "--cluster", str(settings), "--image-cpu", "mine:1")
    assert kfp == argo
    training = argo["train-qlora"]
    assert (training.gpus, training.queue, training.shared_memory) == ("gpus", "training", "2Gi")
    assert training.node_selector == (("accelerator", "a100"),)
    assert '"effect": "NoSchedule"' in training.tolerations[0]
    rows = argo["data-prep"]
    assert (rows.image, rows.cpu, rows.memory, rows.gpus, rows.queue) == ("mine:1", "500m", "1Gi", None, None)
    assert (rows.node_selector, rows.tolerations) == ((), ())


def test_the_settings_for_a_test_cluster_fit_on_two_cores(tmp_path: Path) -> None:
    settings = Path(finemill.__file__).parent / "pipelines" / "configs" / "cluster-dev.yaml"
    (_, kfp), (_, argo) = compile_both("finetune", tmp_path, "--cluster", str(settings))
    assert kfp == argo
    assert {task.cpu for task in argo.values()} == {"500m", "1", "1500m"}
    assert all(task.image.startswith("localhost/finemill-") for task in argo.values())


def test_the_compiled_graph_is_the_defined_graph(tmp_path: Path) -> None:
    _, (_, compiled) = compile_both("retrain", tmp_path)
    for task in PIPELINES["retrain"].tasks:
        found: CompiledTask = compiled[task.name]
        assert found.upstream == {item.name for item in task.upstream}
        assert found.condition == ("detect-change.changed" if task.when else None)
        assert {name for name in found.inputs if not name.startswith("parameter ")} == {
            port for port, source in task.inputs.items() if hasattr(source, "step")
        }


@pytest.mark.parametrize("engine", ["kfp", "argo"])
@pytest.mark.parametrize("name", list(PIPELINES))
def test_compiled_pipelines_are_the_golden_files(name: str, engine: str, tmp_path: Path) -> None:
    """After a change on purpose: `make golden`, and read the difference."""
    golden = GOLDEN / f"{name}-{engine}.yaml"
    main(["compile", name, "--engine", engine, "--store", "s3://bucket/prefix", "-o", str(tmp_path / "out.yaml")])
    written = (tmp_path / "out.yaml").read_text()
    # kfp's comments repeat the parameters in an order that changes from run to run.
    assert re.sub(r"(?m)^#.*\n", "", written) == golden.read_text()


@pytest.mark.parametrize("name", list(PIPELINES))
def test_the_kfp_pipeline_is_of_the_published_specification(name: str) -> None:
    from google.protobuf import json_format
    from kfp.kubernetes import kubernetes_executor_config_pb2
    from kfp.pipeline_spec import pipeline_spec_pb2

    golden = GOLDEN / f"{name}-kfp.yaml"
    pipeline, platform = yaml.safe_load_all(golden.read_text())
    parsed = json_format.ParseDict(pipeline, pipeline_spec_pb2.PipelineSpec())
    executors = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    assert set(executors) == set(parsed.deployment_spec["executors"])
    for settings in executors.values():
        found = json_format.ParseDict(settings, kubernetes_executor_config_pb2.KubernetesExecutorConfig())
        assert found.security_context.run_as_non_root is True


@pytest.mark.parametrize("name", list(PIPELINES))
def test_every_kfp_task_gets_what_it_reads(name: str) -> None:
    """The driver fails on a parameter that the group around a task was not given."""
    pipeline, _ = yaml.safe_load_all((GOLDEN / f"{name}-kfp.yaml").read_text())
    groups = {"root": pipeline["root"], **pipeline["components"]}
    for group in (group for group in groups.values() if "dag" in group):
        given = group["inputDefinitions"]["parameters"]
        for task_name, task in group["dag"]["tasks"].items():
            inputs = task["inputs"]["parameters"]
            read = {value["componentInputParameter"] for value in inputs.values() if "componentInputParameter" in value}
            assert read <= set(given), task_name
            label = pipeline["components"][task["componentRef"]["name"]].get("executorLabel")
            resources = pipeline["deploymentSpec"]["executors"][label]["container"]["resources"] if label else {}
            assert set(re.findall(r"inputs\.parameters\['([^']+)'\]", str(resources))) <= set(inputs), task_name


@pytest.mark.parametrize("name", list(PIPELINES))
def test_kfp_s_mlflow_plugin_and_we_set_no_variable_twice(name: str) -> None:
    """The plugin's value and our reference would be merged into one variable, and the pod be refused."""
    _, platform = yaml.safe_load_all((GOLDEN / f"{name}-kfp.yaml").read_text())
    for settings in platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"].values():
        sources = [*settings["configMapAsEnv"], *settings["secretAsEnv"]]
        variables = [item["envVar"] for source in sources for item in source["keyToEnv"]]
        assert "FINEMILL_MLFLOW_TRACKING_URI" in variables
        assert not [variable for variable in variables if variable.startswith("MLFLOW_")]


def test_a_training_of_several_nodes_asks_argo_for_little_itself(tmp_path: Path) -> None:
    main(["compile", "finetune", "--engine", "argo", "-o", str(tmp_path / "out.yaml")])
    templates = yaml.safe_load((tmp_path / "out.yaml").read_text())["spec"]["templates"]
    patches = {item["name"]: json.loads(item["podSpecPatch"]) for item in templates if "container" in item}
    (training,) = patches["train-qlora"]["containers"]
    follows = "(fromJSON(workflow.parameters.train_qlora).num_nodes ?? 1) != 1"
    limits = training["resources"]["limits"]
    assert limits.pop("nvidia.com/gpu") == f"{{{{={follows} ? '0' : workflow.parameters.gpus}}}}"
    size = {"cpu": f"{{{{={follows} ? '1' : '8'}}}}", "memory": f"{{{{={follows} ? '2Gi' : '32Gi'}}}}"}
    assert limits == training["resources"]["requests"] == size
    (evaluation,) = patches["eval"]["containers"]
    assert evaluation["resources"] == {"limits": {"nvidia.com/gpu": "{{workflow.parameters.gpus}}"}}


@pytest.mark.parametrize("name", list(PIPELINES))
def test_the_argo_pipeline_reads_back_as_it_was_written(name: str) -> None:
    from hera.workflows import WorkflowTemplate

    golden = GOLDEN / f"{name}-argo.yaml"
    template: Any = WorkflowTemplate.from_yaml(golden.read_text())
    assert yaml.safe_load(template.to_yaml()) == yaml.safe_load(golden.read_text())


def test_every_attempt_of_kfp_has_a_week(tmp_path: Path) -> None:
    """KFP's own limit is one hour after the first attempt began: no long training would be tried again."""
    main(["compile", "finetune", "--engine", "kfp", "-o", str(tmp_path / "out.yaml")])
    pipeline = next(iter(yaml.safe_load_all((tmp_path / "out.yaml").read_text())))
    policies = [task["retryPolicy"] for task in pipeline["root"]["dag"]["tasks"].values()]
    assert {policy["backoffMaxDuration"] for policy in policies} == {"604800s"}


def test_argo_pods_fit_pod_security_restricted(tmp_path: Path) -> None:
    main(["compile", "retrain", "--engine", "argo", "-o", str(tmp_path / "out.yaml")])
    spec = yaml.safe_load((tmp_path / "out.yaml").read_text())["spec"]
    assert spec["securityContext"] == {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}}
    containers = [item["container"] for item in spec["templates"] if "container" in item]
    assert len(containers) == len(PIPELINES["retrain"].tasks)
    for container in containers:
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "runAsNonRoot": True,
            "capabilities": {"drop": ["ALL"]},
        }
    assert not any("hostPath" in volume for volume in spec["volumes"])


def test_a_schedule_never_overlaps_and_makes_nothing_up(tmp_path: Path) -> None:
    options = ["--schedule", "0 3 * * *", "--timezone", "Europe/Berlin", "-o", str(tmp_path / "out.yaml")]
    assert main(["compile", "retrain", "--engine", "argo", *options]) == 0
    template, cron = yaml.safe_load_all((tmp_path / "out.yaml").read_text())
    spec = cron["spec"]
    assert (spec["schedules"], spec["timezone"]) == (["0 3 * * *"], "Europe/Berlin")
    assert (spec["concurrencyPolicy"], spec["startingDeadlineSeconds"]) == ("Forbid", 300)
    assert spec["workflowSpec"]["workflowTemplateRef"]["name"] == template["metadata"]["name"]


def test_kubernetes_manifests_hold_the_pipeline(tmp_path: Path) -> None:
    assert main(["compile", "finetune", "--engine", "kfp", "--manifests", "-o", str(tmp_path / "out.yaml")]) == 0
    kinds = {item["kind"]: item for item in yaml.safe_load_all((tmp_path / "out.yaml").read_text())}
    assert set(kinds) == {"Pipeline", "PipelineVersion"}
    tasks = kinds["PipelineVersion"]["spec"]["pipelineSpec"]["root"]["dag"]["tasks"]
    assert set(tasks) == {task.name for task in PIPELINES["finetune"].tasks}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--engine", "kfp", "--schedule", "0 3 * * *"], "finemill submit --engine kfp --schedule"),
        (["--engine", "argo", "--manifests"], "--manifests is for KFP"),
        (["--engine", "argo", "--timezone", "UTC"], "give both"),
        (["--engine", "argo", "--cluster", "no-such.yaml"], "cluster settings no-such.yaml"),
    ],
)
def test_flags_of_the_other_engine_are_refused(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compile", "finetune", *options, "-o", str(tmp_path / "out.yaml")]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("engine", ["kfp", "argo"])
def test_nothing_secret_is_compiled_in(engine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_SECRET_ACCESS_KEY", "MLFLOW_TRACKING_PASSWORD", "HF_TOKEN"):
        monkeypatch.setenv(name, "hunter2-secret")
    main(["compile", "finetune", "--engine", engine, "-o", str(tmp_path / "out.yaml")])
    text = (tmp_path / "out.yaml").read_text()
    assert "hunter2" not in text
    assert not re.search(r"AKIA[0-9A-Z]{16}|hf_[A-Za-z]{30}|-----BEGIN", text)


def test_a_gate_needs_a_verdict() -> None:
    from finemill.pipelines.finetune import base_model, dataset, rows
    from finemill.pipelines.graph import task

    with pytest.raises(ValueError, match="waits for a verdict of data-prep, which gives none"):
        task("train-qlora", dataset=dataset, base_model=base_model, when=rows)


def test_local_runs_leave_out_what_only_a_cluster_needs() -> None:
    from finemill.pipelines.local import for_this_machine

    finetune = PIPELINES["finetune"]
    local = for_this_machine(finetune)
    assert [task.name for task in local.tasks] == [
        task.name for task in finetune.tasks if task.name not in ("preflight", "score-champion")
    ]
    assert all((task.retries, task.resources) == (0, SMALL) for task in local.tasks)


@pytest.mark.parametrize("name", PIPELINES)
def test_local_runs_have_one_order(name: str) -> None:
    from finemill.pipelines.local import for_this_machine

    tasks = for_this_machine(PIPELINES[name]).tasks
    for before, task in pairwise(tasks):
        assert before.name in {item.name for item in task.upstream}


@pytest.mark.parametrize("name", list(PIPELINES))
def test_argo_s_arguments_hold_nothing_to_expand(name: str) -> None:
    """Argo evaluates the values of parameters again, and the kubelet expands `$(NAME)`: neither finds any in base64."""
    golden = GOLDEN / f"{name}-argo.yaml"
    template = next(yaml.safe_load_all(golden.read_text()))
    arguments = [text for item in template["spec"]["templates"] for text in item.get("container", {}).get("args", [])]
    braces = [text for text in arguments if "{{" in text and text != "--run-id={{workflow.uid}}"]
    assert len(braces) > 10
    assert all(re.fullmatch(r"--[a-z-]+=base64:\{\{=sprig\.b64enc\((?:(?!\}\}).)*\)\}\}", text) for text in braces)


def test_defaults_that_an_engine_would_change_are_packed_for_kfp_and_braceless_for_argo(tmp_path: Path) -> None:
    config = tmp_path / "c.yaml"
    rows = "data_prep: {sources: [{uri: rows.jsonl}]}"
    config.write_text(f"{rows}\nchat_format: {{system_prompt: '$$5 {{{{=1}}}} $(HOME)', max_length: null}}")
    (kfp, _), (argo, _) = compile_both("finetune", tmp_path, "--config", str(config))
    expected = {"system_prompt": "$$5 {{=1}} $(HOME)", "max_length": None}
    assert unpack(kfp["chat_format"]) == argo["chat_format"] == expected
    assert "{{=1" not in (tmp_path / "kfp.yaml").read_text() + (tmp_path / "argo.yaml").read_text()
    assert "$(HOME)" not in (tmp_path / "kfp.yaml").read_text()


PLATFORM = """
env: {HTTPS_PROXY: "http://proxy:3128", PRICE: "$$5 $(HOME)"}
secret_env: {PROXY_PASSWORD: {secret: proxy, key: password}}
mounts:
  - {path: /etc/extra, secret: extra}
  - {path: /data, claim: shared}
ca_config_map: corporate-ca
ca_key: bundle.pem
affinity:
  nodeAffinity:
    requiredDuringSchedulingIgnoredDuringExecution:
      nodeSelectorTerms: [{matchExpressions: [{key: zone, operator: In, values: [a, b]}]}]
pod_labels: {sidecar.istio.io/inject: "false"}
pod_annotations: {cluster-autoscaler.kubernetes.io/safe-to-evict: "false"}
node_selector: {kubernetes.io/arch: amd64}
tolerations: [{key: team, operator: Exists, effect: NoExecute, tolerationSeconds: 60}]
"""


def test_what_a_platform_adds_reaches_every_step_on_both_engines(tmp_path: Path) -> None:
    settings = tmp_path / "cluster.yaml"
    settings.write_text(PLATFORM)
    (_, kfp), (_, argo) = compile_both("finetune", tmp_path, "--cluster", str(settings))
    assert kfp["data-prep"] == argo["data-prep"]
    assert kfp == argo
    for task in argo.values():
        assert task.variables["HTTPS_PROXY"] == "http://proxy:3128"
        assert task.variables["PRICE"] == "$$$$5 $$(HOME)"
        assert task.variables["AWS_CA_BUNDLE"] == "/etc/finemill/ca/bundle.pem"
        assert task.secret_variables == {"PROXY_PASSWORD": "proxy password"}
        assert task.node_affinity == yaml.safe_load(PLATFORM)["affinity"]["nodeAffinity"]
        assert task.mounts == {
            "/etc/extra": "secret extra",
            "/data": "persistentVolumeClaim shared",
            "/etc/finemill/ca": "configMap corporate-ca",
        }
        assert task.labels == {"sidecar.istio.io/inject": "false"}
        assert task.annotations == {"cluster-autoscaler.kubernetes.io/safe-to-evict": "false"}
        assert ("kubernetes.io/arch", "amd64") in task.node_selector
        assert '"tolerationSeconds": 60' in task.tolerations[0]


@pytest.mark.parametrize("engine", ["argo", "kfp"])
def test_the_file_may_be_called_anything(engine: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "pipeline.json"
    assert main(["compile", "export", "--engine", engine, "-o", str(file)]) == 0
    assert yaml.safe_load_all(file.read_text())
    assert main(["compile", "export", "--engine", engine, "-o", str(tmp_path)]) == 2
    assert "Is a directory" in capsys.readouterr().err


def test_pods_run_as_whom_the_platform_says(tmp_path: Path) -> None:
    """A namespace of OpenShift has numbers of its own, and so has a shared folder's owner."""
    file, out = tmp_path / "cluster.yaml", tmp_path / "out.yaml"
    file.write_text("run_as_user: 1000680000\nrun_as_group: 5\n")
    assert main(["compile", "finetune", "--engine", "argo", "--cluster", str(file), "-o", str(out)]) == 0
    assert {"runAsUser": 1000680000, "runAsGroup": 5}.items() <= yaml.safe_load(out.read_text())["spec"][
        "securityContext"
    ].items()
    assert main(["compile", "finetune", "--engine", "kfp", "--cluster", str(file), "-o", str(out)]) == 0
    assert out.read_text().count("runAsUser: '1000680000'") == len(PIPELINES["finetune"].tasks)


@pytest.mark.parametrize(
    "settings",
    [
        "priority_class: batch",
        "sizes: {gpu: {cpu: 1, memory: 4Gi, ephemeral_storage: 50Gi}}",
        "pod_disruption_budget: true",
        "affinity: {podAntiAffinity: {preferredDuringSchedulingIgnoredDuringExecution: []}}",
        "fs_group: 0",
        "supplemental_groups: [1001]",
    ],
)
def test_what_kfp_s_pods_do_not_have_is_for_argo_and_refused_for_kfp(
    settings: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, out = tmp_path / "cluster.yaml", tmp_path / "out.yaml"
    file.write_text(settings)
    assert main(["compile", "finetune", "--engine", "argo", "--cluster", str(file), "-o", str(out)]) == 0
    fields = "podPriorityClassName: batch|ephemeral-storage: 50Gi|minAvailable: 9999|podAntiAffinity"
    wanted = f"{fields}|fsGroupChangePolicy: OnRootMismatch|- 1001\n"
    assert re.search(wanted, out.read_text())
    assert main(["compile", "finetune", "--engine", "kfp", "--cluster", str(file), "-o", str(out)]) == 2
    assert "KFP's pods have no such field" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("mounts: [{path: /usr, claim: a}]", "/usr holds what the image needs"),
        ("shared_memory: 200Gi", "shared_memory of 200Gi counts into the 32Gi of GPU steps"),
        ("mounts: [{path: /x}]", "give one of config_map, secret and claim"),
        ("mounts: [{path: /x, claim: a, secret: b}]", "give one of config_map, secret and claim"),
        ("tolerations: [{keys: x}]", "unknown key 'tolerations.0.keys'"),
        ("env: {HTTPS_PROXY: 'http://me:secret@proxy'}", "the password in HTTPS_PROXY would be written out"),
        ("mounts: [{path: /var/run/argo, secret: a}]", "/var/run/argo is mounted already"),
        ("affinity: {nodeAfinity: {}}", "'affinity': Kubernetes would read {} of it"),
        ("affinity: {nodeAffinity: {preferred: []}}", "'affinity': Kubernetes would read"),
        ("affinity: {nodeAffinity: 5}", "'affinity"),
        ("secret_env: {A: {secret: b}}", "secret_env.A.key"),
        ("image_pull_policy: Sometimes", "'image_pull_policy': Input should be 'IfNotPresent', 'Always' or 'Never'"),
        ("image_cpu: My Image", "'image_cpu': String should match"),
        ("s3_secret: UPPER_x", "'s3_secret': String should match"),
        ("gpu_resource: gpu", "'gpu_resource': String should match"),
        ("env: {1A b: c}", "'env.1A b.[key]': String should match"),
        ("node_selector: {a b: c}", "'node_selector.a b.[key]': String should match"),
        ("pod_labels: {app.kubernetes.io/name: x}", "app.kubernetes.io/name is what steps are found by"),
        ("mounts: [{path: /tmp, claim: a}]", "/tmp is mounted already"),
        ("mounts: [{path: /x, claim: a}, {path: /x, secret: b}]", "/x is mounted already"),
        ("mounts: [{path: /x/, secret: b}]", "'mounts.0.path': String should match"),
        ("mounts: [{path: /, secret: b}]", "'mounts.0.path': String should match"),
        ("mounts: [{path: /x/../tmp, secret: b}]", "'mounts.0.path': String should match"),
        ("mounts: [{path: /a, secret: x}, {path: /b, config_map: x}]", "'x' is mounted twice, which KFP cannot do"),
        ("cache_claim: x\nmounts: [{path: /b, claim: x}]", "'x' is mounted twice, which KFP cannot do"),
        ("ca_config_map: my.ca", "KFP names a volume after 'my.ca'"),
        ("env: {A: x}\nsecret_env: {A: {secret: s, key: k}}", "A is in env and in secret_env"),
        ("env: {HF_TOKEN: hf_x}", "'env': HF_TOKEN would be written out for everybody"),
        ('env: {A: "x\\0y"}', "holds a NUL character"),
        ("queue_priority: high", "queue_priority is about the pods of a queue"),
        ("queue: a.b", "'queue': String should match"),
        ("s3_secret: a..b", "'s3_secret': String should match"),
        ("tolerations: [{key: a, tolerationSeconds: 5}]", "'tolerationSeconds' is about effect: NoExecute alone"),
        ("tolerations: [{key: a, value: x y}]", "'tolerations.0.value': String should match"),
        ("ttl_s: 99999999999", "'ttl_s': Input should be less than or equal to 2147483647"),
        ("tolerations: [{operator: Exists, value: x}]", "'Exists' takes no value"),
        ("tolerations: [{value: x}]", "'Equal' takes a key"),
        ("gpu_nodeselector: {}", "unknown key 'gpu_nodeselector'"),
        ("env: {A: 'x{{workflow.name}}'}", "'env.A': 'x{{workflow.name}}' holds '{{', which Argo"),
        ("pod_annotations: {a/b: '{{x}}'}", "'pod_annotations.a/b': '{{x}}' holds '{{'"),
        ("pod_labels: {a: x y}", "'pod_labels.a': String should match pattern"),
        ("gpu_node_selector: {a: -x}", "'gpu_node_selector.a': String should match pattern"),
    ],
)
def test_wrong_cluster_settings_name_the_key(
    settings: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "cluster.yaml"
    file.write_text(settings)
    assert main(["compile", "finetune", "--engine", "kfp", "--cluster", str(file), "-o", str(tmp_path / "x")]) == 2
    assert message in capsys.readouterr().err


def test_a_queue_s_priority_is_a_label_on_both_engines(tmp_path: Path) -> None:
    file = tmp_path / "cluster.yaml"
    file.write_text("queue: gpus\nqueue_priority: high")
    for engine in ("argo", "kfp"):
        out = tmp_path / f"{engine}.yaml"
        assert main(["compile", "finetune", "--engine", engine, "--cluster", str(file), "-o", str(out)]) == 0
        labels = ("queue-name: gpus", "priority-class: high")
        counts = [out.read_text().count(f"kueue.x-k8s.io/{label}") for label in labels]
        assert counts[0] == counts[1] > 0


def test_a_cluster_s_variables_win_over_the_steps_own(tmp_path: Path) -> None:
    file, out = tmp_path / "cluster.yaml", tmp_path / "out.yaml"
    file.write_text("env: {HF_HOME: /models, SSL_CERT_FILE: /own.pem}\nca_config_map: ca")
    assert main(["compile", "export", "--engine", "argo", "--cluster", str(file), "-o", str(out)]) == 0
    for template in yaml.safe_load(out.read_text())["spec"]["templates"]:
        variables = [(item["name"], item.get("value")) for item in template.get("container", {}).get("env", [])]
        assert len(dict(variables)) == len(variables)
        if variables:
            assert {("HF_HOME", "/models"), ("SSL_CERT_FILE", "/own.pem")} <= set(variables)


def keys_in(value: Any) -> set[str]:
    """Every key in it, at any depth."""
    if isinstance(value, dict):
        return set(value).union(*map(keys_in, value.values()))
    return set().union(*map(keys_in, value)) if isinstance(value, list) else set()


@pytest.mark.parametrize("file", sorted(GOLDEN.glob("*-argo.yaml")), ids=lambda file: file.stem)
def test_argo_4_finds_nothing_that_it_has_removed(file: Path) -> None:
    """Argo 4.0 knows their plurals, and `podPriorityClassName`, as 3.6 does."""
    removed = {"mutex", "semaphore", "schedule", "podPriority"}
    assert not keys_in(list(yaml.safe_load_all(file.read_text()))) & removed


@pytest.mark.parametrize("name", list(PIPELINES))
def test_what_takes_an_output_of_a_skipped_step_is_skipped_with_it(name: str) -> None:
    """Since 4.0.7 and 3.7.16 Argo ends a run in which a step that is not skipped lacks such an output."""
    for task in PIPELINES[name].tasks:
        for source in task.inputs.values():
            if isinstance(source, Task) and source.when:
                assert task.when == source.when
