"""The list of what an image holds, CycloneDX: Python's packages as cyclonedx-py lists them with the sha256 of the file
that each was installed from, Debian's as dpkg does, the base image, and files that were compiled in the build.
"""

import argparse
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote


def debian_component(line: str) -> dict[str, Any]:
    """A package of Debian, from a line of dpkg: name, version and architecture."""
    name, version, architecture = line.split()
    purl = f"pkg:deb/debian/{quote(name)}@{quote(version)}?arch={architecture}"
    return {"type": "library", "bom-ref": purl, "name": name, "version": version, "purl": purl}


def file_component(path: Path) -> dict[str, Any]:
    """A file with its sha256."""
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return {"type": "file", "bom-ref": str(path), "name": str(path), "hashes": _sha256(digest)}


def base_component(image: str) -> dict[str, Any]:
    """The base image, with its digest if it is named by one."""
    name, _, digest = image.partition("@sha256:")
    hashes = {"hashes": _sha256(digest), "version": f"sha256:{digest}"} if digest else {}
    return {"type": "container", "bom-ref": image, "name": name, **hashes}


def installed_digests(reports: Sequence[Path]) -> dict[str, str]:
    """The sha256 of the file of each package in pip's installation reports, by normalized name."""
    items = [item for report in reports for item in json.loads(report.read_text())["install"]]
    # pip 23.0 gives a local file's in the older of two fields only.
    digests = {item["metadata"]["name"]: item["download_info"]["archive_info"]["hash"] for item in items}
    return {normalized(name): digest.removeprefix("sha256=") for name, digest in digests.items()}


def normalized(name: str) -> str:
    """A package's name as PEP 503 spells it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def with_hashes(python: Mapping[str, Any], digests: Mapping[str, str]) -> list[dict[str, Any]]:
    """Python's components, each with the sha256 that pip reported. Raises: KeyError: it reported none."""
    components = python.get("components", [])
    return [{**item, "hashes": _sha256(digests[normalized(item["name"])])} for item in components]


def _sha256(digest: str) -> list[dict[str, str]]:
    return [{"alg": "SHA-256", "content": digest}]


def main() -> None:
    """Print the list."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("python", type=Path, help="what cyclonedx-py wrote")
    parser.add_argument("--reports", type=Path, nargs="+", required=True, help="pip's installation reports")
    parser.add_argument("--debian", type=Path, required=True, help="a line of dpkg per package")
    parser.add_argument("--base", required=True, help="the base image")
    parser.add_argument("--files", type=Path, nargs="*", default=[], help="files that were compiled")
    given = parser.parse_args()
    python = json.loads(given.python.read_text())
    others = [base_component(given.base), *map(debian_component, given.debian.read_text().splitlines())]
    components = [*with_hashes(python, installed_digests(given.reports)), *others, *map(file_component, given.files)]
    print(json.dumps({**python, "components": components}, indent=2))


if __name__ == "__main__":
    main()
