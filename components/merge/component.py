"""The KFP component `merge`; `make components` writes it from the catalogue and ports.yaml."""

from kfp import dsl

from finemill.runtime.images import IMAGES


@dsl.component(base_image=IMAGES["train"], install_kfp_package=False)
def merge(
    store: str,
    base_model: str,
    adapter: str,
    model: dsl.OutputPath(str),
    manifest: dsl.Output[dsl.Artifact],
    metrics: dsl.Output[dsl.Metrics],
    config: dict = {},
    run_id: str = "",
):
    """Merge the adapter into the unquantized base, 16 bit, and check its logits.

    Args:
        store: folder or s3://bucket/prefix that gets the output.
        base_model: the unquantized model that the adapter was trained on: hf://org/name@revision, or the reference of a
            merged model.
        adapter: reference of the output of train-qlora or train-dpo.
        model: gets the reference, <uri>@sha256:<digest>, of a Hugging Face folder with 16-bit safetensors, tokenizer
            and chat template; merge.json.
        manifest: gets the output's manifest: files, digests, parents, resolved configuration.
        metrics: gets the step's metrics.
        config: fields as in `finemill schema merge`; the rest keep their defaults.
        run_id: groups the steps of one pipeline run in MLflow.
    """
    from finemill.runtime.kfp_task import run_kfp_task

    run_kfp_task(
        "merge",
        store=store,
        inputs={"base_model": base_model, "adapter": adapter},
        config=config,
        run_id=run_id,
        reference_path=model,
        manifest=manifest,
        metrics=metrics,
    )
