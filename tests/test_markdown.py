"""Every path that a Markdown file names exists."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TOP = "components|kernels|pipelines|src|images|charts|tests"
LIBRARY = ROOT / "src" / "finemill"


def documents() -> list[str]:
    tracked = subprocess.run(["git", "ls-files", "*.md"], cwd=ROOT, capture_output=True, text=True, check=True)
    return tracked.stdout.split()


def paths(text: str) -> set[str]:
    """Paths in back-quotes or links: from the root, or the name of a file with a suffix of ours."""
    quoted = re.findall(r"`([^`\n]+)`", text) + re.findall(r"\]\(([^)#\s]+)[^)]*\)", text)
    words = {word.rstrip("/") for word in quoted if re.fullmatch(r"[\w./-]+", word)}
    named = {word for word in words if re.match(rf"(?:{TOP})/", word)}
    return named | {word for word in words if re.fullmatch(r"[\w/-]+\.py", word)}


@pytest.mark.parametrize("document", documents())
def test_named_paths_exist(document: str) -> None:
    folder = (ROOT / document).parent
    # A file of the folder itself, a path from the root, or a module of the library as its own README names it.
    places = (folder, ROOT, LIBRARY)
    assert not {
        name for name in paths((ROOT / document).read_text()) if not any((place / name).exists() for place in places)
    }
