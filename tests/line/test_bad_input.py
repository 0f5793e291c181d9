"""Bad input ends the line in one line, before anything is computed."""

from pathlib import Path

import pytest

from tests.line.commands import finemill

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data-prep.sources", "[{uri: nowhere.jsonl}]"], "nowhere.jsonl"),
        (["--base-model", "/nowhere/model"], "/nowhere/model"),
        (["--train-qlora.lora-r", "0"], "lora_r"),
        (["--config", "nowhere.yaml"], "nowhere.yaml"),
        (["--store", "/proc/finemill"], "cannot be written"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments: list[str], message: str, tmp_path: Path) -> None:
    store = [] if "--store" in arguments else ["--store", "store"]
    result = finemill("run", "finetune", *store, *arguments, cwd=tmp_path, FINEMILL_CACHE=str(tmp_path / "cache"))
    assert result.returncode == 2, result.stderr
    last = result.stderr.splitlines()[-1]
    assert last.startswith("finemill run: ")
    assert message in last
    assert "Traceback" not in result.stderr
    assert not list(tmp_path.glob("store/*/*/manifest.json"))
