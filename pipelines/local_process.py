"""`python -m finemill.pipelines.local_process REQUEST`: one pipeline run under kfp's local runner, in its own process.

kfp writes its log to standard output and changes the process's logging; the caller keeps both in a file and reads the
steps' events instead.
"""

import json
import sys
import warnings
from pathlib import Path

from kfp import local

from finemill.pipelines.catalog import get_pipeline
from finemill.pipelines.cluster import ClusterConfig
from finemill.pipelines.local import for_this_machine
from finemill.pipelines.render_kfp import build_kfp_pipeline


def main(request_file: str) -> int:
    """Run the pipeline a JSON file asks for: `pipeline`, `parameters`, `root` (kfp's scratch folder)."""
    # "non-Python base image": the steps run in this interpreter, the image only names where they would run.
    warnings.filterwarnings("ignore", message="You may be attemping to run a task", category=RuntimeWarning)
    request = json.loads(Path(request_file).read_text())
    local.init(local.SubprocessRunner(use_venv=False), pipeline_root=request["root"], raise_on_error=True)
    pipeline = for_this_machine(get_pipeline(request["pipeline"]))
    build_kfp_pipeline(pipeline, {}, ClusterConfig())(**request["parameters"])
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
