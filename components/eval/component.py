"""The KFP component `eval`; `make components` writes it from the catalogue and ports.yaml."""

from kfp import dsl

from finemill.runtime.images import IMAGES


@dsl.component(base_image=IMAGES["train"], install_kfp_package=False)
def eval(
    store: str,
    dataset: str,
    base_model: str,
    adapter: str,
    evaluation: dsl.OutputPath(str),
    manifest: dsl.Output[dsl.Artifact],
    metrics: dsl.Output[dsl.Metrics],
    report: dsl.Output[dsl.HTML],
    summary: dsl.Output[dsl.Markdown],
    config: dict = {},
    run_id: str = "",
):
    """Score base and tuned model on held-out rows, and write the report.

    Args:
        store: folder or s3://bucket/prefix that gets the output.
        dataset: reference of the output of chat-format, whose test split is scored.
        base_model: the model that was tuned: hf://org/name@revision, or the reference of a merged model.
        adapter: reference of the output of train-qlora or train-dpo.
        evaluation: gets the reference, <uri>@sha256:<digest>, of metrics.json, samples.parquet, report.html, report.md.
        manifest: gets the output's manifest: files, digests, parents, resolved configuration.
        metrics: gets the step's metrics.
        report: gets the page with both models' answers side by side.
        summary: gets the table of scores.
        config: fields as in `finemill schema eval`; the rest keep their defaults.
        run_id: groups the steps of one pipeline run in MLflow.
    """
    from finemill.runtime.kfp_task import run_kfp_task

    run_kfp_task(
        "eval",
        store=store,
        inputs={"dataset": dataset, "base_model": base_model, "adapter": adapter},
        config=config,
        run_id=run_id,
        reference_path=evaluation,
        manifest=manifest,
        metrics=metrics,
        shown={"report.html": report, "report.md": summary},
    )
