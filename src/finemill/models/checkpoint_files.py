"""What the folders of a model in fewer bits have in common with the model's own."""

import shutil
from collections.abc import Iterator
from pathlib import Path

from finemill.models.stored_model import StoredModel

# What lies beside the weights and says how the model is used.
_SMALL_FILES = ("*.json", "*.jinja", "*.model", "merges.txt", "vocab.txt", "additional_chat_templates/*.jinja")
_WRITTEN_ANEW = ("config.json", "*.index.json")


def copy_small_files(source: Path, folder: Path) -> None:
    """Copy all but weights, their index and config.json."""
    for pattern in _SMALL_FILES:
        for path in source.glob(pattern):
            if not any(path.match(name) for name in _WRITTEN_ANEW):
                target = folder / path.relative_to(source)
                target.parent.mkdir(exist_ok=True)
                shutil.copyfile(path, target)


def parameters(stored: StoredModel) -> Iterator[tuple[str, str]]:
    """Stored names, and the model's, of every tensor that it has a use for; of a dense model, one for one."""
    return ((key, group.names[0]) for group in stored.groups if group.names for key in group.keys)
