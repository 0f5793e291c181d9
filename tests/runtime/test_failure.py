import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from botocore.exceptions import ProfileNotFound

from finemill.cli import main
from finemill.errors import GateFailedError, StepError, TemporaryError, UserError
from finemill.runtime.failure import describe, explain, explained, report
from finemill.storage import s3

OUT_OF_MEMORY = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.11 GiB. Of it, much"


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (
            OSError(28, "No space left on device", "/s/x"),
            UserError,
            r"No space left on device \(/s/x\): .*FINEMILL_CACHE",
        ),
        (PermissionError(13, "Permission denied", "/s/x"), UserError, r"Permission denied \(/s/x\): .*--store"),
        (OSError(30, "Read-only file system"), UserError, r"Read-only file system: "),
        (FileNotFoundError(2, "No such file or directory", "/m/x"), UserError, r"No such file or directory \(/m/x\)$"),
        (IsADirectoryError(21, "Is a directory", "/m"), UserError, r"Is a directory \(/m\)$"),
        (OSError("/m does not appear to have a file\nnamed x"), UserError, "does not appear to have a file named x$"),
        (ConnectionResetError(104, "Connection reset by peer"), TemporaryError, "Connection reset by peer: try again"),
        (OSError(116, "Stale file handle"), TemporaryError, "Stale file handle"),
        (torch.OutOfMemoryError(OUT_OF_MEMORY), UserError, r"GPU's memory is not enough \(CUDA .*79\.11 GiB\): lower"),
        (RuntimeError("CUDA error: out of memory"), UserError, "the GPU's memory is not enough"),
        (ProfileNotFound(profile="no"), UserError, r"profile \(no\) could not be found: correct the AWS"),
        (UnicodeError("encoding with 'idna' codec failed"), UserError, "an address names no host"),
        (MemoryError(), UserError, "this machine's memory is not enough"),
        (RuntimeError("Could not determine home directory."), UserError, "there is no home folder: set HOME"),
        (ModuleNotFoundError("No module named 'kfp'", name="kfp"), UserError, r"pip install 'finemill\[pipelines\]'$"),
        (ModuleNotFoundError("no", name="psycopg"), UserError, r"pip install 'psycopg'$"),
        (ModuleNotFoundError("no", name="pydantic.x"), UserError, r"pip install 'finemill'$"),
        (ModuleNotFoundError("no", name="rouge_score.x"), UserError, r"pip install 'finemill\[eval\]'$"),
        (ModuleNotFoundError("no", name="kubernetes.client"), UserError, r"pip install 'finemill\[pipelines\]'$"),
        (ImportError("AutoModel requires the\nPyTorch library"), UserError, r"PyTorch library: .*'finemill\[all\]'$"),
    ],
)
def test_what_a_user_or_the_machine_caused_is_one_line(error: Exception, kind: type[StepError], message: str) -> None:
    known = explain(error)
    assert type(known) is kind
    assert re.search(message, str(known))
    assert "\n" not in str(known)


@pytest.mark.parametrize("module", ["secrets", "tokenizers"])
def test_a_file_in_the_place_of_a_module_is_named(module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    error = ImportError(f"cannot import name 'x' from '{module}'", name=module, path=str(tmp_path / f"{module}.py"))
    assert str(explain(error)).endswith("in the place of the module: rename it, or start in another folder")


@pytest.mark.parametrize(
    ("variables", "config"),
    [
        ({"AWS_ENDPOINT_URL": "host:9000"}, ""),
        ({"AWS_ENDPOINT_URL": "http://[::1"}, ""),
        ({"AWS_CONTAINER_CREDENTIALS_FULL_URI": "http://elsewhere.example/x"}, ""),
        ({}, "[default]\ns3 = x\n"),
    ],
)
def test_settings_that_the_s3_client_cannot_read_are_the_user_s(
    variables: dict[str, str], config: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config").write_text(config)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"AWS_CONFIG_FILE": str(tmp_path / "config"), **variables}.items():
        monkeypatch.setenv(name, value)
    s3._client.cache_clear()
    with pytest.raises(UserError, match=r"correct the AWS_\* variables or the profile"), explained():
        s3.s3_client().list_buckets()
    s3._client.cache_clear()


@pytest.mark.parametrize(
    "error",
    [KeyError("x"), ValueError("x"), ModuleNotFoundError("no", name="finemill.components.gone"), AssertionError()],
)
def test_a_fault_of_our_own_stays_what_it_is(error: Exception) -> None:
    assert explain(error) is None
    with pytest.raises(type(error)), explained():
        raise error


def test_a_broken_weights_file_is_one_line(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    (tmp_path / "model.safetensors").write_bytes(b"cut")
    with pytest.raises(UserError, match="a safetensors file cannot be read"), explained():
        load_file(tmp_path / "model.safetensors")


@pytest.mark.parametrize("text", ["merge: no base", "finemill merge: no base", "no\nbase"])
def test_a_command_is_named_once(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert report("merge", GateFailedError(text)) == 3
    assert capsys.readouterr().err == "finemill merge: no base\n"


def test_credentials_in_a_foreign_message_are_left_out() -> None:
    assert "secret" not in describe("gc", ValueError("https://me:secret@host/x"))[0]


def crash(*_: object) -> int:
    raise KeyError("no such thing")


def logged(line: str) -> str:
    found = re.search(r"the traceback is in (\S+\.log): please report it", line)
    assert found, line
    return Path(found[1]).read_text()


def test_a_fault_of_our_own_is_one_line_with_the_file_of_its_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    monkeypatch.setattr("finemill.commands.gc.execute", crash)
    assert main(["gc"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("finemill gc: a fault in finemill itself, KeyError: 'no such thing'; ")
    assert "Traceback" in logged(line)
    assert "in crash" in logged(line)


@pytest.mark.parametrize("variable", ["KUBERNETES_SERVICE_HOST", "FINEMILL_EVENTS"])
def test_where_a_log_is_kept_it_has_the_traceback(
    variable: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(variable, "/dev/null")
    monkeypatch.setattr("finemill.commands.gc.execute", crash)
    assert main(["gc"]) == 1
    *before, line = capsys.readouterr().err.splitlines()
    assert before[0] == "Traceback (most recent call last):"
    assert line.endswith("the traceback is in the lines above: please report it")


def test_a_full_disk_still_shows_the_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("finemill.runtime.failure.tempfile.NamedTemporaryFile", full)
    assert report("gc", KeyError("x")) == 1
    text = capsys.readouterr().err
    assert "KeyError: 'x'" in text.splitlines()[0]
    assert "the traceback is in the lines above" in text


@pytest.mark.parametrize(
    ("arguments", "extra"),
    [
        (["compile", "finetune", "--engine", "kfp", "-o", "x.yaml"], "pipelines"),
        (["compile", "finetune", "--engine", "argo", "-o", "x.yaml"], "pipelines"),
        (["run", "finetune"], "tracking"),
        (["bench", "step", "--shape", "qwen3-8b"], "train"),
    ],
)
def test_without_the_extras_a_command_names_the_one_it_needs(arguments: list[str], extra: str, tmp_path: Path) -> None:
    """Modules of the extras look as if they were not installed."""
    script = (
        "import sys\n"
        "for name in ('kfp', 'hera', 'mlflow', 'torch', 'transformers', 'trl', 'peft', 'triton', 'tokenizers'):\n"
        "    sys.modules[name] = None\n"
        "from finemill.cli import main\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    done = subprocess.run([sys.executable, "-c", script, *arguments], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].endswith(f"pip install 'finemill[{extra}]'")
    assert "Traceback" not in done.stderr
