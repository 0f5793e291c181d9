"""The KFP component `chat-format`; `make components` writes it from the catalogue and ports.yaml."""

from kfp import dsl

from finemill.runtime.images import IMAGES


@dsl.component(base_image=IMAGES["cpu"], install_kfp_package=False)
def chat_format(
    store: str,
    rows: str,
    base_model: str,
    dataset: dsl.OutputPath(str),
    manifest: dsl.Output[dsl.Artifact],
    metrics: dsl.Output[dsl.Metrics],
    config: dict = {},
    run_id: str = "",
):
    """Apply the model's own chat template to rows, label the assistant's turns, keep the sources' shares.

    Args:
        store: folder or s3://bucket/prefix that gets the output.
        rows: reference of the output of data-prep.
        base_model: the model whose tokenizer and chat template are used: hf://org/name@revision, or the reference of a
            merged model.
        dataset: gets the reference, <uri>@sha256:<digest>, of train.parquet, validation.parquet and test.parquet with
            input_ids and labels, chat.jsonl, dataset.json, rejected.jsonl.
        manifest: gets the output's manifest: files, digests, parents, resolved configuration.
        metrics: gets the step's metrics.
        config: fields as in `finemill schema chat-format`; the rest keep their defaults.
        run_id: groups the steps of one pipeline run in MLflow.
    """
    from finemill.runtime.kfp_task import run_kfp_task

    run_kfp_task(
        "chat-format",
        store=store,
        inputs={"rows": rows, "base_model": base_model},
        config=config,
        run_id=run_id,
        reference_path=dataset,
        manifest=manifest,
        metrics=metrics,
    )
