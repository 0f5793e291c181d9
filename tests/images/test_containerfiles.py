import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from finemill.runtime.images import IMAGES

ROOT = Path(__file__).parents[2]
every_role = pytest.mark.parametrize("role", list(IMAGES))


def stages(role: str) -> dict[str, str]:
    """The stages by name, in order; the one that ships is `last`."""
    text = (ROOT / "images" / role / "Containerfile").read_text().replace("\\\n", " ")
    found = re.findall(r"^FROM \S+(?: AS (\w+))?\n((?:(?!FROM ).*\n)*)", text, flags=re.M)
    return {name or "last": body for name, body in found}


@every_role
def test_the_last_stage_has_a_numeric_user_in_group_0_and_installs_nothing(role: str) -> None:
    last = stages(role)["last"]
    assert "\nUSER 65532:0\n" in last
    assert not re.search(r"^RUN ", last, flags=re.M)
    assert not re.search(r"\b(pip|apt-get|curl|wget)\b", last)


@every_role
def test_every_stage_stands_on_the_base_that_is_given_less_its_setuid_programs(role: str) -> None:
    text = (ROOT / "images" / role / "Containerfile").read_text()
    assert re.findall(r"^FROM (\S+)", text, flags=re.M) == ["${BASE}", "base", "deps", "base"]
    assert "\nARG BASE\n" in text
    assert "find / -xdev -type f -perm /6000 -exec chmod a-s {} +" in stages(role)["base"]


@pytest.mark.parametrize("base", ["", "python:3.11-slim-bookworm"])
def test_images_stand_on_a_base_that_is_given_by_digest(base: str, tmp_path: Path) -> None:
    (tmp_path / ".installed").touch()
    # Newer than what an installation is made from.
    os.utime(tmp_path / ".installed", (4e9, 4e9))
    command = ["make", "images", f"BASE={base}", f"VENV={tmp_path}"]
    made = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert made.returncode == 2
    assert "is no image by digest" in made.stdout


@every_role
def test_what_is_written_lies_under_tmp(role: str) -> None:
    variables = dict(re.findall(r"(\w+)=(\S+)", stages(role)["last"]))
    written = ["HOME", "FINEMILL_CACHE", "HF_HOME"]
    written += ["TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR"] if role == "train" else []
    assert all(variables[name].startswith("/tmp") for name in written)


@every_role
def test_labels_and_variables_tell_where_an_image_comes_from(role: str) -> None:
    last = stages(role)["last"]
    for label in ("title", "description", "licenses", "version", "revision", "base.name"):
        assert f"org.opencontainers.image.{label}=" in last
    assert "FINEMILL_GIT_SHA=${GIT_SHA}" in last
    assert "FINEMILL_IMAGE=${IMAGE}" in last
    assert "sbom.cdx.json" in stages(role)["build"]


def pins(file: Path) -> set[tuple[str, str]]:
    """Names and versions in a file of constraints or requirements; some packages have one per Python."""
    return set(re.findall(r"^([\w.-]+)==([^\s;]+)", file.read_text(), flags=re.M))


@every_role
def test_every_dependency_is_installed_by_its_hash(role: str) -> None:
    for install in re.findall(r"pip (?:--python \S+ )?install (.*?)(?:&&|$)", stages(role)["deps"], flags=re.M):
        assert "--require-hashes --no-deps" in install
    for file in (ROOT / "images" / role / "requirements.txt", ROOT / "images" / "tools.txt"):
        blocks = re.split(r"\n(?=\S)", file.read_text().strip())
        assert all("==" in block and "--hash=sha256:" in block for block in blocks)
    assert "PIP_CONSTRAINT=/build/constraints.txt PIP_BUILD_CONSTRAINT=" in stages(role)["deps"]


@every_role
def test_what_an_image_gets_is_what_was_tested(role: str) -> None:
    """`make lock` writes both."""
    installed = pins(ROOT / "images" / role / "requirements.txt")
    assert installed <= pins(ROOT / "constraints.txt")
    asked = (ROOT / "images" / role / "requirements.in").read_text().splitlines()
    assert {name.partition("[")[0] for name in asked} | {"kfp"} <= {name for name, _ in installed}


def test_the_list_of_contents_has_every_package_with_its_hash_the_base_and_compiled_files(tmp_path: Path) -> None:
    (tmp_path / "python.json").write_text('{"bomFormat": "CycloneDX", "components": [{"name": "Typing_Extensions"}]}')
    installed = {"name": "typing-extensions"}, {"archive_info": {"hash": "sha256=" + "12" * 32}}
    report = {"install": [{"metadata": installed[0], "download_info": installed[1]}]}
    (tmp_path / "report.json").write_text(json.dumps(report))
    (tmp_path / "debian").write_text("libc6 2.36-9+deb12u10 amd64\nzlib1g 1:1.2.13 amd64\n")
    driver = tmp_path / "driver.so"
    driver.write_bytes(b"compiled")
    base = "registry.example/python@sha256:" + "ab" * 32
    command = [sys.executable, str(ROOT / "images" / "sbom.py"), str(tmp_path / "python.json")]
    command += ["--reports", str(tmp_path / "report.json"), "--debian", str(tmp_path / "debian")]
    made = json.loads(
        subprocess.run([*command, "--base", base, "--files", str(driver)], check=True, capture_output=True).stdout
    )
    python, image, _, zlib, compiled = made["components"]
    assert (python["name"], python["hashes"][0]["content"]) == ("Typing_Extensions", "12" * 32)
    assert (image["name"], image["version"]) == ("registry.example/python", "sha256:" + "ab" * 32)
    assert zlib["purl"] == "pkg:deb/debian/zlib1g@1%3A1.2.13?arch=amd64"
    assert compiled["hashes"][0]["content"] == hashlib.sha256(b"compiled").hexdigest()


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
