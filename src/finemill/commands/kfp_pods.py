"""The pods of a run on KFP: their logs, and what KFP's API does not tell of a step."""

import re
from dataclasses import dataclass
from typing import Any

from finemill.commands.kubernetes_client import PodLogs, waits_for_place, waits_in_vain
from finemill.runtime.catalog import STEPS

# `<workflow>.root.<task>.executor(<attempt>)`, or with the `templateDefaults.retryStrategy` that KFP's own manifests
# give Argo `<workflow>(0).root(0).<task>(0).executor(<attempt>)`; drivers and groups are named otherwise.
_EXECUTOR = re.compile(r"\.([^.()]+)(?:\(\d+\))?\.executor(?:\((\d+)\))?$")
# What the launcher and kfp's executor say, each with a JSON object over many lines now and then.
_KFP_LINE = re.compile(r"[IWEF]\d{4} [\d:.]+ +\d+ \w+\.go:\d+\] |\[KFP Executor |\{$")
_END = re.compile(r"failed to execute successfully: (?:exit status (\d+)|signal: (\w+))")
_SIGNALS = {"killed": 137, "terminated": 143}


@dataclass
class StepFacts:
    """What a step's pods tell. `pending`: its newest pod has not begun; `blocked`: what that waits for in vain;
    `unplaced`: what the scheduler says that has found no node for it, in `unplaced_s` seconds.
    """

    attempts: int = 1
    exit_code: int | None = None
    pending: bool = False
    blocked: str = ""
    unplaced: str = ""
    unplaced_s: float = 0.0
    verdict: tuple[str, str] | None = None


class KFPPods:
    """Follows the pods of one run; `facts` by step."""

    def __init__(self, client: Any, namespace: str, run: str) -> None:
        self.facts: dict[str, StepFacts] = {}
        self._logs = PodLogs(client, namespace, f"pipeline/runid={run}", self._observe)
        self._in_json: dict[str, bool] = {}

    def read(self) -> list[str]:
        """The steps' own lines since the last call, `<step>  <text>`; what they tell goes into `facts`."""
        return [line for line in self._logs.new_lines() if self._note(*line.split("  ", 1))]

    def _observe(self, pod: Any) -> str | None:
        """The step that a pod runs; None for KFP's own."""
        node = (pod.metadata.annotations or {}).get("workflows.argoproj.io/node-name", "")
        found = _EXECUTOR.search(node)
        if found is None or found[1] not in STEPS:
            return None
        facts = self.facts.setdefault(found[1], StepFacts())
        facts.attempts = max(facts.attempts, int(found[2] or 0) + 1)
        facts.pending = pod.status.phase == "Pending"
        facts.blocked = waits_in_vain(pod)
        facts.unplaced, facts.unplaced_s = waits_for_place(pod)
        return found[1]

    def _note(self, step: str, text: str) -> bool:
        """Learn from a line. Returns: whether the step wrote it, not KFP around it."""
        if _KFP_LINE.match(text):
            self._in_json[step] = text.endswith("{")
            end = _END.search(text)
            if end:
                self.facts[step].exit_code = int(end[1]) if end[1] else _SIGNALS.get(end[2])
            return False
        if self._in_json.get(step):
            self._in_json[step] = text != "}"
            return False
        verdict = STEPS[step].verdict
        prefix = f"{step}: {verdict}: "
        if verdict and text.startswith(prefix):
            self.facts[step].verdict = (verdict, text.removeprefix(prefix))
        return True
