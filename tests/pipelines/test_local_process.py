import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

# A caller, which is killed; the process that it starts in a session of its own; a step of that one.
STEP = """
import signal, sys, time
def stop(*_):
    open(sys.argv[1] + "/told", "w").close()
    if sys.argv[2] == "obeys":
        sys.exit(0)
signal.signal(signal.SIGTERM, stop)
open(sys.argv[1] + "/step", "w").close()
while True:
    time.sleep(0.05)
"""
RUN = """
import subprocess, sys
from pathlib import Path
from finemill.pipelines.local_process import end_with
scratch = Path(sys.argv[1], "scratch")
scratch.mkdir()
end_with(int(sys.argv[3]), scratch, timeout_s=1.0)
subprocess.run([sys.executable, "-c", sys.argv[4], *sys.argv[1:3]])
"""
CALLER = """
import os, subprocess, sys, time
run = [sys.executable, "-c", sys.argv[3], *sys.argv[1:3], str(os.getpid()), sys.argv[4]]
child = subprocess.Popen(run, start_new_session=True)
with open(sys.argv[1] + "/group", "w") as file:
    file.write(str(child.pid))
time.sleep(60)
"""


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 30
    while not path.exists():
        assert time.monotonic() < deadline, path
        time.sleep(0.02)


def is_alive(group: int) -> bool:
    """Whether the group has a process that is not a zombie."""
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = status.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[2]) == group and fields[0] != "Z":
            return True
    return False


@pytest.mark.parametrize("step", ["obeys", "ignores"])
def test_steps_end_when_their_caller_is_killed(step: str, tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", CALLER, str(tmp_path), step, RUN, STEP]) as caller:
        wait_for(tmp_path / "step")
        os.kill(caller.pid, signal.SIGKILL)
    group = int((tmp_path / "group").read_text())
    deadline = time.monotonic() + 30
    while is_alive(group):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert (tmp_path / "told").exists()
    while (tmp_path / "scratch").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
