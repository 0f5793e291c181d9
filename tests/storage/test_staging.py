import signal
import subprocess
import sys
from pathlib import Path

import pytest

from finemill.storage.staging import new_staging_folder

OTHER = "import sys, time; from finemill.storage.staging import new_staging_folder as new; "
OTHER += "print(new('merge-'), flush=True); time.sleep(60)"


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
