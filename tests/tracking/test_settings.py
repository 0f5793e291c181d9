from pathlib import Path

import pytest

import finemill
from finemill.errors import UserError
from finemill.tracking.settings import NOWHERE, Tracking


def test_settings_are_mlflow_s_variables_and_empty_ones_are_none() -> None:
    variables = {
        "MLFLOW_TRACKING_URI": "http://runs",
        "MLFLOW_REGISTRY_URI": "",
        "MLFLOW_RUN_ID": "abc",
        "MLFLOW_EXPERIMENT_NAME": "mine",
    }
    tracking = Tracking.of_environment(variables, default_uri="sqlite:///unused.db")
    assert tracking == Tracking("http://runs", adopted_run="abc", experiment_name="mine")
    assert (tracking.runs, tracking.registry) == ("http://runs", "http://runs")


def test_registry_may_be_elsewhere_or_alone() -> None:
    assert Tracking("http://runs", "http://registry").registry == "http://registry"
    assert Tracking(registry_uri="http://registry").registry == "http://registry"


def test_default_stands_in_for_a_place_that_is_not_set() -> None:
    assert Tracking.of_environment({}, default_uri="sqlite:///x.db") == Tracking("sqlite:///x.db")
    assert Tracking.of_environment({}) == NOWHERE


def test_nowhere_is_an_error_only_for_who_needs_a_place() -> None:
    for ask in (lambda: NOWHERE.runs, lambda: NOWHERE.registry):
        with pytest.raises(UserError, match="MLFLOW_TRACKING_URI is not set"):
            ask()


def test_only_what_starts_a_step_or_a_command_asks_the_environment() -> None:
    package = Path(finemill.__file__).parent
    folders = (package, package / "components", package / "kernels", package / "pipelines")
    asking = {
        path.relative_to(package).as_posix()
        for folder in folders
        for path in folder.rglob("*.py")
        if "of_environment(" in path.read_text()
    }
    assert {name for name in asking if not name.startswith(("commands/", "asking/"))} == {
        "runtime/kfp_task.py",
        "tracking/settings.py",
    }
