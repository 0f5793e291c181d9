import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from finemill.cli import main
from finemill.runtime.catalog import STEPS


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    text = capsys.readouterr().out
    assert ended.value.code == 0
    for command in ("run", "compile", "schema", "rollback", *STEPS):
        assert f"\n  {command} " in text


@pytest.mark.parametrize("arguments", [["trian"], ["trian", "--help"], ["trian", "-h"], ["trian", "--version"], [""]])
def test_unknown_command_is_an_error_that_lists_the_commands(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    shown = capsys.readouterr()
    assert ended.value.code == 2
    assert f"unknown command '{arguments[0]}'; the commands are run, " in shown.err
    assert shown.out == ""


def test_options_before_the_command_are_said_to_belong_behind_it(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--config", "my.yaml", "run", "finetune"])
    assert ended.value.code == 2
    assert "the command comes before its options: finemill run --config ..." in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["schema", "trian", "--help"], ["run", "trian", "--help"]])
def test_unknown_argument_is_an_error_with_help_asked_for_too(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        exit_code = main(arguments)
    except SystemExit as ended:
        exit_code = int(str(ended.code))
    shown = capsys.readouterr()
    assert exit_code == 2
    assert "'trian'" in shown.err
    assert "finetune" in shown.err
    assert shown.out == ""


@pytest.mark.parametrize("name", ["run", "schema", "merge", "gc"])
def test_only_a_run_is_said_to_go_on_after_an_interruption(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(name: str, arguments: list[str]) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr("finemill.cli._command", lambda name: interrupted)
    assert main([name]) == 130
    said = capsys.readouterr().err
    assert said.startswith(f"finemill {name}: interrupted")
    assert ("the same command goes on from the last finished step" in said) == (name == "run")


def test_help_imports_no_configuration() -> None:
    script = (
        "import sys\n"
        "from finemill.cli import main\n"
        "try:\n"
        "    main(['--help'])\n"
        "except SystemExit:\n"
        "    print({name for name in sys.modules if name.startswith(('pydantic', 'finemill'))}, file=sys.stderr)\n"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    loaded = ast.literal_eval(result.stderr)
    assert not {name for name in loaded if "pydantic" in name or "config" in name or "components" in name}


def test_help_and_config_checks_import_nothing_heavy() -> None:
    script = (
        "import sys\n"
        "from finemill.cli import main\n"
        "calls = ['--help', 'merge --help', 'run finetune --dry-run', 'schema finetune']\n"
        "for arguments in map(str.split, calls):\n"
        "    try:\n"
        "        main(arguments)\n"
        "    except SystemExit:\n"
        "        pass\n"
        "heavy = {'torch', 'transformers', 'kfp', 'mlflow', 'peft', 'trl', 'boto3', 'datasets'} & set(sys.modules)\n"
        "print(heavy, file=sys.stderr)\n"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stderr.splitlines()[-1] == "set()"


def test_a_reader_that_has_seen_enough_is_no_error() -> None:
    command = [sys.executable, "-m", "finemill", "schema", "finetune"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 141


@pytest.mark.parametrize("arguments", ["--help", "merge --help", "schema merge"])
def test_a_full_disk_behind_the_output_is_one_line(arguments: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    command = f'"{sys.executable}" -m finemill {arguments} > /dev/full'
    ended = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)
    assert (ended.returncode, len(ended.stderr.splitlines())) == (2, 1)
    assert "No space left on device" in ended.stderr


@pytest.mark.parametrize(
    ("arguments", "exit_code"),
    [
        ("merge", 2),
        ("merge --adapter x@sha256:0 --base-model builtin:tiny-qwen3", 2),
        ("""data-prep --sources '[{uri: "example:reasoning", max_rows: 60}]'""", 0),
    ],
)
def test_work_is_done_and_exit_codes_stay_where_nothing_can_be_said(
    arguments: str, exit_code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    command = f'"{sys.executable}" -m finemill {arguments} --store {tmp_path} 2> /dev/full'
    assert subprocess.run(command, shell=True, check=False, cwd=tmp_path).returncode == exit_code


@pytest.mark.parametrize("encoding", ["ascii", "iso8859-1"])
def test_output_is_utf_8_whatever_the_locale(encoding: str) -> None:
    command = [sys.executable, "-m", "finemill", "chat-format", "--rows", "r", "--base-model", "b", "--dry-run"]
    variables = {**os.environ, "PYTHONIOENCODING": encoding}
    shown = subprocess.run([*command, "--system-prompt", "Grüße, 日本"], env=variables, capture_output=True, check=True)
    assert "Grüße, 日本".encode() in shown.stdout


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-"])
def test_a_closed_output_is_no_fault(closed: str) -> None:
    command = f'"{sys.executable}" -m finemill schema merge {closed}'
    assert subprocess.run(command, shell=True, capture_output=True, check=False).returncode == 0


def test_options_may_stand_before_the_pipeline(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "finetune"
    config.write_text("data_prep: {sources: [{uri: 'example:chat'}]}")
    assert main(["run", "--base-model", "hf://o/m@r", "finetune", "--dry-run", "--config", str(config)]) == 0
    assert json.loads(capsys.readouterr().out)["base_model"] == "hf://o/m@r"
    assert main(["run", "--register.registered-model-name", "align", "finetune", "--dry-run"]) == 2
    assert "name it before the options" in capsys.readouterr().err


def test_an_empty_store_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    sources = "[{uri: 'example:chat'}]"
    assert main(["data-prep", "--sources", sources, "--store", ""]) == 2
    assert "the store's address is empty" in capsys.readouterr().err


@pytest.mark.parametrize("options", [["--schedule", "99 99 * * *"], ["--schedule", ""], ["--store", "folder"]])
def test_a_pipeline_that_could_never_run_is_not_compiled(options: list[str], tmp_path: Path) -> None:
    file = tmp_path / "x.yaml"
    assert main(["compile", "retrain", "--engine", "argo", "-o", str(file), *options]) == 2
    assert not file.exists()


@pytest.mark.usefixtures("quick_kfp")
@pytest.mark.parametrize("engine", ["kfp", "argo"])
def test_a_dash_is_standard_output(
    engine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["compile", "export", "--engine", engine, "-o", "-"]) == 0
    assert next(iter(yaml.safe_load_all(capsys.readouterr().out)))
    assert not list(tmp_path.iterdir())


def test_the_hub_is_told_nothing_unless_somebody_asks_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_DISABLE_TELEMETRY", raising=False)
    assert main(["schema", "merge"]) == 0
    assert os.environ["HF_HUB_DISABLE_TELEMETRY"] == "1"


@pytest.mark.parametrize(
    "arguments",
    [
        ["run", "finetune", "--nope", "1"],
        ["compile", "finetune", "--engine", "nope"],
        ["chat-format"],
        ["bench", "data", "--rows", "0"],
    ],
)
def test_a_wrong_option_is_one_line_without_the_usage(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("finemill ")
    assert line.endswith(" --help` lists the options")
