"""Raw rows to a promoted model: the whole line."""

from finemill.pipelines.config import FinetuneConfig
from finemill.pipelines.graph import LARGE, ONE_GPU, Parameter, Pipeline, task

base_model = Parameter("base_model", "The model to tune, hf://org/name@revision.", "builtin:tiny-qwen3")

rows = task("data-prep")
dataset = task("chat-format", rows=rows, base_model=base_model)
adapter = task("train-qlora", dataset=dataset, base_model=base_model, resources=ONE_GPU)
evaluation = task("eval", dataset=dataset, base_model=base_model, adapter=adapter, resources=ONE_GPU)
model = task("merge", base_model=base_model, adapter=adapter, resources=LARGE)
gguf = task("gguf-quantize", model=model, dataset=dataset, resources=LARGE)
version = task("register", adapter=adapter, model=model, gguf=gguf, evaluation=evaluation)
decision = task("promote", version=version, evaluation=evaluation)

FINETUNE = Pipeline(
    "finetune",
    "Raw rows and a base model in; adapter, merged model, GGUF files, report and a promoted version out.",
    (rows, dataset, adapter, evaluation, model, gguf, version, decision),
    FinetuneConfig,
)
