"""Credentials from the environment: as they were meant, and never in a text that is shown or kept."""

import os
import re
from collections.abc import MutableMapping
from urllib.parse import quote

from finemill.errors import UserError

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
)
_PREFIXES = ("", "FINEMILL_")
"""Before the variables' names; the second in a pod of KFP."""
_SHOWN = frozenset({"MLFLOW_TRACKING_USERNAME"})
_SHORTEST = 6
"""Length in characters of the shortest value that is looked for in texts: a shorter one is part of any word."""
_SHORTEST_KEY_ID = 16
"""The same of an access key's id, which on a server of one's own is a user's name, `minio` or the bucket's."""
# `user:password@` in a URI; the password may hold `/` and `@`, where what follows the colon is no port.
_USER = re.compile(r"(?<=://)(?:[^/\s]*@|[^/\s@:]+:(?!\d+/)[^\s@]*@)")
_QUERY = re.compile(
    r"([?&;][\w.%-]*(?:sig|signature|token|secret|password|passwd|pwd|apikey|api_key|accesskeyid|credential)=)"
    r"[^&;\s'\"<>]+",
    re.IGNORECASE,
)
_HEADER = re.compile(r"(Invalid header value )b?(['\"]).*?\2")


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
    """The name of a variable whose secret value a text holds."""
    for prefix in _PREFIXES:
        for name in _VARIABLES:
            value = os.environ.get(prefix + name, "").strip()
            if _is_secret(name, value) and value in text:
                return prefix + name
    return None


def without_credentials(text: str) -> str:
    """The text without the values of credentials in the environment, and without those inside of URIs."""
    for prefix in _PREFIXES:
        for name in _VARIABLES:
            value = os.environ.get(prefix + name, "").strip()
            if _is_secret(name, value):
                for spelling in {value, quote(value, safe=""), quote(value), repr(value)[1:-1]}:
                    text = text.replace(spelling, "***")
    return _HEADER.sub(r"\1***", _QUERY.sub(r"\1***", _USER.sub("", text)))
