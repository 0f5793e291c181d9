import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from finemill.runtime.catalog import STEPS
from finemill.runtime.code_version import code_digest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    # Built through an sdist, as a release is, so that what the sdist lacks is missed here too.
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True)
    return next(folder.glob("*.whl"))


def test_wheel_has_one_top_level_name_and_every_file(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"finemill"}
    tracked = subprocess.run(
        ["git", "ls-files", "components", "pipelines", "kernels", "src/finemill"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    links = {"src/finemill/components", "src/finemill/pipelines", "src/finemill/kernels"}
    expected = {
        f"finemill/{name.removeprefix('src/finemill/')}"
        for name in tracked
        if name not in links and (ROOT / name).exists()
    }
    assert expected - names == set()


def test_wheel_finds_the_outputs_that_the_checkout_made(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path)
    for step in STEPS.values():
        assert code_digest(step, tmp_path / "finemill") == code_digest(step), step.name


def test_constraints_pin_one_version_each_and_name_no_index() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    assert all("==" in line and "://" not in line and not line.startswith("-") for line in lines)


def test_extras_all_holds_every_extra_a_user_needs() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    (everything,) = extras["all"]
    named = set(everything.removeprefix("finemill[").removesuffix("]").split(","))
    assert named == set(extras) - {"all", "dev", "deepspeed", "gptq", "lm-eval", "long", "report"}


def test_no_folder_of_the_checkout_shadows_an_installed_package() -> None:
    """`kernels` is also Hugging Face's package: a marker file here would hide it from scripts run at the root."""
    assert not [name for name in ("components", "kernels", "pipelines") if (ROOT / name / "__init__.py").exists()]
