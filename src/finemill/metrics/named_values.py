"""Values by the names of what they are of: `x = 1, y = 2`."""

import re
from collections.abc import Mapping, Sequence

_NAMED = re.compile(r"\s*(?P<name>\\?[A-Za-z]+(?:_\{?\w+\}?)?)\s*=\s*(?P<value>[^=<>]+?)\s*")


def read_named_values(parts: Sequence[str]) -> Mapping[str, str] | None:
    """The values in the order of their names; None where a part is no `name = value`, or a name comes twice."""
    found = [match for part in parts if (match := _NAMED.fullmatch(part))]
    if len(parts) < 2 or len(found) < len(parts):
        return None
    values = {match["name"]: match["value"] for match in found}
    return dict(sorted(values.items())) if len(values) == len(parts) else None
