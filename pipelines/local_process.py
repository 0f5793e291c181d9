"""`python -m finemill.pipelines.local_process REQUEST`: one pipeline run under kfp's local runner, in its own process.

kfp writes its log to standard output and changes the process's logging; the caller keeps both in a file and reads the
steps' events instead.
"""

import json
import sys
import warnings
from dataclasses import replace
from pathlib import Path

from kfp import local

from finemill.pipelines.catalog import get_pipeline
from finemill.pipelines.cluster import ClusterConfig
from finemill.pipelines.graph import Pipeline
from finemill.pipelines.render_kfp import build_kfp_pipeline


def main(request_file: str) -> int:
    """Run the pipeline a JSON file asks for: `pipeline`, `parameters`, `root` (kfp's scratch folder)."""
    # "non-Python base image": the steps run in this interpreter, the image only names where they would run.
    warnings.filterwarnings("ignore", message="You may be attemping to run a task", category=RuntimeWarning)
    request = json.loads(Path(request_file).read_text())
    local.init(local.SubprocessRunner(use_venv=False), pipeline_root=request["root"], raise_on_error=True)
    pipeline = for_this_machine(get_pipeline(request["pipeline"]))
    known = {item.name for item in pipeline.parameters}
    arguments = {name: value for name, value in request["parameters"].items() if name in known}
    build_kfp_pipeline(pipeline, {}, ClusterConfig())(**arguments)
    return 0


def for_this_machine(pipeline: Pipeline) -> Pipeline:
    """The pipeline without what only a cluster needs: retries (there is no node to lose, a failed step would only fail
    again) and the preflight step (the caller has checked configuration and store).
    """
    tasks = [replace(task, retries=0, after=()) for task in pipeline.tasks if task.name != "preflight"]
    return replace(pipeline, tasks=tuple(tasks))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
