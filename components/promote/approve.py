"""A person's word on a version, and what else people do to a registry by hand: who, when and why."""

import getpass
from collections.abc import Mapping
from datetime import UTC, datetime

from finemill.components.promote.config import ApproveConfig
from finemill.credentials import without_credentials
from finemill.errors import UserError
from finemill.registry.snapshot import (
    APPROVED_TAG,
    BY,
    WHY,
    RegisteredModel,
    Version,
    read_registered_model,
)
from finemill.tracking.server import open_client, readable_errors


def approve(config: ApproveConfig, uri: str) -> str:
    """Mark a version in the registry at `uri` as approved.

    Returns: by whom. Raises: UserError: there is no such version.
    """
    model = read_model("approve", uri, config.registered_model_name)
    if config.version not in model.versions:
        there = ", ".join(map(str, sorted(model.versions))) or "none"
        raise UserError(f"approve: '{model.name}' has no version {config.version}; its versions are {there}")
    tags = signed(APPROVED_TAG, config.by, config.why)
    client = open_client(uri)
    with readable_errors(uri):
        for key, value in tags.items():
            client.set_model_version_tag(model.name, str(config.version), key, value)
    return tags[APPROVED_TAG + BY]


def signed(tag: str, by: str | None, why: str | None) -> dict[str, str]:
    """The tags that say when, by whom and why something was done; by this machine's user if nobody is named."""
    reason = {tag + WHY: _one_line(why)} if why else {}
    # The tag that counts comes last: a crash before it leaves nothing half done.
    return {tag + BY: _one_line(by or _user()), **reason, tag: datetime.now(UTC).isoformat(timespec="seconds")}


def signature(version: Version, tag: str) -> str | None:
    """When, by whom and why, as one phrase; None if it was not done."""
    when = version.tags.get(tag)
    return _one_line(f"on {when}{_who_and_why(version.tags, tag)}") if when else None


def read_model(command: str, uri: str, name: str) -> RegisteredModel:
    """Raises: UserError: the registry has no such model."""
    model = read_registered_model(uri, name)
    if model is None:
        raise UserError(f"{command}: the registry at {without_credentials(uri)} has no model '{name}'")
    return model


def _who_and_why(tags: Mapping[str, str], tag: str) -> str:
    by, why = tags.get(tag + BY), tags.get(tag + WHY)
    return (f" by {by}" if by else "") + (f": {why}" if why else "")


def _one_line(text: str) -> str:
    """`text` without line breaks and control characters, which PostgreSQL does not take and a table does not show."""
    return " ".join("".join(character if character.isprintable() else " " for character in text).split())


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return "unknown"
