"""The KFP component `preflight`; `make components` writes it from the catalogue and ports.yaml."""

from kfp import dsl

from finemill.runtime.images import IMAGES


@dsl.component(base_image=IMAGES["cpu"], install_kfp_package=False)
def preflight(
    store: str,
    plan: dsl.OutputPath(str),
    manifest: dsl.Output[dsl.Artifact],
    metrics: dsl.Output[dsl.Metrics],
    base_model: str = "",
    data_prep: dict = None,
    synthesize: dict = None,
    chat_format: dict = None,
    train_qlora: dict = None,
    train_dpo: dict = None,
    eval: dict = None,
    merge: dict = None,
    gguf_quantize: dict = None,
    register: dict = None,
    promote: dict = None,
    config: dict = {},
    run_id: str = "",
):
    """Check configuration, store, tracking server, base model and GPU memory before anything is spent.

    Args:
        store: folder or s3://bucket/prefix that gets the output.
        plan: gets the reference, <uri>@sha256:<digest>, of plan.json with the base model's exact revision, every step's
            resolved configuration, and estimates.
        manifest: gets the output's manifest: files, digests, parents, resolved configuration.
        metrics: gets the step's metrics.
        base_model: the run's base model, checked: hf://org/name@revision, or the reference of a merged model.
        data_prep: fields as in `finemill schema data-prep`, checked.
        synthesize: fields as in `finemill schema synthesize`, checked.
        chat_format: fields as in `finemill schema chat-format`, checked.
        train_qlora: fields as in `finemill schema train-qlora`, checked.
        train_dpo: fields as in `finemill schema train-dpo`, checked.
        eval: fields as in `finemill schema eval`, checked.
        merge: fields as in `finemill schema merge`, checked.
        gguf_quantize: fields as in `finemill schema gguf-quantize`, checked.
        register: fields as in `finemill schema register`, checked.
        promote: fields as in `finemill schema promote`, checked.
        config: fields as in `finemill schema preflight`; the rest keep their defaults.
        run_id: groups the steps of one pipeline run in MLflow.
    """
    from finemill.runtime.kfp_task import run_kfp_task

    sections = {
        "data_prep": data_prep,
        "synthesize": synthesize,
        "chat_format": chat_format,
        "train_qlora": train_qlora,
        "train_dpo": train_dpo,
        "eval": eval,
        "merge": merge,
        "gguf_quantize": gguf_quantize,
        "register": register,
        "promote": promote,
    }
    run_kfp_task(
        "preflight",
        store=store,
        inputs={},
        config={
            **config,
            "base_model": base_model or None,
            "steps": {name: values for name, values in sections.items() if values is not None},
        },
        run_id=run_id,
        reference_path=plan,
        manifest=manifest,
        metrics=metrics,
    )
