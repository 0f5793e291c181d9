"""Raw rows to a promoted model: the whole line."""

from finemill.pipelines.graph import LARGE, ONE_GPU, Parameter, Pipeline, task

base_model = Parameter(
    "base_model", "The model to tune: hf://org/name@revision, a folder, or builtin:tiny-qwen3.", "builtin:tiny-qwen3"
)

plan = task("preflight", retries=1)
rows = task("data-prep", after=(plan,))
dataset = task("chat-format", rows=rows, base_model=base_model)
adapter = task("train-qlora", dataset=dataset, base_model=base_model, resources=ONE_GPU)
evaluation = task("eval", dataset=dataset, base_model=base_model, adapter=adapter, resources=ONE_GPU)
model = task("merge", base_model=base_model, adapter=adapter, resources=LARGE)
gguf = task("gguf-quantize", model=model, dataset=dataset, resources=LARGE)
version = task("register", adapter=adapter, model=model, gguf=gguf, evaluation=evaluation)
champion = task("score-champion", evaluation=evaluation, resources=ONE_GPU)
decision = task("promote", version=version, evaluation=evaluation, after=(champion,))

FINETUNE = Pipeline(
    "finetune",
    "Raw rows and a base model in; adapter, merged model, GGUF files, report and a promoted version out.",
    (plan, rows, dataset, adapter, evaluation, model, gguf, version, champion, decision),
)
