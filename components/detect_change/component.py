"""The KFP component `detect-change`."""

from kfp import dsl

from finemill.runtime.images import IMAGES


@dsl.component(base_image=IMAGES["cpu"], install_kfp_package=False)
def detect_change(
    store: str,
    dataset: str,
    change: dsl.OutputPath(str),
    manifest: dsl.Output[dsl.Artifact],
    metrics: dsl.Output[dsl.Metrics],
    config: dict = {},
    run_id: str = "",
) -> bool:
    """Tell whether the dataset differs from the one behind the newest registered version.

    Args:
        store: folder or s3://bucket/prefix that gets the output.
        dataset: reference of the tokenized dataset.
        change: gets the reference of the comparison, <uri>@sha256:<digest>.
        manifest: gets the output's manifest: files, digests, parents, resolved configuration.
        metrics: gets the step's metrics.
        config: fields as in `finemill schema register`: which registered model to compare with.
        run_id: groups the steps of one pipeline run in MLflow.
    Returns: whether there is something new to train on.
    """
    from finemill.runtime.kfp_task import run_kfp_task

    return run_kfp_task(
        "detect-change",
        store=store,
        inputs={"dataset": dataset},
        config=config,
        run_id=run_id,
        reference_path=change,
        manifest=manifest,
        metrics=metrics,
    )
