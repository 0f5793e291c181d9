"""Make the previous champion champion again."""

from dataclasses import dataclass

from finemill.components.promote.approve import read_model, signed
from finemill.components.promote.config import RollbackConfig
from finemill.errors import UserError
from finemill.registry.snapshot import CHAMPION, PREVIOUS_CHAMPION, ROLLED_BACK_TAG, locked
from finemill.registry.webhook import send_champion
from finemill.tracking.server import open_client, readable_errors


@dataclass(frozen=True)
class Rollback:
    """The version that is champion now, and the one that no longer is; None if that was deleted."""

    registered_model_name: str
    champion: int
    rolled_back: int | None


def rollback(config: RollbackConfig, uri: str) -> Rollback:
    """Give the alias `champion` back to `previous_champion` in the registry at `uri`, and mark the version that had it.

    There is one step back: the previous champion's own predecessor is not remembered, `promote` decides from there.
    A version that was rolled back is not promoted again.
    Raises: UserError: there is no champion, or none before it.
    """
    name = config.registered_model_name
    client = open_client(uri)
    with readable_errors(uri), locked(client, read_model("rollback", uri, name), None):
        model = read_model("rollback", uri, name)
        champion, previous = model.aliases.get(CHAMPION), model.aliases.get(PREVIOUS_CHAMPION)
        if champion is None and previous is None:
            raise UserError(f"rollback: '{name}' has no champion; `finemill promote` makes a version champion")
        if previous is None or previous == champion:
            raise UserError(f"rollback: '{name}' has no previous champion: version {champion} stays champion")
        if champion is not None:
            for key, value in signed(ROLLED_BACK_TAG, config.by, config.why).items():
                client.set_model_version_tag(name, str(champion), key, value)
        client.set_registered_model_alias(name, CHAMPION, str(previous))
        client.delete_registered_model_alias(name, PREVIOUS_CHAMPION)
    if config.webhook_url:
        send_champion(config.webhook_url, name, previous, CHAMPION, model.versions[previous].artifacts)
    return Rollback(name, champion=previous, rolled_back=champion)
