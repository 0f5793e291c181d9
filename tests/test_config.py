import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

import pytest
from pydantic import Field, field_validator, model_validator

from finemill.config import Input, StepConfig, parse_config
from finemill.errors import UserError


class Layer(StepConfig):
    rank: int = 1


class Config(StepConfig):
    low: int = 0
    high: int = 9
    layer: Layer = Layer()

    @field_validator("low")
    @classmethod
    def _is_even(cls, value: int) -> int:
        if value % 2:
            raise ValueError("low is odd: give an even number")
        return value

    @model_validator(mode="after")
    def _has_order(self) -> Self:
        if self.low > self.high:
            raise ValueError("low is above high: lower it")
        return self


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({"layer": {"rang": 1}}, "c.yaml: unknown key 'layer.rang' (allowed: rank)"),
        (
            {"high": "x"},
            "c.yaml: 'high': Input should be a valid integer, unable to parse string as an integer (found 'x')",
        ),
        ({"low": 1}, "c.yaml: 'low': low is odd: give an even number"),
        ({"low": 12}, "c.yaml: low is above high: lower it"),
        (
            {"low": 1, "size": 1},
            "c.yaml: 'low': low is odd: give an even number; unknown key 'size' (allowed: high, layer, low)",
        ),
        ({"a": 1, "b": 1}, "c.yaml: unknown key 'a' (allowed: high, layer, low); unknown key 'b'"),
    ],
)
def test_every_problem_is_named_with_key_value_and_way_out(values: dict[str, object], line: str) -> None:
    with pytest.raises(UserError) as error:
        parse_config(Config, values, "c.yaml")
    assert str(error.value) == line


class Numbers(StepConfig):
    rank: int = 1
    rate: float | None = None
    sizes: tuple[int, ...] = ()
    gates: dict[str, float] | None = None
    steps: Annotated[int, Field(gt=0)] | Literal["auto"] = "auto"
    verbose: bool | int = False
    layer: Layer | None = None


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"rank": True}, "rank"),
        ({"rate": False}, "rate"),
        ({"sizes": [1, True]}, "sizes"),
        ({"gates": {"kl": True}}, "gates"),
        ({"steps": True}, "steps"),
        ({"layer": {"rank": True}}, "layer.rank"),
    ],
)
def test_yes_and_no_are_no_numbers(values: dict[str, object], key: str) -> None:
    with pytest.raises(UserError, match=f"'{key}': true, false, yes, no, on and off are no number"):
        parse_config(Numbers, values, "c.yaml")
    assert parse_config(Numbers, {"verbose": True, "rank": 2}, "c.yaml").verbose is True


@pytest.mark.parametrize("values", [{"rank": 10**30}, {"layer": {"rank": -(2**63) - 1}}, {"sizes": [1, 2**63]}])
def test_whole_numbers_beyond_64_bits_are_refused(values: dict[str, object]) -> None:
    with pytest.raises(UserError, match="a whole number beyond 9223372036854775807: give a smaller one"):
        parse_config(Numbers, values, "c.yaml")


class Size(StepConfig):
    cpu: str = "1"


class Nested(StepConfig):
    register_: Size = Field(default_factory=Size, alias="register")
    sizes: Mapping[str, Size] = Field(default_factory=dict)
    items: tuple[Size, ...] = ()
    maybe: Size | None = None


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"registr": {}}, "unknown key 'registr' (allowed: items, maybe, register, sizes)"),
        ({"register": {"cpus": 1}}, "unknown key 'register.cpus' (allowed: cpu)"),
        ({"sizes": {"small": {"cpus": 1}}}, "unknown key 'sizes.small.cpus' (allowed: cpu)"),
        ({"items": [{"cpus": 1}]}, "unknown key 'items.0.cpus' (allowed: cpu)"),
        ({"maybe": {"cpus": 1}}, "unknown key 'maybe.cpus' (allowed: cpu)"),
    ],
)
def test_an_unknown_key_is_named_with_those_that_a_file_may_have_there(values: Any, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        parse_config(Nested, values, "my.yaml")


@pytest.mark.parametrize(
    ("text", "message"),
    [("", "names nothing"), ("  ", "names nothing"), (" hf://o/n", "blanks"), ("a\nb", "a line break")],
)
def test_what_a_run_is_given_by_name_has_one(text: str, message: str) -> None:
    class Run(StepConfig):
        base_model: Input

    with pytest.raises(UserError, match=f"'base_model': .*{message}"):
        parse_config(Run, {"base_model": text}, "run.yaml")
