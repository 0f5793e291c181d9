"""The KFP component `synthesize`; `make components` writes it from the catalogue and ports.yaml."""

from kfp import dsl

from finemill.runtime.images import IMAGES


@dsl.component(base_image=IMAGES["cpu"], install_kfp_package=False)
def synthesize(
    store: str,
    rows: str,
    synthetic_rows: dsl.OutputPath(str),
    manifest: dsl.Output[dsl.Artifact],
    metrics: dsl.Output[dsl.Metrics],
    config: dict = {},
    run_id: str = "",
):
    """Have a model behind an OpenAI-compatible address write, translate or judge training rows.

    Args:
        store: folder or s3://bucket/prefix that gets the output.
        rows: reference of the output of data-prep.
        synthetic_rows: gets the reference, <uri>@sha256:<digest>, of train.parquet, validation.parquet and test.parquet
            (id, source, number, shape, row), data.json, report.md, rejected.jsonl, synthetic.jsonl, origins.jsonl.
        manifest: gets the output's manifest: files, digests, parents, resolved configuration.
        metrics: gets the step's metrics.
        config: fields as in `finemill schema synthesize`; the rest keep their defaults.
        run_id: groups the steps of one pipeline run in MLflow.
    """
    from finemill.runtime.kfp_task import run_kfp_task

    run_kfp_task(
        "synthesize",
        store=store,
        inputs={"rows": rows},
        config=config,
        run_id=run_id,
        reference_path=synthetic_rows,
        manifest=manifest,
        metrics=metrics,
    )
