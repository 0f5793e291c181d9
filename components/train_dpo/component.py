"""The KFP component `train-dpo`."""

from kfp import dsl

from finemill.runtime.images import IMAGES


@dsl.component(base_image=IMAGES["train"], install_kfp_package=False)
def train_dpo(
    store: str,
    dataset: str,
    base_model: str,
    adapter: dsl.OutputPath(str),
    manifest: dsl.Output[dsl.Artifact],
    metrics: dsl.Output[dsl.Metrics],
    config: dict = {},
    run_id: str = "",
):
    """Train LoRA adapters on preferences, the 4-bit base as reference (DPO).

    Args:
        store: folder or s3://bucket/prefix that gets the output.
        dataset: reference of the tokenized dataset, with rejected answers.
        base_model: the base model, hf://org/name@revision.
        adapter: gets the reference of the LoRA adapter, <uri>@sha256:<digest>.
        manifest: gets the output's manifest: files, digests, parents, resolved configuration.
        metrics: gets the step's metrics.
        config: fields as in `finemill schema train-dpo`; the rest keep their defaults.
        run_id: groups the steps of one pipeline run in MLflow.
    """
    from finemill.runtime.kfp_task import run_kfp_task

    run_kfp_task(
        "train-dpo",
        store=store,
        inputs={"dataset": dataset, "base_model": base_model},
        config=config,
        run_id=run_id,
        reference_path=adapter,
        manifest=manifest,
        metrics=metrics,
    )
