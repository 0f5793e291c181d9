"""Preferences to a promoted model: DPO on a base, or on a merged model that was tuned before."""

from finemill.pipelines.gates import PreferencePromoteConfig
from finemill.pipelines.graph import LARGE, ONE_GPU, Parameter, Pipeline, task

base_model = Parameter(
    "base_model",
    "The model to align: hf://org/name@revision, a folder, builtin:tiny-qwen3, or the reference <uri>@sha256:<digest> "
    "of a merged model, as `merge` printed it: that is how a tuned model is aligned.",
    "builtin:tiny-qwen3",
)

plan = task("preflight", retries=1)
rows = task("data-prep", after=(plan,))
dataset = task("chat-format", rows=rows, base_model=base_model)
adapter = task("train-dpo", dataset=dataset, base_model=base_model, resources=ONE_GPU)
evaluation = task("eval", dataset=dataset, base_model=base_model, adapter=adapter, resources=ONE_GPU)
model = task("merge", base_model=base_model, adapter=adapter, resources=LARGE)
gguf = task("gguf-quantize", model=model, dataset=dataset, resources=LARGE)
version = task("register", adapter=adapter, model=model, gguf=gguf, evaluation=evaluation)
champion = task("score-champion", evaluation=evaluation, resources=ONE_GPU)
decision = task(
    "promote", version=version, evaluation=evaluation, after=(champion,), section_class=PreferencePromoteConfig
)

ALIGN = Pipeline(
    "align",
    "Preferences and a base model in; adapter, merged model, GGUF files, report and a promoted version out.",
    (plan, rows, dataset, adapter, evaluation, model, gguf, version, champion, decision),
)
