"""`finemill replay DECISION`: decide again from what a decision refers to, and say whether the verdict is the same."""

from pathlib import Path

from finemill.artifacts.decision import Decision, GateResult, read_decision
from finemill.artifacts.manifest import Manifest, Reference
from finemill.commands.parser import CommandParser
from finemill.components.promote.config import PromoteConfig
from finemill.config import parse_config
from finemill.errors import UserError
from finemill.storage.store import fetch_artifact, read_manifest


def execute(name: str, arguments: list[str]) -> int:
    """Print each check as it was and as it is. Returns: 0 if they agree, 3 if one does not."""
    parser = CommandParser(
        prog=f"finemill {name}",
        description="Check every gate of a decision again, from the evaluations that it names by digest and the "
        "configuration in its manifest. The registry is neither asked nor changed. In a store that was moved or copied "
        "the evaluations are looked for beside the decision.",
        allow_abbrev=False,
    )
    parser.add_argument("decision", metavar="DECISION", help="reference of promote's output, <uri>@sha256:<digest>")
    reference = Reference.parse(parser.parse_args(arguments).decision)
    folder, manifest = fetch_artifact(reference)
    if manifest.kind != "decision":
        raise UserError(f"replay: {reference} is an artifact of kind {manifest.kind}: give one that promote printed")
    decision = read_decision(folder)
    found = _check_again(decision, manifest, reference.uri)
    same = len(found) == len(decision.gates)
    for then, now in zip(decision.gates, found, strict=False):
        agrees = then == now
        same &= agrees
        print(f"{'same ' if agrees else 'OTHER'}  {_line(then)}" + ("" if agrees else f"; again {_line(now)}"))
    if decision.promoted and not all(gate.passed for gate in found):
        same = False
        print("OTHER  promoted, and a gate does not pass")
    print(f"{decision.registered_model_name} version {decision.version}: {decision.summary}")
    print("the same verdict" if same else "another verdict: the code that decides, or a library of it, has changed")
    return 0 if same else 3


def _check_again(decision: Decision, manifest: Manifest, beside: str) -> list[GateResult]:
    from finemill.components.promote.gates import check_gates
    from finemill.components.promote.scores import Scores

    config = parse_config(PromoteConfig, manifest.config, "the decision's configuration")
    ours = Scores(_fetch(decision.evaluation, beside))
    theirs = Scores(_fetch(decision.champion_evaluation, beside)) if decision.champion_evaluation else None
    return check_gates(ours, theirs, config)


def _fetch(text: str, beside: str) -> Path:
    """The folder of an artifact of the same store as the one at `beside`, wherever that store lies, verified."""
    reference = Reference.parse(text)
    store = beside.rsplit("/", 2)[0]
    moved = Reference("/".join([store, *reference.uri.rsplit("/", 2)[1:]]), reference.digest)
    if read_manifest(reference.uri) is None and read_manifest(moved.uri) is not None:
        reference = moved
    return fetch_artifact(reference)[0]


def _line(gate: GateResult) -> str:
    bound = "" if gate.lower_bound is None else f", bound {gate.lower_bound:+.6g}"
    return f"{gate.metric} {gate.value:.6g} {'is' if gate.passed else 'is not'} {gate.rule}{bound}"
