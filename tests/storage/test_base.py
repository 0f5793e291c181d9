import os
import subprocess
import sys
from pathlib import Path

import pytest

from finemill.errors import UserError
from finemill.storage.base import local_path, normalize_uri


def test_an_address_in_s3_with_a_line_break_is_refused() -> None:
    with pytest.raises(UserError, match="a line break or another control character"):
        normalize_uri("s3://bucket/prefix\n")


@pytest.mark.parametrize("name", ["a b", "a#b", "what?", "My%20Data", "ü", "100%"])
def test_a_folder_keeps_its_name(name: str, tmp_path: Path) -> None:
    folder = tmp_path / name
    assert local_path(normalize_uri(str(folder))) == folder


def test_a_folder_keeps_its_name_whatever_the_locale(tmp_path: Path) -> None:
    script = """
import sys
from finemill.storage.base import local_path, normalize_uri
local_path(normalize_uri(sys.argv[1])).mkdir()
"""
    variables = {**os.environ, "LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    subprocess.run([sys.executable, "-c", script, tmp_path / "ü"], env=variables, check=True)
    assert (tmp_path / "ü").is_dir()


def test_a_file_s_address_has_no_query_and_no_fragment() -> None:
    assert local_path("file:///a#b?c") == Path("/a#b?c")
    assert local_path("file:/a/b%20c") == Path("/a/b c")


@pytest.mark.parametrize("uri", ["", "  "])
def test_an_empty_address_is_refused(uri: str) -> None:
    with pytest.raises(UserError, match="address is empty"):
        normalize_uri(uri)


@pytest.mark.parametrize("uri", ["file:///tmp/%00x", "a\0b"])
def test_an_address_with_a_nul_is_refused(uri: str) -> None:
    with pytest.raises(UserError, match="holds a NUL character"):
        normalize_uri(uri)
