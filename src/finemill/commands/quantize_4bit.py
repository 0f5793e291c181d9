"""`finemill quantize-4bit MODEL --rows WHERE --output FOLDER`: a base in NF4, in 16 bits where they count most."""

import argparse
import re
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from finemill.artifacts.dataset import read_held_out, spread
from finemill.artifacts.four_bit import FourBitRecord, FourBitSize, write_four_bit
from finemill.artifacts.splits import Split
from finemill.commands.parser import CommandParser
from finemill.commands.plot import plot
from finemill.errors import UserError
from finemill.models.base.resolve import FORMS, resolve_base_model
from finemill.models.model_card import write_card
from finemill.models.nf4.checkpoint import checkpoint_shapes, write_checkpoint
from finemill.models.nf4.compare import Choice, by_measured_error, compare_choices, in_order
from finemill.models.nf4.config import is_quantized
from finemill.models.nf4.layers import choose_kept, measure_groups, quantized_layers, skip_modules
from finemill.models.stored_model import StoredModel
from finemill.models.token_rows import check_token_ids
from finemill.models.write_weights import total_bytes
from finemill.storage.space import require_space
from finemill.storage.store import artifact_folder

_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}
_SIZE = re.compile(r"\+(?P<percent>\d+(?:\.\d+)?)%|(?P<number>\d+(?:\.\d+)?)(?P<unit>KB|MB|GB)")


def execute(name: str, arguments: list[str]) -> int:
    """Measure, choose, write and print. Returns: the exit code."""
    args = _parser(name).parse_args(arguments)
    base = resolve_base_model(args.model)
    stored = _opened(args.model, base.path)
    _check_output(args.output)
    calibration, held_out = (_rows(args.rows, split, args.num_rows, stored.num_tokens) for split in ("train", "test"))
    dtype = stored.dtype if stored.dtype.itemsize == 2 else torch.bfloat16
    layers = quantized_layers(stored)
    extra_bytes = _extra_bytes(args.size, total_bytes(checkpoint_shapes(stored, layers, dtype)))
    groups = measure_groups(stored, calibration, dtype)
    plain, chosen = Choice("plain NF4", ()), Choice(f"NF4, {args.size}", choose_kept(groups, extra_bytes))
    curves = {"by measured error": by_measured_error(groups), "from the first layer on": in_order(groups)}
    others = [choice for curve in curves.values() for choice in curve] if args.plot else []
    sizes = {size.name: size for size in compare_choices(stored, [plain, chosen, *others], groups, held_out, dtype)}
    print(_table(list(sizes.values())))
    if args.plot:
        args.plot.write_text(_plot({name: [plain, *curve] for name, curve in curves.items()}, sizes), encoding="utf-8")
    record = FourBitRecord(
        base_model=args.model,
        base_digest=base.digest,
        kept=tuple(sorted(chosen.layers)),
        written=sizes[chosen.name],
        plain=sizes[plain.name],
    )
    _write(stored, chosen, record, dtype, args.output)
    print(f"{args.output}: {len(chosen.layers)} of {len(layers)} linear layers in 16 bits, the others in NF4")
    return 0


def _parser(name: str) -> argparse.ArgumentParser:
    parser = CommandParser(
        prog=f"finemill {name}",
        description="Quantize a base to bitsandbytes' NF4, but for the linear layers in which that costs most: weights "
        "and activations on your rows say which. transformers, PEFT and train-qlora open the result.",
        allow_abbrev=False,
    )
    parser.add_argument("model", metavar="MODEL", help=FORMS)
    parser.add_argument(
        "--rows",
        required=True,
        metavar="WHERE",
        help="chat-format's output, a folder or reference: errors are measured on train rows, KL on test rows",
    )
    parser.add_argument(
        "--size", default="+10%", help="of all weights: above plain NF4 (+10%%, the default), or in all (5.5GB)"
    )
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="a new folder for the model")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="an SVG of KL against size, with more sizes")
    parser.add_argument("--num-rows", type=int, default=64, metavar="N", help="of each split (default: 64)")
    return parser


def _opened(reference: str, folder: Path) -> StoredModel:
    """Raises: UserError: a model whose linear layers cannot be quantized one by one."""
    if is_quantized(folder):
        raise UserError(f"{reference} is in 4 bits already: pass the unquantized model")
    stored = StoredModel(folder)
    if stored.num_experts:
        raise UserError(f"{reference} is a mixture of experts, whose stacks bitsandbytes leaves in 16 bits")
    return stored


def _check_output(folder: Path) -> None:
    """Raises: UserError: something is there, or its parent is no folder."""
    if folder.exists():
        raise UserError(f"{folder} exists: choose another --output, or delete it")
    if not folder.absolute().parent.is_dir():
        raise UserError(f"{folder.absolute().parent} is no folder: make it, or write elsewhere")


def _rows(where: str, split: Split, count: int, num_tokens: int) -> list[list[int]]:
    """Raises: UserError: no dataset there, none of this model's tokens, or no row of two tokens."""
    dataset = artifact_folder(where, "dataset", "chat-format")
    rows = [row.input_ids for row in spread(read_held_out(dataset, split), count) if len(row.input_ids) > 1]
    check_token_ids(rows, num_tokens, where)
    if not rows:
        raise UserError(f"--rows {where}: no row of the {split} split has two tokens or more")
    return rows


def _extra_bytes(size: str, plain: int) -> int:
    """Bytes that 16-bit layers may add to `plain`. Raises: UserError: no size, or one that NF4 everywhere exceeds."""
    match = _SIZE.fullmatch(size)
    if not match:
        raise UserError(f"--size {size}: write what 16-bit layers may add (+10%), or a whole size (5.5GB, 800MB)")
    if match["percent"]:
        return int(plain * float(match["percent"]) / 100)
    extra = int(float(match["number"]) * _UNITS[match["unit"]]) - plain
    if extra < 0:
        raise UserError(f"--size {size}: with NF4 in every linear layer the weights take {plain / 1e6:.4g} MB already")
    return extra


def _table(sizes: Sequence[FourBitSize]) -> str:
    lines = ["| | MB | in 16 bits | KL, predicted | KL | 99.9 % | perplexity | same token | positions |"]
    lines += ["| --- | --- | --- | --- | --- | --- | --- | --- | --- |"]
    lines += [
        f"| {size.name} | {size.size_bytes / 1e6:.4g} | {size.num_kept} | {size.predicted_kl:.5f} | {size.kl:.5f} | "
        f"{size.kl_p999:.4f} | {size.perplexity:.4f} | {size.top1_agreement:.2%} | {size.positions} |"
        for size in sizes
    ]
    return "\n".join(lines)


def _plot(curves: Mapping[str, Sequence[Choice]], sizes: Mapping[str, FourBitSize]) -> str:
    points = {
        name: [(sizes[choice.name].size_bytes / 1e6, sizes[choice.name].kl, choice.name) for choice in curve]
        for name, curve in curves.items()
    }
    return plot(points, x="MB", y="KL, nats per token")


def _write(stored: StoredModel, chosen: Choice, record: FourBitRecord, dtype: torch.dtype, output: Path) -> None:
    """Write beside `output` and give it its name when all is there."""
    require_space(output.absolute().parent, record.written.size_bytes, "the model in 4 bits")
    staging = Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=output.absolute().parent))
    try:
        quantized = set(quantized_layers(stored)) - chosen.layers
        write_checkpoint(stored, quantized, skip_modules(stored, chosen.kept), dtype, staging)
        write_four_bit(staging, record)
        _write_card(staging, record)
        staging.chmod(0o755)
        staging.rename(output)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _write_card(folder: Path, record: FourBitRecord) -> None:
    write_card(
        folder,
        title="Base in 4 bits",
        base_model=record.base_model,
        form="bitsandbytes",
        summary=f"`{record.base_model}` in bitsandbytes' NF4, by finemill; {len(record.kept)} linear layers have 16 "
        "bits: those in which NF4 costs most per byte.",
        commands=[("finemill", "finemill train-qlora --base-model . --dataset DATASET")],
        table={
            size.name: {
                "MB": f"{size.size_bytes / 1e6:.4g}",
                "KL, nats per token": f"{size.kl:.2g}",
                "99.9th percentile": f"{size.kl_p999:.2g}",
                "perplexity": f"{size.perplexity:.4g}",
                "same likeliest token": f"{size.top1_agreement:.1%}",
            }
            for size in (record.plain, record.written)
        },
    )
