import subprocess
import sys

import pytest

from finemill.cli import main
from finemill.runtime.catalog import STEPS


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    text = capsys.readouterr().out
    assert ended.value.code == 0
    for command in ("run", "compile", "schema", "rollback", *STEPS):
        assert f"\n  {command} " in text


def test_unknown_command_is_an_error_that_lists_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["trian"])
    assert ended.value.code == 2
    assert "unknown command 'trian'; the commands are run, " in capsys.readouterr().err


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
