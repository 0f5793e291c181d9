"""YAML as people write it in configuration files: every mistake in it is one line."""

from pathlib import Path
from typing import Any

import yaml

from finemill.errors import UserError


class _Loader(yaml.SafeLoader):
    """Refuses a key that is there twice, of which plain YAML would take the last without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: dict[str, int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if key.tag != "tag:yaml.org,2002:merge" and isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise ValueError(f"'{key.value}' is there twice, in lines {seen[key.value]} and {line}")
                seen[key.value] = line
        return super().construct_mapping(node, deep)


def parse_yaml(text: str, where: str) -> Any:
    """The value that `text` stands for. Raises: UserError: it stands for none; `where` begins the line."""
    try:
        return yaml.load(text, Loader=_Loader)
    except RecursionError:
        raise UserError(f"{where}: nested too deeply") from None
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"{where}: {' '.join(str(error).split())}") from None
    except Exception:  # what Python's types raise at `!!bool x` and the like
        raise UserError(f"{where}: a value that its tag (!!) does not allow") from None


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
