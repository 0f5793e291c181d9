"""What `make test-faults` tries: `FINEMILL_FAULTS` is the share of all rounds, 1 for half an hour on two cores."""

import os
from random import Random

import pytest

SHARE = float(os.environ.get("FINEMILL_FAULTS") or 0)


def rounds(full: int) -> int:
    """How many of `full` rounds are tried, at least one."""
    return max(1, round(full * SHARE))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """All of it is left out unless it is asked for."""
    for item in items:
        if "tests/faults" in item.path.as_posix():
            item.add_marker("faults")
            item.add_marker(pytest.mark.timeout(3600))
            if not SHARE:
                item.add_marker(pytest.mark.skip(reason="`make test-faults` runs it"))


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> Random:
    """Chance that a failed round can be repeated with: `FINEMILL_FAULTS_SEED`, 0 by default."""
    return Random(f"{os.environ.get('FINEMILL_FAULTS_SEED', 0)} {request.node.name}")
