import sys
from pathlib import Path

import pytest
import torch

from finemill.models.bitsandbytes_import import import_bitsandbytes


def test_what_bitsandbytes_compiles_at_its_import_is_left_as_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("bitsandbytes")
    (tmp_path / "bitsandbytes.py").write_text("import torch\n\nseen = torch.compiler.get_default_backend()\n")
    monkeypatch.delitem(sys.modules, "bitsandbytes")
    monkeypatch.syspath_prepend(tmp_path)
    before = torch.compiler.get_default_backend()
    import_bitsandbytes()
    assert sys.modules["bitsandbytes"].seen == "eager"
    assert torch.compiler.get_default_backend() == before == "inductor"
