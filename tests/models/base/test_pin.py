"""All steps of a run train, score and merge the commit that the first of them found."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from finemill.artifacts.manifest import Producer
from finemill.models.base.pin import pin_base_model
from finemill.models.base.resolve import _resolve

MADE_BY = Producer(step="chat-format", version="0", code="c")
FIRST, SECOND = "1" * 40, "2" * 40
NAME = "hf://finemill/tiny"


@pytest.fixture(autouse=True)
def nothing_resolved() -> Iterator[None]:
    _resolve.cache_clear()
    yield
    _resolve.cache_clear()


def pin(reference: str, store: str, run_id: str | None) -> str:
    """As a process of its own does it."""
    _resolve.cache_clear()
    return pin_base_model(reference, store, run_id, MADE_BY)


@pytest.mark.parametrize("reference", [NAME, f"{NAME}@main", "finemill/tiny"])
def test_branch_stays_at_its_commit_for_a_whole_run(
    reference: str, store: str, add_to_hub: Callable[..., Path]
) -> None:
    add_to_hub(FIRST)
    assert pin(reference, store, "run") == f"{NAME}@{FIRST}"
    add_to_hub(SECOND)
    assert pin(reference, store, "run") == f"{NAME}@{FIRST}"
    assert pin(reference, store, "next run") == f"{NAME}@{SECOND}"
    assert pin(reference, store, None) == f"{NAME}@{SECOND}"


def test_two_branches_in_one_run_stay_apart(folder_store: str, add_to_hub: Callable[..., Path]) -> None:
    add_to_hub(FIRST)
    add_to_hub(SECOND, "next")
    assert pin(NAME, folder_store, "run") == f"{NAME}@{FIRST}"
    assert pin(f"{NAME}@next", folder_store, "run") == f"{NAME}@{SECOND}"


def test_what_cannot_move_is_left_as_it_is(folder_store: str, tiny_model_dir: Path) -> None:
    for reference in (
        f"{NAME}@{FIRST}",
        "builtin:tiny-qwen3",
        str(tiny_model_dir),
        f"s3://b/merge/1@sha256:{'0' * 64}",
    ):
        assert pin(reference, folder_store, "run") == reference
