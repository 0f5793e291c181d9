"""What Kubernetes asks of an affinity beyond its shape: a pod with another one is refused, hours into a run."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from finemill.pipelines.names import LABEL_KEY

_OF_SETS = ("In", "NotIn")
_OF_KEYS = ("Exists", "DoesNotExist")
_OF_NUMBERS = ("Gt", "Lt")
_WHOLE_NUMBER = "^-?[0-9]+$"


def _requirement(operators: Sequence[str]) -> dict[str, Any]:
    """The schema of a condition on a label."""
    values = {
        _OF_SETS: {"required": ["values"], "properties": {"values": {"minItems": 1}}},
        _OF_KEYS: {"properties": {"values": {"maxItems": 0}}},
        _OF_NUMBERS: {
            "required": ["values"],
            "properties": {"values": {"minItems": 1, "maxItems": 1, "items": {"pattern": _WHOLE_NUMBER}}},
        },
    }
    return {
        "properties": {"key": {"pattern": LABEL_KEY}, "operator": {"enum": list(operators)}},
        "allOf": [
            {"if": {"properties": {"operator": {"enum": list(of)}}}, "then": then} for of, then in values.items()
        ],
    }


_WEIGHTED = {"properties": {"weight": {"minimum": 1, "maximum": 100}}}
AFFINITY_RULES: Mapping[str, dict[str, Any]] = {
    "NodeSelector": {"properties": {"nodeSelectorTerms": {"minItems": 1}}},
    "NodeSelectorRequirement": _requirement((*_OF_SETS, *_OF_KEYS, *_OF_NUMBERS)),
    "LabelSelectorRequirement": _requirement((*_OF_SETS, *_OF_KEYS)),
    "PreferredSchedulingTerm": _WEIGHTED,
    "WeightedPodAffinityTerm": _WEIGHTED,
    "PodAffinityTerm": {"properties": {"topologyKey": {"pattern": LABEL_KEY}}},
}
"""JSON schemas by the class of Kubernetes whose own they complete."""


def check_affinity(value: Any, *, of_nodes: bool = False) -> None:
    """Hold what lies inside of an affinity to the same rules.

    Args:
        value: the affinity, or a part of it.
        of_nodes: conditions are on labels of nodes, which may be compared as numbers.
    Raises: ValueError: what Kubernetes would refuse.
    """
    if isinstance(value, list):
        for item in value:
            check_affinity(item, of_nodes=of_nodes)
    if not isinstance(value, Mapping):
        return
    if "operator" in value:
        _check_requirement(value, of_nodes=of_nodes)
    if not 1 <= value.get("weight", 1) <= 100:
        raise ValueError(f"weight {value['weight']} is none from 1 to 100")
    if value.get("nodeSelectorTerms") == []:
        raise ValueError("nodeSelectorTerms is empty, which fits no node: give a term, or leave it out")
    if value.get("topologyKey") == "":
        raise ValueError("topologyKey is empty: name a label of nodes, kubernetes.io/hostname for one")
    for key, item in value.items():
        check_affinity(item, of_nodes=of_nodes or key == "nodeAffinity")


def _check_requirement(condition: Mapping[str, Any], *, of_nodes: bool) -> None:
    operator, values = condition["operator"], condition.get("values") or []
    where = f"{condition.get('key', '')}: operator {operator}"
    known = (*_OF_SETS, *_OF_KEYS, *(_OF_NUMBERS if of_nodes else ()))
    if operator not in known:
        raise ValueError(f"{where} is none of {', '.join(known)}")
    if operator in _OF_SETS and not values:
        raise ValueError(f"{where} takes values: give a list")
    if operator in _OF_KEYS and values:
        raise ValueError(f"{where} takes no values: leave them out, or write In")
    if operator in _OF_NUMBERS and not (len(values) == 1 and re.match(_WHOLE_NUMBER, values[0])):
        raise ValueError(f"{where} takes one whole number, quoted, in values")
