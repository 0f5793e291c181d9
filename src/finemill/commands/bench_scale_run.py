"""One run of `finemill bench scale`, in a process of its group: the training that is timed, or the reference."""

import argparse
import cProfile
import io
import json
import math
import os
import pstats
import resource
import time
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from accelerate import PartialState
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from finemill.artifacts.dataset import LabelledRow
from finemill.artifacts.splits import split_path
from finemill.artifacts.tables import write_rows
from finemill.commands.bench_scale import ON_KERNELS, RESULT_VARIABLE
from finemill.components.train_qlora.config import TrainQLoRAConfig
from finemill.components.train_qlora.step import build_trainer
from finemill.kernels.bench.data import ensure_checkpoint, make_batches
from finemill.kernels.planning.model_shapes import SHAPES
from finemill.models.rope import RopeScaling
from finemill.runtime.processes import is_main_process, num_processes
from finemill.training.inputs import TrainingInputs, choose_device
from finemill.training.memory import not_on_kernels
from finemill.training.strategy import check_strategy, prepare_shards
from finemill.training.trainer import settle

_COMMUNICATION = ("nccl", "gloo", "memcpy ptop")
_TABLE_ROWS = 60
Interval = tuple[float, float]


def measure(args: argparse.Namespace) -> None:
    """Train, and write what was measured to the file that the environment names."""
    config = _config(args)
    check_strategy(config)
    device = choose_device() if args.device == "cuda" else torch.device("cpu")
    if num_processes() > 1:
        torch.distributed.init_process_group("gloo" if device.type == "cpu" else "cuda:nccl,cpu:gloo")
    path = ensure_checkpoint(args.shape, args.layers, device)
    config = settle(config, path, device)
    run = _reference if args.implementation == "reference" else _train
    found = run(args, config, path, device)
    peaks: list[Any] = [None] * num_processes()
    if num_processes() > 1:
        torch.distributed.all_gather_object(peaks, _peak(device))
    else:
        peaks = [_peak(device)]
    if not_on_kernels(config):
        found["recompute"] = config.gradient_checkpointing
    if is_main_process():
        Path(os.environ[RESULT_VARIABLE]).write_text(json.dumps(found | {"peak_bytes": peaks}), encoding="utf-8")


def _config(args: argparse.Namespace) -> TrainQLoRAConfig:
    (strategy,), (gpus,) = args.strategy, args.gpus
    methods: dict[str, dict[str, Any]] = {"qlora": {}, "lora": {"load_in_4bit": False}, "full": {"method": "full"}}
    recompute = {"on": True, "off": False}.get(args.recompute, "auto")
    shared: dict[str, Any] = {"strategy": strategy, "offload": args.offload and strategy not in ON_KERNELS}
    groups = 1 if args.context_parallel else gpus
    factor = math.ceil(args.seq / SHAPES[args.shape].max_positions)
    return TrainQLoRAConfig(
        **methods[args.method],
        **shared,
        context_parallel=gpus // groups,
        kernels="auto" if strategy in ON_KERNELS and not args.context_parallel else "off",
        gradient_checkpointing=recompute,
        memory_gb=args.memory_gb,
        max_length=args.seq,
        rope_scaling=RopeScaling(rope_type="yarn", factor=factor) if factor > 1 else None,
        per_device_train_batch_size=args.bs,
        gradient_accumulation_steps=args.rows // (args.bs * groups),
        max_steps=_num_steps(args),
        learning_rate=1e-4,
        lr_scheduler_type="constant",
        warmup_steps=0.0,
        logging_steps=1,
        save_steps=None,
        train_sampling_strategy="sequential",
    )


def _num_steps(args: argparse.Namespace) -> int:
    """Those that are timed, one whose kernels are looked at, and with `--profile` one whose Python is."""
    return int(args.steps) + 1 + (args.profile is not None)


class _Timer(TrainerCallback):  # type: ignore[misc]
    """Times the steps, and profiles those after them."""

    def __init__(self, args: argparse.Namespace, device: torch.device) -> None:
        self._args, self._steps, self._device = args, args.steps, device
        self._profile = profile(activities=_activities(device))
        self._python = cProfile.Profile()
        self._began = 0.0
        self.seconds: list[float] = []
        self.shares: dict[str, float] = {}

    def begin(self, step: int) -> None:
        """Start the clock of a step, counted from 0."""
        _sync(self._device)
        if step == self._steps:
            self._profile.start()
        elif step > self._steps:
            self._python.enable()
        self._began = time.perf_counter()

    def end(self, step: int) -> None:
        """Stop the clock."""
        self._python.disable()
        _sync(self._device)
        seconds = time.perf_counter() - self._began
        if step < self._steps:
            self.seconds.append(seconds)
            return
        if step > self._steps:
            return
        self._profile.stop()
        self.shares = _shares(self._profile, seconds, self._device)

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Of the trainer's steps."""
        self.begin(state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Of the trainer's steps, counted already."""
        self.end(state.global_step - 1)

    def found(self, losses: list[float]) -> dict[str, Any]:
        """What the runs' file is given."""
        if self._args.profile and is_main_process():
            self._write_profile()
        return {"step_s": self.seconds, "losses": [round(loss, 5) for loss in losses[: self._steps]], **self.shares}

    def _write_profile(self) -> None:
        """Kernels of one step, and Python's functions of the next, those that took longest first."""
        (strategy,), folder = self._args.strategy, Path(self._args.profile)
        folder.mkdir(parents=True, exist_ok=True)
        python = io.StringIO()
        stats = pstats.Stats(self._python, stream=python).strip_dirs()
        stats.sort_stats("tottime").print_stats(_TABLE_ROWS)
        stats.sort_stats("cumtime").print_stats(_TABLE_ROWS)
        name = f"{self._args.implementation}-{strategy}-{num_processes()}.txt"
        text = kernel_table(self._profile, self._device) + "\n" + python.getvalue()
        (folder / name).write_text(text, encoding="utf-8")


def _train(args: argparse.Namespace, config: TrainQLoRAConfig, path: Path, device: torch.device) -> dict[str, Any]:
    """Through the trainer of train-qlora."""
    if config.strategy == "shard":
        PartialState()  # joins the processes: they exchange what they hold while the base is loaded
    timer = _Timer(args, device)
    with TemporaryDirectory(prefix="finemill-scale-") as folder:
        dataset = Path(folder, "dataset")
        dataset.mkdir()
        rows = [row.tolist() for row in _rows(args)]
        write_rows(split_path(dataset, "train"), LabelledRow, [LabelledRow(input_ids=row, labels=row) for row in rows])
        tokenizer = AutoTokenizer.from_pretrained(path)
        inputs = TrainingInputs(path, dataset, tokenizer, device)
        trainer = build_trainer(inputs, Path(folder, "scratch"), config)
        prepare_shards(trainer)
        trainer.add_callback(timer)
        trainer.train()
    return timer.found([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])


def _reference(args: argparse.Namespace, config: TrainQLoRAConfig, path: Path, device: torch.device) -> dict[str, Any]:
    """Accelerate's own loop: every weight trained, AdamW, the same rows in the same order."""
    from accelerate import Accelerator

    if args.method != "full" or device.type == "cpu":
        raise SystemExit("--reference is for --method full on GPUs, where Accelerate shards")
    passes = config.gradient_accumulation_steps
    accelerator = Accelerator(
        mixed_precision="bf16", gradient_accumulation_steps=passes, **_plugin(args, config, passes)
    )
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    model.train()
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    model.config.use_cache = False
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate)
    model, optimizer = accelerator.prepare(model, optimizer)
    rank, processes = accelerator.process_index, accelerator.num_processes
    batches = torch.split(torch.stack(list(_rows(args))), args.bs)[rank::processes]
    timer, losses = _Timer(args, device), []
    for step in range(_num_steps(args)):
        timer.begin(step)
        total = torch.zeros((), device=device)
        for batch in batches[step * passes : (step + 1) * passes]:
            with accelerator.accumulate(model):
                ids = batch.to(device)
                loss = model(input_ids=ids, labels=ids).loss
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), config.max_grad_norm)
                optimizer.step()
                optimizer.zero_grad()
                total += loss.detach() / passes
        timer.end(step)
        losses.append(float(accelerator.gather(total).mean()))
    return timer.found(losses)


def _plugin(args: argparse.Namespace, config: TrainQLoRAConfig, passes: int) -> dict[str, Any]:
    """Accelerate's plugin for the strategy, with DeepSpeed's own defaults."""
    from accelerate import DeepSpeedPlugin, FullyShardedDataParallelPlugin

    if config.strategy == "fsdp2":
        plugin = FullyShardedDataParallelPlugin(fsdp_version=2, reshard_after_forward=True, cpu_offload=args.offload)
        return {"fsdp_plugin": plugin}
    zero: dict[str, Any] = {"stage": int(config.strategy[-1])}
    if args.offload:
        zero |= {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}
    settings = {
        "zero_optimization": zero,
        "bf16": {"enabled": True},
        "gradient_clipping": config.max_grad_norm,
        "gradient_accumulation_steps": passes,
        "train_micro_batch_size_per_gpu": args.bs,
    }
    return {"deepspeed_plugin": DeepSpeedPlugin(hf_ds_config=settings, zero3_init_flag=False)}


def _rows(args: argparse.Namespace) -> Iterable[torch.Tensor]:
    """Every row of every step, in order; the same for any number of GPUs."""
    sets = make_batches(SHAPES[args.shape].vocabulary, args.seq, 1, args.rows, _num_steps(args))
    return (row for batches in sets for batch in batches for row in batch)


def _shares(profiled: profile, seconds: float, device: torch.device) -> dict[str, float]:
    """Shares of a step in which nothing ran but communication, and, on a GPU, in which nothing ran."""
    # The raw events: an object of Python's for each of the hundreds of thousands takes minutes.
    talking: list[Interval] = []
    computing: list[Interval] = []
    kineto: Any = profiled.profiler
    for event in kineto.kineto_results.events():
        interval = event.start_ns() / 1e9, event.end_ns() / 1e9
        if event.name().lower().startswith(_COMMUNICATION):
            talking.append(interval)
        elif event.device_type() != DeviceType.CPU:
            computing.append(interval)
    shares = {"waiting": round(alone(talking, computing) / seconds, 4)}
    if device.type == "cuda":
        shares["idle"] = round(max(0.0, 1 - _covered([*talking, *computing]) / seconds), 4)
    return shares


def kernel_table(profiled: profile, device: torch.device) -> str:
    """Milliseconds and calls of a step's kernels, or of a CPU's operations, the longest first."""
    found: dict[str, list[float]] = defaultdict(list)
    kineto: Any = profiled.profiler
    for event in kineto.kineto_results.events():
        if device.type == "cpu" or event.device_type() != DeviceType.CPU:
            found[event.name()].append((event.end_ns() - event.start_ns()) / 1e6)
    longest = sorted(found.items(), key=lambda item: sum(item[1]), reverse=True)[:_TABLE_ROWS]
    lines = (f"{sum(times):>9.2f} {len(times):>7}  {name[:150]}" for name, times in longest)
    return "\n".join([f"{'ms':>9} {'calls':>7}  kernel", *lines]) + "\n"


def alone(intervals: list[Interval], others: list[Interval]) -> float:
    """Time that is in the intervals and in none of the others."""
    return _covered([*intervals, *others]) - _covered(others)


def _covered(intervals: list[Interval]) -> float:
    """Time that is in one interval at least."""
    covered, reached = 0.0, -math.inf
    for begin, end in sorted(intervals):
        covered += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return covered


def _activities(device: torch.device) -> list[ProfilerActivity]:
    return [ProfilerActivity.CUDA if device.type == "cuda" else ProfilerActivity.CPU]


def _sync(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _peak(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
