"""The KFP component `preflight`."""

# ruff: noqa: RUF013, A002 (kfp reads neither `dict | None` nor `Optional`; the arguments are named after the sections)

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
    """Check store, credentials, tracking server, base model, configuration and GPU memory before anything is spent.

    Args:
        store: folder or s3://bucket/prefix that gets every artifact of the run.
        plan: gets the reference of the plan: the base model's exact revision, resolved configuration, estimates.
        manifest: gets the output's manifest: files, digests, parents, resolved configuration.
        metrics: gets the step's metrics.
        base_model: the base model, hf://org/name@revision.
        data_prep: configuration of that step, checked; like the eight that follow.
        chat_format: see data_prep.
        train_qlora: see data_prep; its memory is estimated.
        train_dpo: see data_prep; its memory is estimated.
        eval: see data_prep.
        merge: see data_prep.
        gguf_quantize: see data_prep.
        register: see data_prep; the tracking server is asked.
        promote: see data_prep; the tracking server is asked.
        config: fields as in `finemill schema preflight`; the rest keep their defaults.
        run_id: groups the steps of one pipeline run in MLflow.
    """
    from finemill.runtime.kfp_task import run_kfp_task

    sections = {
        "data_prep": data_prep,
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
