from pathlib import Path

import pytest
import yaml

from finemill.config import StepConfig, parse_config
from finemill.config_file import parse_yaml, read_mapping
from finemill.errors import UserError


class Config(StepConfig):
    seed: int = 0
    rate: float = 1.0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1", "c.yaml: while parsing a flow sequence"),
        ("seed: 2026-13-45", "c.yaml: not of the type timestamp .*line 1, column 7: seed: 2026-13-45"),
        ("a: 1\nseed: !!int x", "c.yaml: not of the type int .*line 2, column 7: seed: !!int x"),
        ('seed: !!int ""', "c.yaml: not of the type int"),
        ("seed: 0x_", "c.yaml: not of the type int"),
        ("a: [{seed: !!bool x}]", "c.yaml: not of the type bool .*line 1, column 12"),
        ("seed: !!timestamp x", "c.yaml: not of the type timestamp"),
        ("seed: !!python/object:os.system x", "c.yaml: could not determine a constructor"),
        (f"seed: {'9' * 5000}", "c.yaml: not of the type int"),
        (f"seed: {'[' * 900}{']' * 900}", "c.yaml: nested too deeply"),
        ("seed: 1\nrate: 2\nseed: 3\n", "c.yaml: 'seed' is there twice, in lines 1 and 3"),
        ("a: {b: 1, b: 2}", "'b' is there twice"),
        ("a: {b: [010]}", r"c.yaml: 'a.b': 010 in line 1 is octal or sexagesimal"),
        ("seed: 1:30", "'seed': 1:30 in line 1 is octal or sexagesimal"),
        ("rate: 190:20:30.15", "'rate': 190:20:30.15 in line 1 is octal or sexagesimal"),
        ("a: &a [*a]", "'a' holds itself"),
    ],
)
def test_what_is_no_yaml_is_one_line(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        parse_yaml(text, "c.yaml")
    assert "\n" not in str(error.value)


def test_anchors_may_be_merged_more_than_once() -> None:
    assert parse_yaml("a: &a {x: 1}\nb: {<<: *a, x: 2, <<: *a}", "c.yaml")["b"] == {"x": 2}


def test_what_anchors_expand_to_is_never_written_out() -> None:
    lines = ['a0: &a0 ["x","x","x","x","x","x","x","x","x"]']
    lines += [f"a{level}: &a{level} [{','.join([f'*a{level - 1}'] * 9)}]" for level in range(1, 9)]
    with pytest.raises(UserError, match="'seed': Input should be a valid integer") as error:
        parse_config(Config, {"seed": parse_yaml("\n".join(lines[:5]), "c.yaml")["a4"]}, "c.yaml")
    assert len(str(error.value)) < 400
    with pytest.raises(UserError, match="stands for more than 1000000 values"):
        parse_yaml("\n".join(lines), "c.yaml")


@pytest.mark.parametrize("text", ["a: 0", "a: 0.5", "a: '010'", 'a: "1:30"', "a: 1e3", "a: 0x10", "a: 10:30 o'clock"])
def test_other_numbers_and_quoted_texts_are_read(text: str) -> None:
    assert parse_yaml(text, "c.yaml") == yaml.safe_load(text)


@pytest.mark.parametrize("text", ["rate: .inf", "rate: .nan"])
def test_settings_are_finite(text: str) -> None:
    with pytest.raises(UserError, match="'rate': Input should be a finite number"):
        parse_config(Config, parse_yaml(text, "c.yaml"), "c.yaml")


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"- 1", "holds a list; a mapping"), (b"a: \xff", "not UTF-8 at byte 3"), (None, "No such file or directory")],
)
def test_a_file_without_a_mapping_is_named(content: bytes | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=rf"^config file .*c\.yaml.* {message}"):
        read_mapping(path, "config file")


def test_files_are_utf_8_and_may_be_empty(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_bytes("\ufeffname: Straße\n".encode())
    assert read_mapping(path, "config file") == {"name": "Straße"}
    path.write_text("# nothing\n")
    assert read_mapping(path, "config file") == {}
