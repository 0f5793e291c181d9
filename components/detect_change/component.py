"""The KFP component `detect-change`; `make components` writes it from the catalogue and ports.yaml."""

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
        dataset: reference of the output of chat-format.
        change: gets the reference, <uri>@sha256:<digest>, of change.json with the digests of this dataset and of the
            newest registered version's.
        manifest: gets the output's manifest: files, digests, parents, resolved configuration.
        metrics: gets the step's metrics.
        config: fields as in `finemill schema detect-change`; the rest keep their defaults.
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
