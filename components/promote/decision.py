"""What was decided and why, for people; `decision.json` has it for programs."""

from collections.abc import Sequence

from finemill.artifacts.decision import Decision, GateResult


def markdown(decision: Decision) -> str:
    """A heading, one sentence, and a table of the checks."""
    rows = [
        f"| {'yes' if gate.passed else '**no**'} | {gate.metric} | {gate.rule} | {gate.value:.4g} "
        f"| {_cell(gate.other)} | {_cell(gate.difference)} | {_cell(gate.lower_bound)} "
        f"| {_cell(gate.p_value if gate.adjusted_p_value is None else gate.adjusted_p_value)} | {gate.num_rows or ''} |"
        for gate in decision.gates
    ]
    return "\n".join(
        [
            f"# {decision.registered_model_name} version {decision.version}: {decision.summary}",
            "",
            (
                f"Positive differences are better. The bound is what the difference exceeds at "
                f"{decision.confidence:.0%} confidence (paired bootstrap over the held-out rows), p the chance of such "
                f"rows if the rule did not hold{_correction(decision)}."
            ),
            "",
            "| passed | metric | rule | new | other | difference | bound | p | rows |",
            "|---|---|---|---:|---:|---:|---:|---:|---:|",
            *rows,
            "",
        ]
    )


def _correction(decision: Decision) -> str:
    corrected = any(gate.adjusted_p_value is not None for gate in decision.gates)
    return ", by Holm's correction over all required comparisons" if corrected else ""


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def summarize(gates: Sequence[GateResult], champion: int | None, refusal: str | None) -> str:
    """One line: the new state, or the checks that failed with their numbers."""
    if refusal:
        return f"not promoted: {refusal}"
    failed = [_failure(gate) for gate in gates if not gate.passed]
    if failed:
        return f"not promoted: {'; '.join(failed)}"
    return f"@champion in place of version {champion}" if champion else "@champion, the first"


def _failure(gate: GateResult) -> str:
    if gate.difference is None:
        return f"{gate.metric} {gate.value:.4g} is not {gate.rule}"
    bound = f", bound {gate.lower_bound:+.4g}" if gate.lower_bound is not None else ""
    chance = f", corrected p {gate.adjusted_p_value:.2g}" if gate.adjusted_p_value is not None else ""
    sure = "is not surely" if gate.adjusted_p_value is not None else "is not"
    change = f"{gate.other:.4g}; {gate.difference:+.4g}{bound}{chance}"
    return f"{gate.metric} {gate.value:.4g} {sure} {gate.rule} ({change})"
