"""The chart's life: beside another release, with another configuration, and gone."""

import pytest

from tests.cluster.conftest import ROOT, Cluster, wait_until

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(600)]
CHART = str(ROOT / "charts" / "finemill")
KINDS = "workflowtemplates,cronworkflows,networkpolicies,roles,rolebindings,serviceaccounts,configmaps"


def names(cluster: Cluster, release: str) -> set[str]:
    """What the release has in the namespace, `kind/name`."""
    items = cluster.get(KINDS, "-l", f"app.kubernetes.io/instance={release}")["items"]
    return {f"{item['kind']}/{item['metadata']['name']}" for item in items}


def test_a_second_release_needs_a_prefix_and_leaves_nothing_behind(cluster: Cluster) -> None:
    place = ("-n", cluster.namespace, "--set", f"store={cluster.store}")
    refused = cluster.run("helm", "install", "other", CHART, *place, check=False)
    assert "exists and cannot be imported into the current release: invalid ownership metadata" in refused.stderr
    assert not names(cluster, "other")
    first = names(cluster, "mill")
    options = ("--set", "workflow.namePrefix=team-a-,schedule.enabled=true,rbac.submitRole=false")
    cluster.run("helm", "install", "other", CHART, *place, *options)
    assert {"WorkflowTemplate/team-a-finetune", "CronWorkflow/team-a-retrain", "ServiceAccount/other"} <= names(
        cluster, "other"
    )
    engine = ("--engine", "argo", "--namespace", cluster.namespace, "--prefix", "team-a-")
    run = cluster.finemill("submit", "finetune", *engine, *cluster.config).stdout.strip()
    assert run.startswith("team-a-finetune-")
    cluster.kubectl("delete", "workflow", run)
    cluster.finemill("submit", "finetune", *engine, *cluster.config, "--schedule", "0 3 1 1 *")
    assert cluster.get("cronworkflow", "team-a-finetune")
    cluster.run("helm", "upgrade", "other", CHART, *place, "--set", "workflow.namePrefix=team-b-")
    upgraded = names(cluster, "other")
    assert "WorkflowTemplate/team-b-retrain" in upgraded
    assert not [name for name in upgraded if "team-a-" in name or name.startswith("CronWorkflow")]
    cluster.run("helm", "uninstall", "other", "-n", cluster.namespace)
    assert not names(cluster, "other")
    assert names(cluster, "mill") == first
    schedules = "cronworkflows"
    wait_until(lambda: not cluster.get(schedules)["items"], 60, "the schedule of a pipeline that is gone to go, too")
