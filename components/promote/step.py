"""Compare a registered version with the champion, and make it champion if every gate passes."""

from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from finemill.artifacts.decision import Decision, write_decision
from finemill.artifacts.files import DECISION_TEXT
from finemill.artifacts.manifest import Reference
from finemill.artifacts.version import VersionRecord, read_version
from finemill.components.promote.approve import signature
from finemill.components.promote.config import PromoteConfig
from finemill.components.promote.decision import markdown, summarize
from finemill.components.promote.gates import check_gates
from finemill.components.promote.scores import Scores
from finemill.errors import GateFailedError, TemporaryError, UserError
from finemill.registry.champion import comparable_evaluation
from finemill.registry.snapshot import (
    APPROVED_TAG,
    CHALLENGER,
    CHAMPION,
    COMPARED_TAG,
    DECISION_TAG,
    DIGEST_TAG,
    PREVIOUS_CHAMPION,
    ROLLED_BACK_TAG,
    RegisteredModel,
    Version,
    locked,
    read_registered_model,
    registry_state_of,
)
from finemill.registry.webhook import send_champion
from finemill.runtime.context import StepContext
from finemill.storage.store import fetch_artifact
from finemill.tracking.server import open_client, readable_errors
from finemill.tracking.settings import Tracking

if TYPE_CHECKING:
    from mlflow import MlflowClient

_NONE = "none"


def champion_state(inputs: Mapping[str, str], config: PromoteConfig, tracking: Tracking) -> dict[str, str]:
    """The champion that the version is compared with, and whether the version was rolled back, or approved.

    The same before and after the version has become champion itself, and another one when the champion has changed.
    """
    record = read_version(fetch_artifact(Reference.parse(inputs["version"]))[0])
    model, version = _find(record, tracking.registry)
    state = {
        "registered_model": registry_state_of(model),
        "champion": _compared_with(model, version),
        "rolled_back": version.tags.get(ROLLED_BACK_TAG, ""),
    }
    return state | ({"approved": version.tags.get(APPROVED_TAG, "")} if config.require_approval else {})


def run(
    *, version: Path, evaluation: Path, output_dir: Path, config: PromoteConfig, context: StepContext
) -> dict[str, float]:
    """Decide, move the aliases under the registry's lock, and write the decision.

    Raises: UserError: the version is not in the registry, or the champion cannot be scored. TemporaryError: the
        champion changed meanwhile. GateFailedError: not promoted, and `strict` is set.
    """
    model, challenger = _find(read_version(version), context.tracking.registry)
    registered = challenger.artifact("evaluation")
    if registered is None or registered.digest != Reference.parse(context.references["evaluation"]).digest:
        raise UserError(
            f"promote: {model.name} version {challenger.number} was registered with another evaluation than "
            f"{context.references['evaluation']}: pass the one that register got"
        )
    expected = _compared_with(model, challenger)
    # The decision is kept under a key that names the champion of when the step began.
    bound_to = context.state.get("champion", expected)
    if expected != bound_to:
        raise TemporaryError(
            f"promote: the champion of {model.name} changed from version {bound_to} to {expected} meanwhile: try again"
        )
    decision = _decide(model, challenger, expected, Scores(evaluation), config, context)
    client = open_client(model.registry_uri)
    with readable_errors(model.registry_uri), locked(client, model, context.store):
        apply_decision(client, model.registry_uri, decision, expected)
    if decision.promoted and config.webhook_url:
        send_champion(config.webhook_url, model.name, challenger.number, CHAMPION, challenger.artifacts)
    context.recorder.log_progress(f"{model.name} version {challenger.number}: {decision.summary}")
    if config.strict and not decision.promoted:
        raise GateFailedError(f"{model.name} version {challenger.number} {decision.summary}")
    write_decision(output_dir, decision)
    (output_dir / DECISION_TEXT).write_text(markdown(decision), encoding="utf-8")
    return {"promote/promotion_passed": float(decision.promoted), "promote/version": float(challenger.number)}


def _decide(
    model: RegisteredModel,
    challenger: Version,
    expected: str,
    scores: Scores,
    config: PromoteConfig,
    context: StepContext,
) -> Decision:
    champion = model.versions.get(int(expected)) if expected != _NONE else None
    champion_evaluation: Reference | None = None
    theirs: Scores | None = None
    if champion is not None:
        champion_evaluation = comparable_evaluation(model, champion, context.manifests["evaluation"], context)
        theirs = Scores(fetch_artifact(champion_evaluation)[0])
    gates = check_gates(scores, theirs, config)
    refusal = _refusal(challenger, config)
    summary = summarize(gates, champion.number if champion else None, refusal)
    promoted = refusal is None and all(gate.passed for gate in gates)
    if not promoted and model.aliases.get(CHAMPION) == challenger.number:
        summary += "; it stays champion until `finemill rollback` or another version is promoted"
    return Decision(
        registered_model_name=model.name,
        version=challenger.number,
        champion_before=champion.number if champion else None,
        promoted=promoted,
        summary=summary,
        confidence=config.confidence,
        gates=tuple(gates),
        evaluation=context.references["evaluation"],
        champion_evaluation=str(champion_evaluation) if champion_evaluation else None,
        approved=signature(challenger, APPROVED_TAG),
        decided=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def _refusal(challenger: Version, config: PromoteConfig) -> str | None:
    """Why the version is not promoted whatever its scores; None if nothing speaks against it."""
    rolled_back = signature(challenger, ROLLED_BACK_TAG)
    if rolled_back:
        return f"it was champion and was rolled back {rolled_back}"
    if config.require_approval and not signature(challenger, APPROVED_TAG):
        return f"it waits for approval: finemill approve {challenger.number} --by NAME --why REASON, then promote again"
    return None


def apply_decision(client: "MlflowClient", uri: str, decision: Decision, expected: str) -> None:
    """Record the decision and move the aliases, in an order that a crash at any point leaves to be repeated.

    The champion moves last: until then it is the old one, and `previous_champion` names it too, which is no rollback.
    """
    name, number = decision.registered_model_name, str(decision.version)
    _check_champion(uri, name, decision.version, expected)
    client.set_model_version_tag(name, number, DECISION_TAG, decision.summary)
    if not decision.promoted:
        return
    client.set_model_version_tag(name, number, COMPARED_TAG, expected)
    if expected != _NONE:
        client.set_registered_model_alias(name, PREVIOUS_CHAMPION, expected)
    client.set_registered_model_alias(name, CHAMPION, number)
    _check_champion(uri, name, decision.version, expected)
    aliases = client.get_registered_model(name).aliases
    if str(aliases.get(CHAMPION)) != number:
        raise TemporaryError(f"promote: somebody else moved the champion of {name} at the same moment: try again")
    if str(aliases.get(CHALLENGER)) == number:
        client.delete_registered_model_alias(name, CHALLENGER)


def _check_champion(uri: str, name: str, number: int, expected: str) -> None:
    model = read_registered_model(uri, name)
    version = model.versions.get(number) if model else None
    found = _compared_with(model, version) if model and version else "deleted"
    if found != expected:
        raise TemporaryError(
            f"promote: the champion of {name} changed from version {expected} to {found} meanwhile: try again, and "
            "the new version is compared with that one"
        )


def _compared_with(model: RegisteredModel, version: Version) -> str:
    """The number of the champion that `version` has to beat: the one before, once it is champion itself."""
    number = model.aliases.get(CHAMPION)
    if number == version.number:
        before = version.tags.get(COMPARED_TAG, _NONE)
        return before if before.isdecimal() and int(before) in model.versions else _NONE
    return _NONE if number is None else str(number)


def _find(record: VersionRecord, uri: str) -> tuple[RegisteredModel, Version]:
    name, number = record.registered_model_name, record.version
    model = read_registered_model(uri, name)
    if model is None or number not in model.versions:
        raise UserError(
            f"promote: the registry has no version {number} of '{name}': register it there, or correct "
            "MLFLOW_TRACKING_URI"
        )
    version = model.versions[number]
    if version.tags.get(DIGEST_TAG) != record.digest:
        raise UserError(
            f"promote: version {number} of '{name}' in the registry is not the one that was registered: it was made "
            "anew or its tags were changed; register again"
        )
    return model, version
