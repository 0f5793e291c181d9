"""The KFP component `train-qlora`; `make components` writes it from the catalogue and ports.yaml."""

from kfp import dsl

from finemill.runtime.images import IMAGES


@dsl.component(base_image=IMAGES["train"], install_kfp_package=False)
def train_qlora(
    store: str,
    dataset: str,
    base_model: str,
    adapter: dsl.OutputPath(str),
    manifest: dsl.Output[dsl.Artifact],
    metrics: dsl.Output[dsl.Metrics],
    config: dict = {},
    run_id: str = "",
):
    """Train LoRA adapters on the 4-bit base.

    Args:
        store: folder or s3://bucket/prefix that gets the output.
        dataset: reference of the output of chat-format, made with the same base model.
        base_model: the model that gets adapters; quantized while it is loaded, as load_in_4bit and load_in_8bit say:
            hf://org/name@revision, or the reference of a merged model.
        adapter: gets the reference, <uri>@sha256:<digest>, of PEFT's adapter_config.json and adapter_model.safetensors,
            tokenizer, chat template, training.json.
        manifest: gets the output's manifest: files, digests, parents, resolved configuration.
        metrics: gets the step's metrics.
        config: fields as in `finemill schema train-qlora`; the rest keep their defaults.
        run_id: groups the steps of one pipeline run in MLflow.
    """
    from finemill.runtime.kfp_task import run_kfp_task

    run_kfp_task(
        "train-qlora",
        store=store,
        inputs={"dataset": dataset, "base_model": base_model},
        config=config,
        run_id=run_id,
        reference_path=adapter,
        manifest=manifest,
        metrics=metrics,
    )
