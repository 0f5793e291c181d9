import signal
import subprocess
import sys
from pathlib import Path

import pytest

from finemill.storage.staging import new_staging_folder

OTHER = "import sys, time; from finemill.storage.staging import new_staging_folder as new; "
OTHER += "print(new('merge-'), flush=True); time.sleep(60)"
TEMPORARY = """
import sys, tempfile, time
from finemill.storage.staging import lasting_temporary_folder, use_own_temporary_folder
use_own_temporary_folder()
with tempfile.NamedTemporaryFile(delete=False) as file:
    print(file.name, lasting_temporary_folder(), flush=True)
sys.argv[1:] or time.sleep(60)
"""


def test_folders_of_the_killed_are_swept_and_those_of_the_living_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FINEMILL_CACHE", str(tmp_path))
    own = new_staging_folder("own-")
    with subprocess.Popen([sys.executable, "-c", OTHER], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        theirs = Path(other.stdout.readline().strip())
        new_staging_folder("own-")
        assert theirs.is_dir()
        other.send_signal(signal.SIGKILL)
        other.wait()
        new_staging_folder("own-")
    assert not theirs.exists()
    assert own.is_dir()


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGINT])
def test_a_step_s_temporary_files_go_with_it(
    end: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    command = [sys.executable, "-c", TEMPORARY]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as step:
        assert step.stdout is not None
        theirs, lasting = map(Path, step.stdout.readline().split())
        assert theirs.parent != lasting == tmp_path
        step.send_signal(end)
    assert subprocess.run([*command, "again"], check=True, stdout=subprocess.PIPE).returncode == 0
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and not path.name.endswith(".lock")]
