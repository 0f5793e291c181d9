"""The KFP component `data-prep`; `make components` writes it from the catalogue and ports.yaml."""

from kfp import dsl

from finemill.runtime.images import IMAGES


@dsl.component(base_image=IMAGES["cpu"], install_kfp_package=False)
def data_prep(
    store: str,
    rows: dsl.OutputPath(str),
    manifest: dsl.Output[dsl.Artifact],
    metrics: dsl.Output[dsl.Metrics],
    config: dict = {},
    run_id: str = "",
):
    """Read raw rows, clean, deduplicate and split them.

    Args:
        store: folder or s3://bucket/prefix that gets the output.
        rows: gets the reference, <uri>@sha256:<digest>, of train.parquet, validation.parquet and test.parquet (id,
            source, number, shape, row), data.json, report.md, rejected.jsonl.
        manifest: gets the output's manifest: files, digests, parents, resolved configuration.
        metrics: gets the step's metrics.
        config: fields as in `finemill schema data-prep`; the rest keep their defaults.
        run_id: groups the steps of one pipeline run in MLflow.
    """
    from finemill.runtime.kfp_task import run_kfp_task

    run_kfp_task(
        "data-prep",
        store=store,
        inputs={},
        config=config,
        run_id=run_id,
        reference_path=rows,
        manifest=manifest,
        metrics=metrics,
    )
