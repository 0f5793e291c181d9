"""The list of what an image holds, CycloneDX: sbom.py PYTHON.cdx.json DEBIAN_PACKAGES [FILE ...].

Python's packages as cyclonedx-py lists them, Debian's as dpkg does, a line each of name, version and architecture, and
files that were compiled in the build, with their sha256.
"""

import hashlib
import json
import sys
from pathlib import Path
from typing import Any
from urllib.parse import quote


def debian_component(line: str) -> dict[str, Any]:
    """A package of Debian, from a line of dpkg."""
    name, version, architecture = line.split()
    purl = f"pkg:deb/debian/{quote(name)}@{quote(version)}?arch={architecture}"
    return {"type": "library", "bom-ref": purl, "name": name, "version": version, "purl": purl}


def file_component(path: Path) -> dict[str, Any]:
    """A file with its sha256."""
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return {"type": "file", "bom-ref": str(path), "name": str(path), "hashes": [{"alg": "SHA-256", "content": digest}]}


def whole_image(python: dict[str, Any], debian: list[str], files: list[Path]) -> dict[str, Any]:
    """Python's list with the others' components behind its own."""
    others = [*map(debian_component, debian), *map(file_component, files)]
    return {**python, "components": [*python.get("components", []), *others]}


if __name__ == "__main__":
    listed, packages, *compiled = map(Path, sys.argv[1:])
    image = whole_image(json.loads(listed.read_text()), packages.read_text().splitlines(), compiled)
    print(json.dumps(image, indent=2))
