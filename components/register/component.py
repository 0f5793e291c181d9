"""The KFP component `register`; `make components` writes it from the catalogue and ports.yaml."""

from kfp import dsl

from finemill.runtime.images import IMAGES


@dsl.component(base_image=IMAGES["cpu"], install_kfp_package=False)
def register(
    store: str,
    adapter: str,
    model: str,
    gguf: str,
    evaluation: str,
    version: dsl.OutputPath(str),
    manifest: dsl.Output[dsl.Artifact],
    metrics: dsl.Output[dsl.Metrics],
    config: dict = {},
    run_id: str = "",
):
    """Record the results as a version in MLflow's model registry.

    Args:
        store: folder or s3://bucket/prefix that gets the output.
        adapter: reference of the output of train-qlora or train-dpo.
        model: reference of the output of merge.
        gguf: reference of the output of gguf-quantize.
        evaluation: reference of the output of eval.
        version: gets the reference, <uri>@sha256:<digest>, of version.json with the registered model's name, the
            version, its source and the references of its artifacts.
        manifest: gets the output's manifest: files, digests, parents, resolved configuration.
        metrics: gets the step's metrics.
        config: fields as in `finemill schema register`; the rest keep their defaults.
        run_id: groups the steps of one pipeline run in MLflow.
    """
    from finemill.runtime.kfp_task import run_kfp_task

    run_kfp_task(
        "register",
        store=store,
        inputs={"adapter": adapter, "model": model, "gguf": gguf, "evaluation": evaluation},
        config=config,
        run_id=run_id,
        reference_path=version,
        manifest=manifest,
        metrics=metrics,
    )
