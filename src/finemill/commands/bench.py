"""`finemill bench kernels|step|dpo|moe|scale|loss|eval|data|export|gguf`: the measuring programs."""

from finemill.commands.parser import CommandParser

_PROGRAMS = {
    "kernels": "single ops against their references, share of the card's bandwidth",
    "step": "a whole QLoRA training step",
    "dpo": "DPO and KTO on the engine, beside TRL's own trainer",
    "moe": "a training step of a mixture of experts, and the tiles of its products",
    "scale": "a training on several GPUs, by strategy",
    "loss": "training losses over several seeds against Hugging Face's",
    "eval": "answers of base and tuned in one pass, beside the plain batched loop",
    "data": "raw rows to labelled tokens, beside the usual way with datasets.map",
    "export": "merging and quantizing a model of a published shape: seconds and peak memory",
    "gguf": "what each GGUF type costs a model, and dynamic types at the same sizes",
}


def execute(name: str, arguments: list[str]) -> int:
    """Hand the arguments to the measuring program. Returns: its exit code."""
    parser = CommandParser(
        prog="finemill bench", description="\n".join(f"{key}: {text}" for key, text in _PROGRAMS.items())
    )
    parser.add_argument("what", choices=list(_PROGRAMS))
    what = parser.parse_args(arguments[:1] or ["--help"]).what
    if what == "kernels":
        from finemill.kernels.bench.ops import main
    elif what == "loss":
        from finemill.kernels.bench.loss import main
    elif what == "data":
        from finemill.commands.bench_data import main
    elif what == "eval":
        from finemill.commands.bench_eval import main
    elif what == "export":
        from finemill.commands.bench_export import main
    elif what == "gguf":
        from finemill.commands.bench_gguf import main
    elif what == "dpo":
        from finemill.kernels.bench.preferences import main
    elif what == "scale":
        from finemill.commands.bench_scale import main
    elif what == "moe":
        from finemill.kernels.bench.moe import main
    else:
        from finemill.kernels.bench.step import main
    return main(arguments[1:])
