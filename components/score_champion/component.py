"""The KFP component `score-champion`; `make components` writes it from the catalogue and ports.yaml."""

from kfp import dsl

from finemill.runtime.images import IMAGES


@dsl.component(base_image=IMAGES["train"], install_kfp_package=False)
def score_champion(
    store: str,
    evaluation: str,
    champion: dsl.OutputPath(str),
    manifest: dsl.Output[dsl.Artifact],
    metrics: dsl.Output[dsl.Metrics],
    config: dict = {},
    run_id: str = "",
):
    """Score the champion on the rows that the new version was scored on, unless it was before.

    Args:
        store: folder or s3://bucket/prefix that gets the output.
        evaluation: reference of the output of eval for the new version.
        champion: gets the reference, <uri>@sha256:<digest>, of champion.json with the champion's number and the
            reference of its evaluation on the same rows.
        manifest: gets the output's manifest: files, digests, parents, resolved configuration.
        metrics: gets the step's metrics.
        config: fields as in `finemill schema score-champion`; the rest keep their defaults.
        run_id: groups the steps of one pipeline run in MLflow.
    """
    from finemill.runtime.kfp_task import run_kfp_task

    run_kfp_task(
        "score-champion",
        store=store,
        inputs={"evaluation": evaluation},
        config=config,
        run_id=run_id,
        reference_path=champion,
        manifest=manifest,
        metrics=metrics,
    )
