import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from finemill.models.generation import generate_answers, stop_token_ids


@pytest.fixture
def tokenizer(tiny_model_dir: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_model_dir)


@pytest.mark.parametrize("end", ["<end_of_turn>", "<|end_of_turn|>", "<|end|>", "[/ANSWER]"])
def test_the_chat_template_says_what_ends_a_turn(tiny_model_dir: Path, tmp_path: Path, end: str) -> None:
    folder = Path(shutil.copytree(tiny_model_dir, tmp_path / "model"))
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        text = (folder / name).read_text()
        (folder / name).write_text(text.replace("<|im_end|>", end))
    (folder / "generation_config.json").unlink()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.eos_token = tokenizer.pad_token = "<|endoftext|>"
    assert tokenizer.convert_ids_to_tokens(stop_token_ids(tokenizer, folder)) == ["<|endoftext|>", end]


@pytest.mark.parametrize(
    "template",
    [
        "",
        "{{ raise_exception('no') }}",
        "{{ messages[0].nothing.at_all }}",
        "{% for m in messages %}### {{ m.role }}:\n{{ m.content }}\n{% endfor %}",
    ],
)
def test_without_a_mark_of_the_template_the_tokenizers_last_token_ends_a_turn(
    tokenizer: Any, tmp_path: Path, template: str
) -> None:
    tokenizer.chat_template = template
    tokenizer.pad_token = None
    assert stop_token_ids(tokenizer, tmp_path) == [tokenizer.eos_token_id]


@pytest.mark.parametrize("found", [32000, [32000, -1], "2", [None, 1.5]])
def test_an_end_that_is_no_token_ends_nothing(tokenizer: Any, tiny_model_dir: Path, tmp_path: Path, found: Any) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": found}))
    assert stop_token_ids(tokenizer, tmp_path) == [tokenizer.eos_token_id, tokenizer.pad_token_id]


@pytest.mark.parametrize("with_adapter", [False, True])
def test_greedy_answers_are_the_likeliest_tokens_whatever_the_base_recommends(
    tiny_model_dir: Path, tokenizer: Any, with_adapter: bool
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32).eval()
    stops = stop_token_ids(tokenizer, tiny_model_dir)
    prompts = [tokenizer("<|im_start|>user\nWhat is 3 plus 4?<|im_end|>\n<|im_start|>assistant\n")["input_ids"]]
    own = GenerationConfig(repetition_penalty=5.0, no_repeat_ngram_size=1, do_sample=True, temperature=3.0)
    model.generation_config = own
    scored = get_peft_model(model, LoraConfig(target_modules="all-linear")) if with_adapter else model
    (answer,) = generate_answers(scored, tokenizer, prompts, stop_token_ids=stops, max_new_tokens=20)
    assert model.generation_config is own
    ids = list(prompts[0])
    with torch.inference_mode():
        while len(ids) < len(prompts[0]) + 20 and ids[-1] not in stops[:1]:
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    assert tokenizer.decode(ids[len(prompts[0]) :]).removesuffix("<|im_end|>") == answer.text
