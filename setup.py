"""All settings are in pyproject.toml; this only stops a build that would leave the product out."""

import sys
from pathlib import Path

from setuptools import setup

for link in ("components", "kernels", "pipelines"):
    if not Path(__file__).parent.joinpath("src", "finemill", link).is_dir():
        sys.exit(
            f"src/finemill/{link} is no link to a folder: this checkout has no symbolic links; "
            "run `git config core.symlinks true && git checkout -- src/finemill`, or unpack the archive with links"
        )
setup()
