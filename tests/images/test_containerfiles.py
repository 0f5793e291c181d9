import re
import subprocess
from pathlib import Path

import pytest

from finemill.runtime.images import IMAGES

ROOT = Path(__file__).parents[2]
every_role = pytest.mark.parametrize("role", list(IMAGES))


def stages(role: str) -> list[str]:
    text = (ROOT / "images" / role / "Containerfile").read_text().replace("\\\n", " ")
    return re.split(r"^(?=FROM )", text, flags=re.M)[1:]


@every_role
def test_the_last_stage_has_a_numeric_user_in_group_0_and_installs_nothing(role: str) -> None:
    last = stages(role)[-1]
    assert "\nUSER 65532:0\n" in last
    assert not re.search(r"^RUN ", last, flags=re.M)
    assert not re.search(r"\b(pip|apt-get|curl|wget)\b", last)


@every_role
def test_every_stage_stands_on_the_base_that_is_given(role: str) -> None:
    assert all(stage.startswith(("FROM ${BASE}", "FROM deps")) for stage in stages(role))


@every_role
def test_what_is_written_lies_under_tmp(role: str) -> None:
    variables = dict(re.findall(r"(\w+)=(\S+)", stages(role)[-1]))
    written = ["HOME", "FINEMILL_CACHE", "HF_HOME"]
    written += ["TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR"] if role == "train" else []
    assert all(variables[name].startswith("/tmp") for name in written)


@every_role
def test_labels_and_variables_tell_where_an_image_comes_from(role: str) -> None:
    last = stages(role)[-1]
    for label in ("title", "description", "licenses", "version", "revision"):
        assert f"org.opencontainers.image.{label}=" in last
    assert "FINEMILL_GIT_SHA=${GIT_SHA}" in last
    assert "FINEMILL_IMAGE=${IMAGE}" in last
    assert "sbom.cdx.json" in stages(role)[1]


@every_role
def test_dependencies_are_locked(role: str) -> None:
    installs = re.findall(r"pip (?:--python \S+ )?install (.*?)(?:&&|$)", stages(role)[0])
    for install in installs:
        assert "-c constraints.txt" in install or "cyclonedx-bom==" in install
    names = {name for install in installs for name in install.split() if re.fullmatch(r"[a-z][a-z0-9-]+", name)}
    pinned = {line.split("==")[0] for line in (ROOT / "constraints.txt").read_text().splitlines()}
    assert names <= pinned


def test_only_what_the_wheel_is_made_of_reaches_a_build() -> None:
    lines = (ROOT / ".containerignore").read_text().splitlines()
    assert "*" in lines
    allowed = {line[1:] for line in lines if line.startswith("!")}
    assert all((ROOT / name).exists() for name in allowed)
    assert not allowed & {".git", "tests", ".venv"}


def test_the_stand_in_for_a_compiler_hands_out_triton_s_driver_and_nothing_else(tmp_path: Path) -> None:
    """Triton calls `cc .../triton/backends/nvidia/driver.c -O3 ... -o FOLDER/cuda_utils.SUFFIX.so ...`."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "lib" / "finemill").mkdir(parents=True)
    (tmp_path / "lib" / "finemill" / "triton_driver.so").write_text("compiled")
    compiler = tmp_path / "bin" / "finemill-cc"
    compiler.write_text((ROOT / "images" / "train" / "cc").read_text())
    output = tmp_path / "cuda_utils.cpython-311-x86_64-linux-gnu.so"
    source = "/opt/lib/triton/backends/nvidia/driver.c"
    command = ["sh", str(compiler), source, "-O3", "-shared", "-o", str(output), "-lcuda"]
    subprocess.run(command, check=True)
    assert output.read_text() == "compiled"
    refused = subprocess.run(["sh", str(compiler), "other.c", "-o", "other.so"], capture_output=True, text=True)
    assert refused.returncode == 1
    assert "no compiler" in refused.stderr
