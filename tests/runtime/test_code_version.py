"""The key of an output changes with the code and data that make it, and with nothing else."""

import shutil
import tomllib
from importlib import metadata
from pathlib import Path

import pytest

import finemill
from finemill.runtime import code_version
from finemill.runtime.catalog import STEPS, Step
from finemill.runtime.code_version import closure, code_digest

PACKAGE = Path(finemill.__file__).parent
TRAINING = {"train-qlora", "train-dpo"}


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the package, as an installed wheel holds it: without links."""
    return shutil.copytree(
        PACKAGE, tmp_path_factory.mktemp("installed") / "finemill", ignore=shutil.ignore_patterns("__pycache__")
    )


def digests(package: Path) -> dict[str, str]:
    return {name: code_digest(step, package) for name, step in STEPS.items()}


@pytest.fixture(scope="module")
def before(package: Path) -> dict[str, str]:
    return digests(package)


def changed_by(package: Path, file: str, before: dict[str, str]) -> set[str]:
    """The steps whose digest changes while a file of the package has another line."""
    path = package / file
    text = path.read_bytes()
    path.write_bytes(text + b"\n# another line\n")
    after = digests(package)
    path.write_bytes(text)
    return {name for name in STEPS if before[name] != after[name]}


@pytest.mark.parametrize(
    ("file", "concerned", "others"),
    [
        ("kernels/ops/rms_norm.py", TRAINING, {"eval"}),
        ("kernels/ops/nf4.py", {"train-qlora"}, {"eval"}),
        ("kernels/engine/model.py", {"train-qlora"}, {"eval"}),
        ("kernels/planning/planner.py", {"train-qlora"}, {"eval"}),
        ("kernels/trainer.py", {"train-qlora"}, {"eval"}),
        ("training/trainer.py", TRAINING, {"eval", "merge"}),
        ("models/causal_lm.py", {*TRAINING, "eval", "gguf-quantize"}, {"chat-format"}),
        ("models/stored_model.py", {"merge"}, {"chat-format"}),
        ("models/generation.py", {"eval"}, {"chat-format"}),
        ("rows/shapes.py", {"data-prep", "chat-format"}, TRAINING),
        ("rows/answers.py", {"chat-format", "eval"}, {"merge"}),
        ("rows/__init__.py", {"chat-format", "eval"}, {"merge"}),
        ("artifacts/dataset.py", {"eval"}, {"data-prep", "register"}),
        ("registry/snapshot.py", {"register", "promote"}, TRAINING),
        ("components/eval/report.html.jinja", {"eval"}, {*TRAINING, "merge"}),
        ("components/eval/report.css", {"eval"}, {"merge"}),
        ("components/eval/report.js", {"eval"}, {"merge"}),
        ("components/eval/metrics.py", {"eval"}, {"merge"}),
        ("components/merge/config.py", {"merge"}, {"eval"}),
    ],
)
def test_what_a_step_imports_or_reads_changes_its_key(
    package: Path, before: dict[str, str], file: str, concerned: set[str], others: set[str]
) -> None:
    changed = changed_by(package, file, before)
    assert changed >= concerned
    assert not changed & others


@pytest.mark.parametrize(
    "file",
    [
        "__init__.py",
        "errors.py",
        "config.py",
        "artifacts/manifest.py",
        "commands/gc.py",
        "registry/garbage.py",
        "runtime/catalog.py",
        "runtime/code_version.py",
        "runtime/context.py",
        "runtime/kfp_task.py",
        "runtime/run.py",
        "storage/s3.py",
        "storage/store.py",
        "tracking/record.py",
        "tracking/server.py",
        "models/base/pretrain.py",
        "models/base/README.md",
        "models/base/tiny_qwen3/tokenizer_config.json",
        "kernels/README.md",
        "kernels/bench/ops.py",
        "kernels/bench/resources.json",
        "pipelines/finetune.py",
        "pipelines/configs/finetune.yaml",
        "components/eval/README.md",
        "components/eval/OWNERS",
        "components/eval/metadata.yaml",
        "components/eval/ports.yaml",
        "components/eval/component.py",
    ],
)
def test_what_no_step_computes_with_changes_no_key(package: Path, before: dict[str, str], file: str) -> None:
    assert changed_by(package, file, before) == set()


def test_chat_template_in_a_folder_of_data_changes_the_key(package: Path, before: dict[str, str]) -> None:
    template = package / "components" / "chat_format" / "chat_templates" / "plain.jinja"
    write(package, {str(template.relative_to(package)): "{{ messages }}"})
    after = digests(package)
    shutil.rmtree(template.parent)
    assert {name for name in STEPS if before[name] != after[name]} == {"chat-format"}


def test_key_does_not_depend_on_where_the_package_lies(package: Path, before: dict[str, str]) -> None:
    assert digests(package) == before == digests(PACKAGE)


@pytest.mark.parametrize(
    ("library", "concerned", "others"),
    [
        ("trl", TRAINING, {"eval"}),
        ("accelerate", TRAINING, {"eval"}),
        ("torch", {*TRAINING, "eval", "merge", "gguf-quantize"}, {"chat-format"}),
        ("nvidia-cudnn-frontend", {"train-qlora"}, {"eval"}),
        ("tokenizers", {"chat-format", "eval"}, {"data-prep"}),
        ("mlflow", set(), set(STEPS)),
        ("pydantic", set(), set(STEPS)),
    ],
)
def test_version_of_a_library_changes_the_keys_of_steps_that_compute_with_it(
    library: str,
    concerned: set[str],
    others: set[str],
    before: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(code_version, "version", lambda name: "99.0" if name == library else metadata.version(name))
    after = digests(PACKAGE)
    changed = {name for name in STEPS if before[name] != after[name]}
    assert changed >= concerned
    assert not changed & others


@pytest.mark.parametrize("step", STEPS.values(), ids=list(STEPS))
def test_every_library_is_known_by_the_name_of_its_distribution(step: Step) -> None:
    extras = {"auto-round", "flash-attn-4", "nvidia-cudnn-frontend", "deepspeed", "lm_eval"}
    for library in closure([f"finemill.components.{step.module_name}.step"])[1] - extras:
        assert metadata.version(library)


@pytest.mark.parametrize("step", STEPS.values(), ids=list(STEPS))
def test_no_module_is_imported_by_a_name_that_the_closure_cannot_read(step: Step) -> None:
    for name, content in closure([f"finemill.components.{step.module_name}.step"])[0].items():
        if name.endswith(".py"):
            by_name = content.count(b"import_module(") + content.count(b"__import__(")
            assert by_name == len(code_version._IMPORT_BY_NAME.findall(content)), name


def test_data_of_every_kind_that_is_packaged_counts() -> None:
    pyproject = PACKAGE.resolve().parents[1] / "pyproject.toml"
    patterns = tomllib.loads(pyproject.read_text())["tool"]["setuptools"]["package-data"]["*"]
    suffixes = {Path(pattern).suffix for pattern in patterns if pattern.startswith("*")}
    # Prose, and weights, which have digests of their own.
    assert suffixes - {".md", ".safetensors"} <= code_version._DATA_SUFFIXES


def write(package: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = package / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def test_imports_are_followed_however_they_are_written(tmp_path: Path) -> None:
    write(
        tmp_path,
        {
            "components/step/step.py": "from finemill.rows import a\nimport finemill.rows.b as other\n",
            "rows/__init__.py": "from finemill.rows.of_package import x\n",
            "rows/a.py": "def f():\n    try:\n        from finemill.rows.c import (\n            g,\n        )\n"
            "    except ImportError:\n        match g:\n            case 1:\n                import finemill.rows.d\n",
            "rows/b.py": 'import_module("finemill.rows.e")\n',
            "rows/c.py": "import typing\nif typing.TYPE_CHECKING:\n    import finemill.rows.types\n"
            "else:\n    import finemill.rows.f\nif not typing.TYPE_CHECKING:\n    import finemill.rows.g\n",
            "rows/d.py": "from finemill import kernels\nimport finemill.kernels.ops\n",
            "kernels/ops/__init__.py": "",
            "kernels/ops/unused.py": "",
            **{f"rows/{name}.py": "" for name in ("e", "f", "g", "types", "unused", "of_package")},
        },
    )
    files, _ = closure(["finemill.components.step.step"], tmp_path)
    rows = {"__init__", "a", "b", "c", "d", "e", "f", "g", "of_package"}
    assert set(files) == {"components/step/step.py", "kernels/ops/__init__.py"} | {f"rows/{name}.py" for name in rows}


def test_modules_that_import_each_other_end(tmp_path: Path) -> None:
    write(tmp_path, {"a.py": "import finemill.b", "b.py": "import finemill.a"})
    assert set(closure(["finemill.a"], tmp_path)[0]) == {"a.py", "b.py"}


def test_outside_state_of_a_step_is_its_code_too(tmp_path: Path) -> None:
    step = Step("x", "", (), "rows", "Config", image="cpu", state_name="sources:digests")
    write(tmp_path, {"components/x/step.py": "", "components/x/config.py": "", "components/x/sources.py": ""})
    before = code_digest(step, tmp_path)
    write(tmp_path, {"components/x/sources.py": "# changed"})
    assert code_digest(step, tmp_path) != before


def test_file_that_moves_and_file_that_is_cut_differently_are_other_code(tmp_path: Path) -> None:
    step = Step("x", "", (), "rows", "Config", image="cpu")
    write(tmp_path, {"components/x/step.py": "", "components/x/a.txt": "one", "components/x/b.txt": "two"})
    before = code_digest(step, tmp_path)
    write(tmp_path, {"components/x/a.txt": "onetw", "components/x/b.txt": "o"})
    assert code_digest(step, tmp_path) != before
