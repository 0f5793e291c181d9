"""A trained adapter to a merged model, GGUF files and a registered version."""

from finemill.pipelines.graph import LARGE, Parameter, Pipeline, task

base_model = Parameter("base_model", "The model that the adapter was trained on, hf://org/name@revision.")
adapter = Parameter("adapter", "Reference of the adapter, <uri>@sha256:<digest>.")
dataset = Parameter("dataset", "Reference of the dataset whose held-out rows check the GGUF files.")
evaluation = Parameter("evaluation", "Reference of the adapter's evaluation.")

plan = task("preflight", retries=1)
model = task("merge", base_model=base_model, adapter=adapter, resources=LARGE, after=(plan,))
gguf = task("gguf-quantize", model=model, dataset=dataset, resources=LARGE)
version = task("register", adapter=adapter, model=model, gguf=gguf, evaluation=evaluation)

EXPORT = Pipeline(
    "export",
    "Merge an adapter into its base, write and check GGUF files, and register the result.",
    (plan, model, gguf, version),
)
