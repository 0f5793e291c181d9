"""YAML as people write it in configuration files: every mistake in it is one line."""

import re
from pathlib import Path
from typing import Any

import yaml

from finemill.errors import UserError

_MAX_NODES = 10**6
"""Values and keys that a file may stand for, aliases counted wherever they are."""
_MISREAD = re.compile(r"[-+]?(0[0-7_]+|[0-9][0-9_]*(:[0-5]?[0-9])+(\.[0-9_]*)?)")
"""Pattern of numbers that YAML 1.1 reads otherwise than people: octal 010 is 8, sexagesimal 1:30 is 90."""
_NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")


def parse_yaml(text: str, where: str) -> Any:
    """The value that `text` stands for. Raises: UserError: it stands for none; `where` begins the line."""
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _check(node, "", {})
        return loader.construct_document(node)
    except RecursionError:
        raise UserError(f"{where}: nested too deeply") from None
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"{where}: {' '.join(str(error).split())}") from None


class _Loader(yaml.SafeLoader):
    """Says where a value stands that is not of its type: Python's types raise what they like at `!!bool x`."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (yaml.YAMLError, RecursionError):
            raise
        except Exception:
            kind = node.tag.rpartition(":")[2]
            raise yaml.constructor.ConstructorError(None, None, f"not of the type {kind}", node.start_mark) from None


def _check(node: yaml.Node, path: str, sizes: dict[int, int]) -> int:
    """Look for what plain YAML reads in a way that nobody means, below a node.

    Args:
        path: the keys that lead to it.
        sizes: of every node that was looked at, what it stands for, in values and keys; 0 while it is looked at.
    Returns: what it stands for, in values and keys.
    Raises: ValueError: a key is there twice, a number is in another base, or it stands for too much.
    """
    size = sizes.get(id(node))
    if size == 0:
        raise ValueError(f"'{path}' holds itself (line {node.start_mark.line + 1})")
    if size is None:
        sizes[id(node)] = 0
        size = 1 + sum(_check(child, name, sizes) for child, name in _children(node, path))
        if isinstance(node, yaml.ScalarNode):
            _check_number(node, path)
        if size > _MAX_NODES:
            raise ValueError(f"'{path}' stands for more than {_MAX_NODES} values: write fewer aliases (*)")
        sizes[id(node)] = size
    return size


def _children(node: yaml.Node, path: str) -> list[tuple[yaml.Node, str]]:
    if isinstance(node, yaml.SequenceNode):
        return [(child, path) for child in node.value]
    if not isinstance(node, yaml.MappingNode):
        return []
    seen: dict[str, int] = {}
    for key, _ in node.value:
        line = key.start_mark.line + 1
        if key.tag != "tag:yaml.org,2002:merge" and isinstance(key, yaml.ScalarNode):
            if key.value in seen:
                raise ValueError(f"'{key.value}' is there twice, in lines {seen[key.value]} and {line}")
            seen[key.value] = line
    return [(value, f"{path}.{key.value}".lstrip(".")) for key, value in node.value]


def _check_number(node: yaml.ScalarNode, path: str) -> None:
    if node.style is None and node.tag in _NUMBERS and _MISREAD.fullmatch(node.value):
        raise ValueError(
            f"'{path}': {node.value} in line {node.start_mark.line + 1} is octal or sexagesimal in YAML: write a "
            "number without leading zeros and colons, or quote a text"
        )


def read_mapping(path: Path, what: str) -> dict[str, Any]:
    """The mapping in a YAML file; an empty file is an empty one.

    Raises: UserError: no such file, or something else in it; the line begins with `what` the file is.
    """
    where = f"{what} {path}"
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"{where}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not UTF-8 at byte {error.start}") from None
    loaded = parse_yaml(text, where)
    if loaded is None:
        return {}
    if not isinstance(loaded, dict):
        raise UserError(f"{where} holds a {type(loaded).__name__}; a mapping of fields to values is needed")
    return loaded
