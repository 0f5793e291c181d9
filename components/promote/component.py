"""The KFP component `promote`; `make components` writes it from the catalogue and ports.yaml."""

from kfp import dsl

from finemill.runtime.images import IMAGES


@dsl.component(base_image=IMAGES["cpu"], install_kfp_package=False)
def promote(
    store: str,
    version: str,
    evaluation: str,
    decision: dsl.OutputPath(str),
    manifest: dsl.Output[dsl.Artifact],
    metrics: dsl.Output[dsl.Metrics],
    config: dict = {},
    run_id: str = "",
) -> bool:
    """Compare the new version with the champion and move the alias if it wins.

    Args:
        store: folder or s3://bucket/prefix that gets the output.
        version: reference of the output of register.
        evaluation: reference of the output of eval that the version was registered with.
        decision: gets the reference, <uri>@sha256:<digest>, of decision.json and decision.md with every gate, its
            numbers, and whether the version is champion now.
        manifest: gets the output's manifest: files, digests, parents, resolved configuration.
        metrics: gets the step's metrics.
        config: fields as in `finemill schema promote`; the rest keep their defaults.
        run_id: groups the steps of one pipeline run in MLflow.
    Returns: whether the version became the champion.
    """
    from finemill.runtime.kfp_task import run_kfp_task

    return run_kfp_task(
        "promote",
        store=store,
        inputs={"version": version, "evaluation": evaluation},
        config=config,
        run_id=run_id,
        reference_path=decision,
        manifest=manifest,
        metrics=metrics,
    )
