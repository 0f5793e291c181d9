"""The whole line on a schedule: ends as unchanged when the data is that of the newest registered version."""

from finemill.pipelines.finetune import base_model, dataset, plan, rows
from finemill.pipelines.graph import LARGE, ONE_GPU, Pipeline, task

change = task("detect-change", dataset=dataset)
adapter = task("train-qlora", dataset=dataset, base_model=base_model, resources=ONE_GPU, when=change)
evaluation = task("eval", dataset=dataset, base_model=base_model, adapter=adapter, resources=ONE_GPU, when=change)
model = task("merge", base_model=base_model, adapter=adapter, resources=LARGE, when=change)
gguf = task("gguf-quantize", model=model, dataset=dataset, resources=LARGE, when=change)
version = task("register", adapter=adapter, model=model, gguf=gguf, evaluation=evaluation, when=change)
champion = task("score-champion", evaluation=evaluation, resources=ONE_GPU, when=change)
decision = task("promote", version=version, evaluation=evaluation, after=(champion,), when=change)

RETRAIN = Pipeline(
    "retrain",
    "Ends as unchanged unless there is new data; otherwise trains, evaluates, exports, and promotes what is better.",
    (plan, rows, dataset, change, adapter, evaluation, model, gguf, version, champion, decision),
)
