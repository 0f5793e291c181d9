"""JSON files as frozen records: a key is a field's name, and is written once, there."""

import json
import math
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from finemill.artifacts.manifest import DIGEST_MARK
from finemill.config import describe_validation_error
from finemill.errors import UserError


class Record(BaseModel):
    """What a step tells the steps after it; keys that a reader does not know are no error."""

    model_config = ConfigDict(frozen=True, extra="ignore", protected_namespaces=())


RecordT = TypeVar("RecordT", bound=Record)


def write_record(path: Path, record: Record) -> None:
    """JSON text, UTF-8, keys in the order of the fields."""
    write_json(path, record.model_dump(mode="json"))


def write_json(path: Path, value: object) -> None:
    """JSON text, UTF-8, indented; NaN and infinity, which JSON does not have, as null."""
    text = json.dumps(_without_nan(value), indent=2, ensure_ascii=False, allow_nan=False)
    path.write_text(text + "\n", encoding="utf-8")


def _without_nan(value: object) -> object:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    return [_without_nan(item) for item in value] if isinstance(value, list | tuple) else value


def read_record(path: Path, record_type: type[RecordT], writer: str) -> RecordT:
    """Parse a file.

    Args:
        writer: the step that writes such a file, for the message.
    Raises: UserError: there is no such file, or it is not such a record.
    """
    try:
        return record_type.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        raise UserError(f"{path} not found: {writer} writes it; pass the reference it printed") from None
    except ValidationError as error:
        raise UserError(
            f"{path} is not what this version of {writer} writes ({describe_validation_error(error, record_type)}): "
            f"run {writer} again"
        ) from None


def content_name(text: str) -> str:
    """`sha256:<digest>` for an artifact's reference, any other text as it is.

    Artifacts name each other so in their files: where one lies concerns only the machine that stored it, and a repeat
    in another store is to have the same bytes.
    """
    mark = text.rfind(DIGEST_MARK)
    return text[mark + 1 :] if mark >= 0 else text
