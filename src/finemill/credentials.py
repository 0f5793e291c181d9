"""Credentials from the environment: as they were meant, and never in a text that is shown or kept."""

import json
import os
import re
from base64 import b64encode
from collections.abc import Iterator, MutableMapping
from html import escape
from urllib.parse import quote, quote_plus

from finemill.errors import UserError
from finemill.redaction import without_secret_forms

_VARIABLES = (
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "MLFLOW_TRACKING_USERNAME",
    "MLFLOW_TRACKING_PASSWORD",
    "MLFLOW_TRACKING_TOKEN",
    "DATABRICKS_TOKEN",
    "HF_TOKEN",
    "HUGGING_FACE_HUB_TOKEN",
    "OPENAI_API_KEY",
    "WANDB_API_KEY",
    "FINEMILL_WEBHOOK_SECRET",
)
SECRET_VARIABLES = frozenset(_VARIABLES) - {"AWS_ACCESS_KEY_ID", "MLFLOW_TRACKING_USERNAME"}
"""Names of those that nobody may read."""
_PREFIXES = ("", "FINEMILL_")
"""Before the variables' names; the second in a pod of KFP."""
_SHOWN = frozenset({"MLFLOW_TRACKING_USERNAME"})
_SHORTEST = 6
"""Length in characters of the shortest value that is looked for in texts: a shorter one is part of any word."""
_SHORTEST_KEY_ID = 16
"""The same of an access key's id, which on a server of one's own is a user's name, `minio` or the bucket's."""
_SHORTEST_PART = 10
"""Length in characters of the shortest beginning of a secret that is looked for."""
_SECRET_NAME = re.compile(
    r"(SECRET|TOKEN|PASSWORD|PASSWD|CONNECTION_STRING|(API|ACCESS|ACCOUNT|PRIVATE|SECRET|STORAGE)_?KEY)$", re.IGNORECASE
)
"""Names of other variables that hold a secret, those that a cluster's `secret_env` adds among them."""
_SHORTEST_OF_OTHERS = 12
"""Length in characters of the shortest of their values that is looked for: `password` is a word, too."""


def clean_credentials(environment: MutableMapping[str, str] = os.environ) -> None:
    """Cut off the line break that ends a secret made of a file.

    Raises: UserError: white space is inside of one; the variable is named.
    """
    for name in (prefix + variable for prefix in _PREFIXES for variable in _VARIABLES):
        value = environment.get(name, "")
        if value != value.strip():
            environment[name] = value.strip()
        if re.search(r"[\x00-\x1f\x7f]", value.strip()):
            raise UserError(f"{name} holds a line break or another control character: set it to the credential alone")


def _is_secret(name: str, value: str) -> bool:
    """Whether the value of a variable is looked for in texts."""
    shortest = _SHORTEST_KEY_ID if name == "AWS_ACCESS_KEY_ID" else _SHORTEST
    return len(value) >= shortest and name not in _SHOWN


def credential_in(text: str) -> str | None:
    """The name of a variable of the services that finemill speaks to whose secret value a text holds."""
    return next((name for name, value in _known_secrets() if value in text), None)


def without_credentials(text: str) -> str:
    """The text without the values of credentials in the environment, and without what has a secret's form."""
    for _, value in (*_known_secrets(), *_other_secrets()):
        for spelling in _spellings(value):
            text = text.replace(spelling, "***")
        text = _without_beginning(text, value)
    return without_secret_forms(text)


def _spellings(value: str) -> set[str]:
    """A secret as libraries write it into addresses, JSON, pages, Python's texts and headers, the longest first."""
    quoted = (quote(value, safe=""), quote(value), quote_plus(value))
    lower = (re.sub("%[0-9A-F]{2}", lambda found: found[0].lower(), text) for text in quoted)
    as_json = (json.dumps(value)[1:-1], json.dumps(value, ensure_ascii=False)[1:-1])
    as_python = (repr(value)[1:-1], repr(value.encode())[2:-1])
    user = os.environ.get("MLFLOW_TRACKING_USERNAME", "")
    header = b64encode(f"{user}:{value}".encode()).decode()
    return {value, *quoted, *lower, *as_json, *as_python, escape(value), escape(value, quote=False), header}


def _without_beginning(text: str, value: str) -> str:
    """The text without what is left of a secret where somebody has cut the text."""
    for length in range(len(value) - 1, _SHORTEST_PART - 1, -1):
        if value[:_SHORTEST_PART] not in text:
            break
        text = text.replace(value[:length], "***")
    return text


def _known_secrets() -> Iterator[tuple[str, str]]:
    for name, variable in ((prefix + variable, variable) for prefix in _PREFIXES for variable in _VARIABLES):
        value = os.environ.get(name, "").strip()
        if _is_secret(variable, value):
            yield name, value


def _other_secrets() -> Iterator[tuple[str, str]]:
    """A folder's or file's name is none: `..._TOKEN` may say where the token lies."""
    for name, value in os.environ.items():
        is_looked_for = len(value.strip()) >= _SHORTEST_OF_OTHERS and not value.startswith("/")
        if name not in _VARIABLES and _SECRET_NAME.search(name) and is_looked_for:
            yield name, value.strip()
