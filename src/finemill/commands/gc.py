"""`finemill gc`: delete old artifacts that no registered version was made from."""

import argparse
from datetime import timedelta
from typing import TYPE_CHECKING

from finemill.commands.parser import CommandParser
from finemill.commands.run import local_tracking_uri
from finemill.errors import UserError
from finemill.storage.base import normalize_uri
from finemill.storage.store import delete_artifact
from finemill.tracking.server import sqlite_path
from finemill.tracking.settings import TRACKING_VARIABLE, Tracking

if TYPE_CHECKING:
    from finemill.artifacts.manifest import Reference
    from finemill.registry.garbage import StoredArtifact

_GIB = 2**30
_MOST_DAYS = 36_500


def execute(name: str, arguments: list[str]) -> int:
    """Find garbage and delete it, a line each. Returns: the exit code."""
    parsed = _parser().parse_args(arguments)
    if not 1 <= parsed.older_than_days <= _MOST_DAYS:
        raise UserError(f"--older-than-days {parsed.older_than_days}: give 1, as a run may take a day, to {_MOST_DAYS}")
    store = normalize_uri(parsed.store)
    older_than = timedelta(days=parsed.older_than_days)
    from finemill.registry.garbage import find_garbage, find_leftovers
    from finemill.registry.snapshot import registered_artifacts

    leftovers = find_leftovers(store, older_than)
    _delete(leftovers, parsed.dry_run)
    registered = registered_artifacts(_registry(store))
    garbage = find_garbage(store, registered, older_than, in_use=_in_use(store))
    _delete(garbage, parsed.dry_run)
    size = sum(artifact.size_bytes for artifact in leftovers + garbage) / _GIB
    done = "would be" if parsed.dry_run else "are"
    print(f"{len(leftovers) + len(garbage)} artifacts, {size:.3f} GiB, {done} deleted")
    return 0


def _delete(artifacts: "list[StoredArtifact]", dry_run: bool) -> None:
    for artifact in artifacts:
        state = "" if artifact.complete else "  (unfinished)"
        print(f"{artifact.modified:%Y-%m-%d} {artifact.size_bytes / _GIB:9.3f} GiB  {artifact.uri}{state}")
        if not dry_run:
            delete_artifact(artifact.uri)


def _in_use(store: str) -> "list[Reference]":
    """What running steps were given, as far as they are recorded."""
    tracking = Tracking.of_environment()
    uri = tracking.uri or (None if tracking.registry_uri else _registry(store))
    from finemill.tracking.running import inputs_of_running_steps

    return inputs_of_running_steps(uri) if uri else []


def _registry(store: str) -> str:
    """Where the registry is: what the environment says, or where `finemill run` keeps that of a folder store.

    Raises: UserError: it is nowhere. An empty one is not made, as anything may be deleted that no registry names.
    """
    tracking = Tracking.of_environment()
    if tracking.uri or tracking.registry_uri or not store.startswith("file:"):
        return tracking.registry
    uri = local_tracking_uri(store)
    path = sqlite_path(uri)
    if path is None or not path.is_file():
        raise UserError(
            f"{TRACKING_VARIABLE} is not set, and there is no registry in {path}: set it to where the versions of this "
            "store are registered, as what no registry names may be deleted"
        )
    return uri


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        prog="finemill gc",
        description="Delete artifacts that are old and that no registered version is or was made from. "
        f"{TRACKING_VARIABLE} says where the registry is.",
        allow_abbrev=False,
    )
    parser.add_argument("--store", default="finemill-store", metavar="URI", help="default: %(default)s")
    parser.add_argument(
        "--older-than-days",
        type=float,
        default=30.0,
        metavar="N",
        help="keep what was written in the N days before the store's newest artifact, or since (default: %(default)g)",
    )
    parser.add_argument("--dry-run", action="store_true", help="list, delete nothing")
    return parser
