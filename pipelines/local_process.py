"""`python -m finemill.pipelines.local_process REQUEST`: one pipeline run under kfp's local runner, in its own process.

kfp writes its log to standard output and changes the process's logging; the caller keeps both in a file and reads the
steps' events instead.
"""

import json
import os
import shutil
import signal
import sys
import threading
import time
import warnings
from pathlib import Path

from kfp import local

from finemill.pipelines.catalog import get_pipeline
from finemill.pipelines.cluster import ClusterConfig
from finemill.pipelines.local import STOP_TIMEOUT_S, for_this_machine
from finemill.pipelines.render_kfp import build_kfp_pipeline


def end_with(parent: int, scratch: Path, timeout_s: float = STOP_TIMEOUT_S) -> None:
    """Have this process's group end when `parent`, a process id, is gone: told first, killed after `timeout_s`.

    A caller that is killed tells nobody, its steps would compute on beside those of the next call, and its folder
    `scratch` would stay.
    """

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.2)
        # Outside of the group, it sees the group's end.
        if os.fork() == 0:
            os.setsid()
            _end_group(group, timeout_s)
            shutil.rmtree(scratch, ignore_errors=True)
            os._exit(0)

    group = os.getpgrp()
    threading.Thread(target=watch, daemon=True).start()


def _end_group(group: int, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    try:
        os.killpg(group, signal.SIGTERM)
        while time.monotonic() < deadline:
            os.killpg(group, 0)
            time.sleep(0.1)
        os.killpg(group, signal.SIGKILL)
    except ProcessLookupError:
        return


def main(request_file: str) -> int:
    """Run the pipeline a JSON file asks for.

    Its keys are `pipeline`, `parameters`, `root` (kfp's scratch folder) and `caller` (a process id).
    """
    # "non-Python base image": the steps run in this interpreter, the image only names where they would run.
    warnings.filterwarnings("ignore", message="You may be attemping to run a task", category=RuntimeWarning)
    request = json.loads(Path(request_file).read_text())
    end_with(request["caller"], Path(request_file).parent)
    local.init(local.SubprocessRunner(use_venv=False), pipeline_root=request["root"], raise_on_error=True)
    pipeline = for_this_machine(get_pipeline(request["pipeline"]))
    build_kfp_pipeline(pipeline, {}, ClusterConfig())(**request["parameters"])
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
