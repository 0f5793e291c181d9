"""Kubernetes' quantities in the one spelling that kfp, hera and Kubernetes all read."""

import re
from decimal import ROUND_CEILING, Decimal
from typing import Annotated

from pydantic import BeforeValidator

_UNITS = {"k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "P": 10**15, "E": 10**18, "": 1}
_BINARY = {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40, "Pi": 2**50, "Ei": 2**60}
_QUANTITY = re.compile(r"(\d+\.?\d*|\.\d+)(?:[eE](\d{1,2}))?([A-Za-z]*)")
MEMORY_PATTERN = r"^([0-9]+\.?[0-9]*|\.[0-9]+)([kMGTPE]|[KMGTPE]i|[eE][0-9]{1,2})?$"
"""Regular expression of memory as Kubernetes writes it."""
CPU_PATTERN = r"^([0-9]+m|[0-9]+\.?[0-9]{0,3}|\.[0-9]{1,3})$"
"""Regular expression of cores as Kubernetes writes them: nothing finer than a thousandth."""


def _memory(value: object) -> str:
    """Memory as a whole number of the largest binary unit that divides it; below a KiB rounded up."""
    text = _text(value)
    found = _QUANTITY.fullmatch(text)
    if not found or not re.fullmatch(MEMORY_PATTERN, text):
        raise ValueError(f"'{text}' is no memory: write 16Gi, 16384Mi, 32G or bytes")
    size = Decimal(found[1]) * 10 ** int(found[2] or 0) * (_UNITS | _BINARY)[found[3]]
    kib = int((size / 1024).to_integral_value(ROUND_CEILING))
    if not 0 < kib < 2**53:
        raise ValueError(f"'{text}' is no memory that a container can have")
    unit = next(name for name, factor in reversed(_BINARY.items()) if kib % (factor // 1024) == 0)
    return f"{kib * 1024 // _BINARY[unit]}{unit}"


def gibibytes(memory: str) -> float:
    """GiB of a quantity as `Memory` has it."""
    found = _QUANTITY.fullmatch(memory)
    assert found is not None
    return int(found[1]) * _BINARY[found[3]] / 2**30


def _cpu(value: object) -> str:
    """Cores as a whole number, or as thousandths."""
    text = _text(value)
    if not re.fullmatch(CPU_PATTERN, text):
        raise ValueError(f"'{text}' is no number of cores: write 4, 1.5 or 500m")
    millicores = int(text[:-1]) if text.endswith("m") else int(Decimal(text) * 1000)
    if millicores == 0:
        raise ValueError(f"'{text}': a container needs a part of a core, 100m for instance")
    return f"{millicores}m" if millicores % 1000 else str(millicores // 1000)


def _text(value: object) -> str:
    return str(value) if isinstance(value, str | int | float) and not isinstance(value, bool) else repr(value)


Memory = Annotated[str, BeforeValidator(_memory)]
"""Type of a field for memory."""
CPU = Annotated[str, BeforeValidator(_cpu)]
"""Type of a field for cores."""
