"""What steps that run at this moment, on any machine, were given: nobody may delete it under them."""

from finemill.artifacts.manifest import DIGEST_MARK, Reference
from finemill.tracking.describe import INPUT_TAG
from finemill.tracking.server import open_client, readable_errors

_PAGE = 1000


def inputs_of_running_steps(uri: str) -> list[Reference]:
    """The artifacts that runs of MLflow at `uri` have as inputs and that have not ended."""
    client = open_client(uri)
    with readable_errors(uri):
        experiments = [item.experiment_id for item in client.search_experiments()]
        found, token = [], None
        while True:
            page = client.search_runs(experiments, "attributes.status = 'RUNNING'", max_results=_PAGE, page_token=token)
            found += list(page)
            token = page.token
            if not token:
                break
    tags = [tag for run in found for tag in run.data.tags.items()]
    return [Reference.parse(value) for key, value in tags if key.startswith(INPUT_TAG) and DIGEST_MARK in value]
