"""What is trained on the base: adapters, whole modules or all of it, and the files they are saved in."""

import json
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase, Trainer
from transformers.pytorch_utils import Conv1D

from finemill.artifacts.adapter import TrainingRecord, write_training
from finemill.artifacts.four_bit import read_four_bit
from finemill.errors import UserError
from finemill.models.adapter import CONFIG_NAME, WEIGHTS_NAME
from finemill.models.base.resolve import ResolvedBase
from finemill.models.rope import RopeScaling
from finemill.models.weights import read_header
from finemill.training.adapter_card import write_adapter_card
from finemill.training.config import TABLES, LoRATrainingConfig
from finemill.training.mixture import Mixture
from finemill.training.whole_state import plain_names, trained_weights

_LAYERS = (nn.Linear, nn.Embedding, Conv1D)
"""Layers that PEFT puts adapters on; GPT-2's linear layers are the last."""
_GROUPS = {"attention": ("attn", "attention"), "mlp": ("mlp", "feed_forward", "ffn", "expert")}
"""What the module above the linear layers of a group is called."""


def lora_config(base_model: Path, config: LoRATrainingConfig, new_tokens: Sequence[int] = ()) -> LoraConfig | None:
    """PEFT's description of the adapters; None where the whole model is trained.

    Args:
        base_model: folder of the base.
        config: what is trained.
        new_tokens: ids whose rows of embedding and output matrix are trained.
    Raises: UserError: a named module is none of the model in `base_model`, or PEFT cannot keep the whole of it.
    """
    model = _hollow_model(base_model)
    if config.method == "full":
        _check_whole(model)
        return None
    mixture = Mixture.of(model)
    tied = model.config.get_text_config().tie_word_embeddings
    prefix = decoder_prefix(model)
    targets, experts = _target_modules(model, config, mixture, prefix), _target_parameters(config, mixture)
    modules = [*_modules_to_save(model, config), *_routers(config, mixture)]
    if tied and not {"embed_tokens", "lm_head"} & set(modules) and any(name in TABLES for name in modules):
        modules.append("lm_head")  # PEFT ties by these names
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
        use_rslora=config.use_rslora,
        use_dora=config.use_dora,
        init_lora_weights="gaussian" if config.init_lora_weights == "gaussian" else True,
        target_modules=targets,
        target_parameters=experts or None,
        exclude_modules=rf"(?!{re.escape(prefix)}).*" if _fit_beside(model, targets, prefix) else None,
        modules_to_save=modules or None,
        trainable_token_indices=_token_tables(model, modules, new_tokens) or None,
        # Else an embedding that is trained would leave its output matrix as it was.
        ensure_weight_tying=tied and any(_fits(name, table) for name in modules for table in TABLES),
    )


def _check_whole(model: PreTrainedModel) -> None:
    """Raises: UserError: a module has weights beside those of its parts, which PEFT cannot both keep."""
    prefix = decoder_prefix(model)
    names = [name.rpartition(".")[0] for name, _ in model.named_parameters() if name.startswith(prefix)]
    for holder in dict.fromkeys(names):
        if any(name.startswith(f"{holder}.") for name in names):
            raise UserError(
                f"method 'full' cannot be saved for this base: PEFT keeps modules whole, and {holder} has weights "
                "beside those of its parts: use method 'lora'"
            )


def _token_tables(model: PreTrainedModel, modules: Sequence[str], new_tokens: Sequence[int]) -> dict[str, list[int]]:
    """By table, the rows of new tokens; none of a table that is trained as a whole, nor of the one tied to it."""
    tied = model.config.get_text_config().tie_word_embeddings
    tables = [model.get_input_embeddings(), *([] if tied else [model.get_output_embeddings()])]
    names = [name for name, module in model.named_modules() if any(module is table for table in tables)]
    if not new_tokens or (tied and any(_fits(name, table) for name in modules for table in TABLES)):
        return {}
    return {
        name.rpartition(".")[2]: list(new_tokens) for name in names if not any(_fits(name, saved) for saved in modules)
    }


def _hollow_model(base_model: Path) -> PreTrainedModel:
    """The model in a folder, without its weights."""
    description = AutoConfig.from_pretrained(base_model, local_files_only=True, trust_remote_code=False)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(description)


def decoder_prefix(model: PreTrainedModel) -> str:
    """How names in the decoder begin where a model sees or hears as well; nothing where it is all decoder."""
    if model.config.get_text_config() is model.config:
        return ""
    decoder = model.get_decoder()
    return next((f"{name}." for name, module in model.named_modules() if name and module is decoder), "")


def _fit_beside(model: PreTrainedModel, targets: str | list[str], prefix: str) -> bool:
    """Whether targets fit layers beside the decoder, which rows of text never pass."""
    beside = [name for name, _ in model.named_modules() if not name.startswith(prefix)]
    return any(_fits(name, target) for name in beside for target in ([] if isinstance(targets, str) else targets))


def _target_modules(
    model: PreTrainedModel, config: LoRATrainingConfig, mixture: Mixture, prefix: str
) -> str | list[str]:
    """The layers that get adapters, as PEFT takes them; experts and routers are not among them, nor what is beside the
    decoder, whose names begin with `prefix`.

    Raises: UserError: a name that fits no layer, or one that takes no adapter. PEFT passes by a name that fits nothing
        as long as another one fits something.
    """
    layers = {
        name: isinstance(module, _LAYERS)
        and module is not model.get_output_embeddings()
        and not mixture.is_router(name)
        for name, module in model.named_modules()
        if name.startswith(prefix)
    }
    targets = config.target_modules
    if targets == "all-linear":
        linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
        # PEFT's own choice would take linear layers that choose or weigh experts, too.
        own = _own_names({name: takes and name in linear for name, takes in layers.items()})
        return own if mixture.experts or prefix else targets
    if isinstance(targets, str):
        return _group(layers, targets, mixture)
    for target in targets:
        fitting = [takes for name, takes in layers.items() if _fits(name, target)]
        if mixture.is_router(target):
            raise UserError(f"target_modules: '{target}' is a router, which train_router trains as a whole")
        if not (fitting and all(fitting)) and not mixture.holds(target, targets):
            problem = "is no layer that takes an adapter" if fitting else "fits no layer"
            there = [*_own_names(layers), *(stack.rpartition(".")[2] for stack in mixture.experts)]
            raise UserError(f"target_modules: '{target}' {problem} of the base model; there are {', '.join(there)}")
    return [target for target in targets if any(_fits(name, target) for name in layers)]


def _target_parameters(config: LoRATrainingConfig, mixture: Mixture) -> list[str]:
    """The experts that get adapters, one for each expert.

    Raises: UserError: with a setting that PEFT has not for them.
    """
    if isinstance(config.target_modules, str):
        experts = [] if config.target_modules == "attention" else list(mixture.experts)
    else:
        experts = mixture.named(config.target_modules)
    unfit = {"lora_dropout": config.lora_dropout > 0, "use_dora": config.use_dora}
    unfit["init_lora_weights"] = config.init_lora_weights == "loftq"
    for name in [name for name, is_set in unfit.items() if is_set and experts]:
        raise UserError(
            f"{name} {getattr(config, name)!r} is not for adapters of experts, which PEFT adds to their weights: leave "
            "it out, or set target_modules to 'attention'"
        )
    return experts


def _routers(config: LoRATrainingConfig, mixture: Mixture) -> tuple[str, ...]:
    """The routers, if they are trained. Raises: UserError: the base has none."""
    if config.train_router and not mixture.routers:
        raise UserError("train_router: the base model is dense, it has no routers: leave it out")
    return mixture.routers if config.train_router else ()


def _own_names(layers: dict[str, bool]) -> list[str]:
    """The last names of what takes an adapter, each once."""
    return list(dict.fromkeys(name.rpartition(".")[2] for name, takes in layers.items() if takes))


def _group(layers: dict[str, bool], group: str, mixture: Mixture) -> list[str]:
    """The last names of the linear layers of attention or of the MLPs; none where experts are all there is of these."""
    found: dict[str, None] = {}
    for name, takes in layers.items():
        *_, parent, own = ["", *name.split(".")]
        if takes and any(part in parent for part in _GROUPS[group]):
            found[own] = None
    if not found and not (mixture.experts and group == "mlp"):
        raise UserError(f"target_modules: '{group}' fits no layer of the base model: name the layers")
    return list(found)


def _modules_to_save(model: PreTrainedModel, config: LoRATrainingConfig) -> list[str]:
    """The modules that are trained as a whole. Raises: UserError: a name of none, or of one that gets an adapter."""
    holders = {name: any(True for _ in module.parameters(recurse=False)) for name, module in model.named_modules()}
    for module in config.modules_to_save:
        fitting = [holds for name, holds in holders.items() if _fits(name, module)]
        if not fitting or not all(fitting):
            problem = "holds no weights itself" if fitting else "is no module of the base model"
            there = dict.fromkeys(name.rpartition(".")[2] for name, holds in holders.items() if holds)
            raise UserError(f"modules_to_save: '{module}' {problem}; there are {', '.join(there)}")
    both = set(config.modules_to_save).intersection(
        () if isinstance(config.target_modules, str) else config.target_modules
    )
    if both:
        raise UserError(
            f"'{min(both)}' is in target_modules and in modules_to_save: it can have an adapter or be saved"
        )
    for name, module in model.named_modules():
        saved = next((saved for saved in config.modules_to_save if _fits(name, saved)), None)
        in_full = not isinstance(module, nn.Linear) or module is model.get_output_embeddings()
        if saved is not None and config.bits < 16 and not in_full:
            raise UserError(
                f"modules_to_save: '{saved}' is a linear layer, which the base has in {config.bits} bits: give it an "
                "adapter (target_modules), or set load_in_4bit and load_in_8bit to false"
            )
    return [name for module in config.modules_to_save for name in _in_full(module, list(holders))]


def _in_full(module: str, there: Sequence[str]) -> list[str]:
    """A module's name, or its full ones where PEFT would take others that end alike: q_norm for norm."""
    named = [name for name in there if _fits(name, module)]
    return named if any(name.endswith(module) and name not in named for name in there) else [module]


def _fits(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def keep_trained_in_float32(model: nn.Module) -> None:
    """Undo TRL's cast of the adapters to bfloat16: at small learning rates AdamW's updates would round to nothing."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def save_adapter(
    trainer: Trainer,
    tokenizer: PreTrainedTokenizerBase,
    output_dir: Path,
    base: ResolvedBase,
    *,
    rope_scaling: RopeScaling | None,
) -> None:
    """Write adapter, tokenizer with its chat template, and the training's log history.

    A collective of all processes that share the model, of which the main one's files are kept. The adapter names its
    base as PEFT expects: the hub's name and commit where there is one, else the reference. Its record has the
    positions, if `rope_scaling` changed them.
    """
    model, weights = trainer.model, trained_weights(trainer.model)
    # What modules that are trained as a whole have beside, as a router its correction, PEFT asks for by name.
    weights |= {name: buffer.cpu() for name, buffer in model.named_buffers() if ".modules_to_save." in name}
    output_dir.mkdir(parents=True, exist_ok=True)
    if isinstance(model, PeftModel):
        _name_base(model.peft_config["default"], base)
        _sort_names(model.peft_config["default"])
        # Said outright: PEFT would ask the hub whether adapters were put on the embeddings' vocabulary.
        with plain_names(model):
            model.save_pretrained(output_dir, state_dict=weights, safe_serialization=True, save_embedding_layers=False)
    else:
        _save_whole(model, weights, output_dir, base)
    tokenizer.save_pretrained(output_dir)
    state, four_bit = trainer.state, read_four_bit(base.path)
    record = TrainingRecord(
        max_steps=state.max_steps,
        log_history=tuple(map(_without_times, state.log_history)),
        base_digest=base.digest,
        unquantized_base_digest=four_bit.base_digest if four_bit else None,
        layers_in_16_bits=four_bit.kept if four_bit else (),
        rope_parameters=dict(model.config.get_text_config().rope_parameters) if rope_scaling else None,
    )
    write_training(output_dir, record)
    write_adapter_card(output_dir, base, record)


def _without_times(entry: dict[str, float]) -> dict[str, float]:
    """An entry of the log without what another run of the same training measures otherwise, in one order: a
    checkpoint's are sorted.
    """
    return {name: entry[name] for name in sorted(entry) if not name.endswith(("_runtime", "_per_second"))}


def _sort_names(config: LoraConfig) -> None:
    """PEFT keeps names in sets, whose order changes from process to process."""
    if isinstance(config.target_modules, set):
        config.target_modules = sorted(config.target_modules)


def _name_base(config: LoraConfig, base: ResolvedBase) -> None:
    config.base_model_name_or_path = base.id.removeprefix("hf://").partition("@")[0] if base.revision else base.id
    config.revision = base.revision


def _save_whole(model: PreTrainedModel, trained: Mapping[str, Tensor], output_dir: Path, base: ResolvedBase) -> None:
    """Write every weight as PEFT saves modules that are trained as a whole, beside no adapter at all."""
    holders = {name.rpartition(".")[0] for name in trained}
    saved = model.state_dict()
    # A module's buffers, as a router's correction, are parts of it for PEFT.
    buffers = {
        name: buffer.cpu()
        for name, buffer in model.named_buffers()
        if name in saved and name.rpartition(".")[0] in holders
    }
    weights = {f"base_model.model.{name}": weight for name, weight in {**trained, **buffers}.items()}
    save_file(weights, output_dir / WEIGHTS_NAME, metadata={"format": "pt"})
    config = LoraConfig(
        task_type="CAUSAL_LM", target_modules="dummy-target-modules", modules_to_save=_names(model, holders)
    )
    config.ensure_weight_tying = model.config.get_text_config().tie_word_embeddings
    config.inference_mode = True
    _name_base(config, base)
    config.save_pretrained(output_dir)


def _names(model: PreTrainedModel, modules: Collection[str]) -> list[str]:
    """Names that PEFT takes for just these modules: their last ones, or whole ones where others end alike."""
    others = [name for name, _ in model.named_modules() if name not in modules]
    return sorted(
        {
            path if any(name.endswith(last) for name in others) else last
            for path in modules
            for last in [path.rpartition(".")[2]]
        }
    )


Pairs = dict[str, tuple[Tensor, Tensor]]
"""A and B by the name of their layer."""


def start_from_quantization_error(model: PeftModel, base_model: Path) -> Pairs:
    """LoftQ: make each adapter the best rank-r approximation of what quantization lost of its layer.

    Returns: the adapters as they begin, for `subtract_initial`.
    """
    import bitsandbytes as bnb

    files = {tensor: file for file in base_model.glob("*.safetensors") for tensor in read_header(file)}
    initial: Pairs = {}
    for name, layer in model.named_modules():
        if not hasattr(layer, "lora_A") or not isinstance(layer.base_layer, bnb.nn.Linear4bit):
            continue
        a, b, scaling = layer.lora_A["default"].weight, layer.lora_B["default"].weight, layer.scaling["default"]
        quantized = layer.base_layer.weight
        kept = bnb.functional.dequantize_4bit(quantized.data, quantized.quant_state).float()
        stored = name.removeprefix("base_model.model.") + ".weight"
        with safe_open(files[stored], framework="pt") as file:
            lost = file.get_tensor(stored).to(kept.device).float() - kept
        left, values, right = torch.linalg.svd(lost, full_matrices=False)
        root = values[: len(a)].sqrt()
        rank = len(root)  # a narrow layer has less than lora_r
        with torch.no_grad():
            a[:rank] = root[:, None] * right[:rank] / scaling
            b.zero_()[:, :rank] = left[:, :rank] * root
        initial[name] = (a.detach().cpu().float().clone(), b.detach().cpu().float().clone())
    return initial


def subtract_initial(output_dir: Path, initial: Pairs) -> None:
    """Make a saved adapter that of the unquantized base: B A less what it began with, which that base has itself."""
    weights = load_file(output_dir / WEIGHTS_NAME)
    for layer, (a, b) in initial.items():
        name_a, name_b = f"{layer}.lora_A.weight", f"{layer}.lora_B.weight"
        weights[name_a] = torch.cat([weights[name_a].float(), a])
        weights[name_b] = torch.cat([weights[name_b].float(), -b], dim=1)
    save_file(weights, output_dir / WEIGHTS_NAME, metadata={"format": "pt"})
    path = output_dir / CONFIG_NAME
    values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    # The factor of the product stays: lora_alpha / r, or lora_alpha / sqrt(r).
    values["lora_alpha"] *= 2**0.5 if values["use_rslora"] else 2
    values["r"] *= 2
    path.write_text(json.dumps(values, indent=2, sort_keys=True), encoding="utf-8")
