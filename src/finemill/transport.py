"""Texts and values in a form that nothing changes on their way into a pod.

Kubernetes expands `$(NAME)` and `$$` in a container's arguments, Argo and KFP evaluate `{{...}}` wherever it stands,
KFP's parameters know neither null nor whole numbers beyond 2^53, and Linux takes no argument of 128 KiB.
"""

import base64
import json
import zlib
from collections.abc import Mapping
from typing import Any

from finemill.errors import UserError

TEXT_MARK = "base64:"
"""Begins a text in base64."""
_VALUE_MARK = "packed:"
"""Begins a value as JSON, compressed, in base64."""
_LONG = 2000
"""Length in characters of its JSON from which on a value is packed."""
_MAX_UNPACKED = 2**26
"""Bytes that a packed value may have."""
_MAX_EXACT = 2**53
"""Magnitude up to which a float holds every whole number: KFP's numbers are floats."""


def decode_text(text: str) -> str:
    """The text behind `base64:...`; any other as it is. Raises: UserError: that is no base64 of UTF-8."""
    if not text.startswith(TEXT_MARK):
        return text
    try:
        return base64.b64decode(text.removeprefix(TEXT_MARK), validate=True).decode()
    except ValueError:
        raise UserError(f"'{text[:40]}' is not UTF-8 in base64, which {TEXT_MARK} announces") from None


def pack_long(section: Mapping[str, Any]) -> dict[str, Any]:
    """A section in which every field that is long is packed."""
    return {name: _pack(value) if _is_long(value) else value for name, value in section.items()}


def pack_for_kfp(value: Any) -> Any:
    """A parameter's value, of a section each field, packed where KFP or the kubelet would change it, or it is long."""
    if isinstance(value, Mapping):
        return {name: _pack(item) if _is_long(item) or _is_changed(item) else item for name, item in value.items()}
    return _pack(value) if _is_changed(value) else value


def is_packed(value: str) -> bool:
    """Whether a text is a packed value."""
    return value.startswith(_VALUE_MARK)


def unpack(value: Any) -> Any:
    """The same with everything packed in it as it was. Raises: UserError: what is packed cannot be read."""
    if isinstance(value, Mapping):
        return {name: unpack(item) for name, item in value.items()}
    if isinstance(value, str) and is_packed(value):
        return _unpack(value)
    return value


def _pack(value: Any) -> str:
    data = zlib.compress(json.dumps(value).encode(), 9)
    return _VALUE_MARK + base64.b64encode(data).decode()


def _unpack(text: str) -> Any:
    try:
        data = zlib.decompressobj()
        unpacked = data.decompress(base64.b64decode(text.removeprefix(_VALUE_MARK), validate=True), _MAX_UNPACKED)
        if not data.eof:
            raise ValueError("not whole, or too large")
        return json.loads(unpacked)
    except (ValueError, RecursionError, zlib.error):
        raise UserError(f"'{text[:40]}' cannot be unpacked: give the value itself, as JSON") from None


def _is_long(value: Any) -> bool:
    # A text that looks packed is packed itself, or it would be unpacked.
    is_marked = isinstance(value, str) and is_packed(value)
    return is_marked or len(json.dumps(value)) > _LONG


def _is_changed(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(_is_changed(key) or _is_changed(item) for key, item in value.items())
    if isinstance(value, list | tuple):
        return any(map(_is_changed, value))
    if isinstance(value, str):
        return "$" in value or "{{" in value or value.startswith((_VALUE_MARK, TEXT_MARK))
    return value is None or (isinstance(value, int) and abs(value) > _MAX_EXACT)
