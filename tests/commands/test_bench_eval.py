import json

import pytest

from finemill.cli import main
from finemill.errors import UserError


@pytest.mark.parametrize("options", [[], ["--mixed"]])
def test_both_ways_write_what_the_rows_ask_for(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--rows", "8", "--prompt-tokens", "6", "--new-tokens", "8", "--batch-size", "4", "--plain-batch-size", "4"]
    assert main(["bench", "eval", "--shape", "qwen3-tiny", *sizes, *options, "--json"]) == 0
    plain, one_pass = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert plain["tokens"] == (8 + 7 if options else 64)
    assert one_pass["tokens"] == 2 * plain["tokens"]


def test_no_rows_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match=str(UserError.exit_code)):
        main(["bench", "eval", "--rows", "0"])
    assert "from 1 on" in capsys.readouterr().err
