"""Make the previous champion champion again."""

from dataclasses import dataclass
from datetime import UTC, datetime

from finemill.components.promote.config import RollbackConfig
from finemill.errors import UserError
from finemill.registry.snapshot import (
    CHAMPION,
    PREVIOUS_CHAMPION,
    ROLLED_BACK_TAG,
    RegisteredModel,
    locked,
    read_registered_model,
)
from finemill.tracking.describe import without_credentials
from finemill.tracking.server import open_client, readable_errors


@dataclass(frozen=True)
class Rollback:
    """The version that is champion now, and the one that no longer is."""

    registered_model_name: str
    champion: int
    rolled_back: int


def rollback(config: RollbackConfig, uri: str) -> Rollback:
    """Give the alias `champion` back to `previous_champion` in the registry at `uri`, and mark the version that had it.

    There is one step back: the previous champion's own predecessor is not remembered, `promote` decides from there.
    A version that was rolled back is not promoted again.
    Raises: UserError: there is no champion, or none before it.
    """
    name = config.registered_model_name
    client = open_client(uri)
    with readable_errors(uri), locked(client, _read(uri, name), None):
        model = _read(uri, name)
        champion, previous = model.aliases.get(CHAMPION), model.aliases.get(PREVIOUS_CHAMPION)
        if champion is None:
            raise UserError(f"rollback: '{name}' has no champion; `finemill promote` makes a version champion")
        if previous is None or previous == champion:
            raise UserError(f"rollback: '{name}' has no previous champion: version {champion} stays champion")
        now = datetime.now(UTC).isoformat(timespec="seconds")
        client.set_model_version_tag(name, str(champion), ROLLED_BACK_TAG, now)
        client.set_registered_model_alias(name, CHAMPION, str(previous))
        client.delete_registered_model_alias(name, PREVIOUS_CHAMPION)
    return Rollback(name, champion=previous, rolled_back=champion)


def _read(uri: str, name: str) -> RegisteredModel:
    model = read_registered_model(uri, name)
    if model is None:
        raise UserError(f"rollback: the registry at {without_credentials(uri)} has no model '{name}'")
    return model
