import argparse
import base64
import json
import re
from pathlib import Path
from typing import Any

import pytest
from pydantic import Field

from finemill.commands.config_flags import add_config_flags, merge_values, read_config
from finemill.config import StepConfig
from finemill.errors import UserError
from finemill.transport import pack_long


class Optimizer(StepConfig):
    learning_rate: float = Field(default=1e-3, gt=0)
    """Peak value, 100 % of it."""


class Config(StepConfig):
    name: str = "7"
    """A label."""
    max_steps: int | None = None
    target_modules: list[str] = Field(default_factory=lambda: ["q_proj"])
    tokens: tuple[str, ...] = ()
    kwargs: dict[str, Any] = Field(default_factory=dict)
    optimizer: Optimizer = Field(default_factory=Optimizer)


def read(*arguments: str) -> Config:
    parser = argparse.ArgumentParser()
    add_config_flags(parser, Config)
    return read_config(parser.parse_args(arguments), Config, "test")


def test_flags_win_over_json_over_file_over_defaults(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("max_steps: 1\nname: file\noptimizer: {learning_rate: 0.5}\n")
    config = read("--config", str(file), "--config-json", '{"name": "json", "max_steps": 2}', "--max-steps", "3")
    assert (config.max_steps, config.name, config.optimizer.learning_rate) == (3, "json", 0.5)
    assert read() == Config()


def test_values_have_the_field_s_type() -> None:
    config = read(
        "--name", "12", "--target-modules", "[a, b]", "--optimizer.learning-rate", "2e-4", "--max-steps", "null"
    )
    assert config == Config(name="12", target_modules=["a", "b"], optimizer=Optimizer(learning_rate=2e-4))
    assert read("--tokens", "[a, '<b>']", "--kwargs", "{a: 1}") == Config(tokens=("a", "<b>"), kwargs={"a": 1})


def test_help_shows_every_field_with_its_text(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        read("--help")
    text = capsys.readouterr().out
    assert "--optimizer.learning-rate" in text
    assert "Peak value, 100 % of it. (default: 0.001)" in " ".join(text.split())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            "max_step: 3",
            r"unknown key 'max_step' \(allowed: kwargs, max_steps, name, optimizer, target_modules, tokens\)",
        ),
        ("optimizer: {lr: 1}", r"unknown key 'optimizer.lr' \(allowed: learning_rate\)"),
        ("optimizer: {learning_rate: -1}", r"'optimizer.learning_rate': .*greater than 0 \(found -1\)"),
        ("- a list", "holds a list; a mapping"),
        ("a: [", "while parsing"),
    ],
)
def test_bad_file_is_one_line_with_the_way_out(tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(content)
    with pytest.raises(UserError, match=message) as caught:
        read("--config", str(file))
    assert "\n" not in str(caught.value)


def test_missing_file_and_bad_json_are_named() -> None:
    with pytest.raises(UserError, match=r"config file /nowhere/c.yaml: No such file"):
        read("--config", "/nowhere/c.yaml")
    with pytest.raises(UserError, match="--config-json is not JSON"):
        read("--config-json", "{")
    with pytest.raises(UserError, match="--config-json: 'max_steps' is there twice"):
        read("--config-json", '{"max_steps": 2, "name": "a", "max_steps": 3}')
    with pytest.raises(UserError, match="--config-json is nested too deeply"):
        read("--config-json", "[" * 100_000)


def test_a_flag_s_mistake_is_not_blamed_on_the_file(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("max_steps: x\noptimizer: {learning_rate: 0.5}")
    found = ["--config", str(file), "--config-json", '{"target_modules": [1]}', "--optimizer.learning-rate", "-1"]
    with pytest.raises(UserError) as caught:
        read(*found)
    places = re.findall(r"(\S+): '([\w.]+)': Input", str(caught.value))
    assert places == [
        (str(file), "max_steps"), ("--config-json", "target_modules.0"),
        ("--optimizer.learning-rate", "optimizer.learning_rate"),
    ]  # fmt: skip


def test_mappings_merge_and_lists_are_replaced() -> None:
    assert merge_values({"a": {"b": 1, "c": [1]}}, {"a": {"c": [2]}}) == {"a": {"b": 1, "c": [2]}}


def test_json_may_come_in_base64_and_packed() -> None:
    values = {"name": "$$5 {{=1}} $(HOME)", "target_modules": [f"module_{number}" for number in range(500)]}
    text = base64.b64encode(json.dumps(pack_long(values)).encode()).decode()
    assert read("--config-json", f"base64:{text}").model_dump(exclude_unset=True) == values
