"""What types cost, measured by a command."""

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest

from finemill.commands.bench import execute
from finemill.commands.plot import plot
from finemill.components.gguf_quantize import dynamic
from finemill.errors import UserError


def test_types_are_measured_by_size_and_divergence(
    tiny_dataset_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dynamic, "_SAMPLED_VALUES", 1 << 12)
    sizes = ["--imatrix-rows", "4", "--rows", "8", "--plot", str(tmp_path / "kl.svg"), "--json"]
    types = ["--quantizations", "q8_0", "q4_k_m", "dynamic-q4_k_m"]
    assert execute("bench", ["gguf", "--dataset", str(tiny_dataset_dir), *types, *sizes]) == 0
    q8, q4, ours = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert q8["mb"] > q4["mb"] >= ours["mb"]
    assert q8["kl"] < ours["kl"] < q4["kl"] < q4["kl_p999"]
    panels = ElementTree.parse(tmp_path / "kl.svg").getroot().findall("{http://www.w3.org/2000/svg}svg")
    assert [panel.get("y") for panel in panels] == ["0", "420"]


def test_an_unknown_type_is_one_line(tiny_dataset_dir: Path) -> None:
    with pytest.raises(UserError, match="'Q9' is no quantization"):
        execute("bench", ["gguf", "--dataset", str(tiny_dataset_dir), "--quantizations", "q9"])


def test_a_plot_has_a_line_per_series_and_a_label_per_point() -> None:
    picture = plot({"a": [(1, 0.1, "<x>"), (2, 0.01, "y")], "b": [(1, 0.2, "z")]}, x="MB", y="KL")
    tree = ElementTree.fromstring(picture)
    name = "{http://www.w3.org/2000/svg}"
    assert len(tree.findall(f"{name}polyline")) == 2
    assert [text.text for text in tree.findall(f"{name}text")][2:] == ["a", "<x>", "y", "b", "z"]
