"""The KFP component `gguf-quantize`; `make components` writes it from the catalogue and ports.yaml."""

from kfp import dsl

from finemill.runtime.images import IMAGES


@dsl.component(base_image=IMAGES["train"], install_kfp_package=False)
def gguf_quantize(
    store: str,
    model: str,
    dataset: str,
    gguf: dsl.OutputPath(str),
    manifest: dsl.Output[dsl.Artifact],
    metrics: dsl.Output[dsl.Metrics],
    config: dict = {},
    run_id: str = "",
):
    """Write GGUF files, load each in llama.cpp, and compare them with the merged model.

    Args:
        store: folder or s3://bucket/prefix that gets the output.
        model: reference of the output of merge.
        dataset: reference of the output of chat-format: held-out rows to compare on.
        gguf: gets the reference, <uri>@sha256:<digest>, of <name>-<type>.gguf for each type, Modelfile, gguf.json.
        manifest: gets the output's manifest: files, digests, parents, resolved configuration.
        metrics: gets the step's metrics.
        config: fields as in `finemill schema gguf-quantize`; the rest keep their defaults.
        run_id: groups the steps of one pipeline run in MLflow.
    """
    from finemill.runtime.kfp_task import run_kfp_task

    run_kfp_task(
        "gguf-quantize",
        store=store,
        inputs={"model": model, "dataset": dataset},
        config=config,
        run_id=run_id,
        reference_path=gguf,
        manifest=manifest,
        metrics=metrics,
    )
