"""Damaged and strange inputs: each is used as it says or refused in one line, never a traceback or a silent change."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from finemill.artifacts.manifest import Manifest, Producer, Reference, new_manifest
from finemill.cli import main
from finemill.errors import UserError
from finemill.models.base.resolve import BUILTIN_MODELS
from finemill.runtime.catalog import STEPS
from finemill.storage.base import normalize_uri
from tests.faults.conftest import rounds

VALUES = (
    "null", "true", "-1", "0", "1e400", ".inf", ".nan", "1e-400", "010", "1:30", "2026-13-45", "!!int x", "!!bool x",
    "!!python/object/apply:os.system [id]", "9" * 5000, "[" * 400, "{a: {b: [c]}}", "[]", "''", "' '", '"\\0"', "~",
    "&a [*a]", "hf://x", "s3://", "file://host/x", "${HOME}", "$(id)", "{{x}}", "../../x", "é", "'\u202e'", "0x1f",
    "1_0",
)  # fmt: skip
ROW = {"messages": [{"role": "user", "content": "What is 2 + 2?"}, {"role": "assistant", "content": "It is 4."}]}
MODEL = BUILTIN_MODELS["builtin:tiny-qwen3"]
JUNK: tuple[Any, ...] = (
    None, 5, -1.5, True, "", "x", [], {}, [[]], {"a": {}}, 10**30, "\ud800", "\0", "<|im_end|>", [None], "9" * 400
)  # fmt: skip


def damaged(data: bytes, rng: Random) -> bytes:
    """The bytes with a few flipped, cut out, doubled or replaced."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8))):
        at = rng.randrange(len(changed) + 1)
        match rng.randrange(5):
            case 0 if at < len(changed):
                changed[at] ^= 1 << rng.randrange(8)
            case 1:
                del changed[at : at + rng.randrange(1, 20)]
            case 2:
                changed[at:at] = changed[at : at + rng.randrange(1, 20)]
            case 3:
                changed[at:at] = rng.randbytes(rng.randrange(1, 4))
            case _:
                del changed[at:]
    return bytes(changed)


def mutated(value: Any, rng: Random) -> Any:
    """A JSON value in which one part, at any depth, is another kind of thing."""
    if isinstance(value, dict) and value and rng.random() < 0.8:
        key = rng.choice(list(value))
        if rng.random() < 0.1:
            return {name: item for name, item in value.items() if name != key}
        return {**value, key: mutated(value[key], rng)}
    if isinstance(value, list) and value and rng.random() < 0.8:
        at = rng.randrange(len(value))
        return [*value[:at], mutated(value[at], rng), *value[at + 1 :]]
    return rng.choice(JUNK)


def check_line(error: UserError) -> None:
    """Whatever the input was, what is said of it is one line."""
    assert "\n" not in str(error)


def check(arguments: list[str], capsys: pytest.CaptureFixture[str], what: object) -> int:
    """Call the command as a user does. Returns: its exit code, which says done or the user's mistake, in one line."""
    try:
        code = main(arguments)
    except SystemExit as error:
        code = int(error.code or 0)
    said = capsys.readouterr().err
    assert code in (0, 2, 75), f"exit code {code} for {what!r:.2000}: {said[-2000:]}"
    assert "Traceback" not in said, f"{what!r:.2000}: {said[-2000:]}"
    if code:
        assert len(said.strip().splitlines()[-1]) < 2000, f"{what!r:.500}: {said[:3000]}"
    return code


@pytest.mark.parametrize("step", ["data-prep", "chat-format", "train-qlora", "train-dpo", "eval", "merge", "promote"])
def test_configurations(step: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], rng: Random) -> None:
    fields = list(STEPS[step].config.model_fields)
    file = tmp_path / "config.yaml"
    ports = [part for port in STEPS[step].inputs for part in (f"--{port.replace('_', '-')}", "x")]
    for _ in range(rounds(700)):
        lines = [f"{rng.choice([*fields, 'unknown'])}: {rng.choice(VALUES)}" for _ in range(rng.randrange(1, 4))]
        data = "\n".join(lines).encode()
        file.write_bytes(damaged(data, rng) if rng.random() < 0.5 else data)
        check([step, *ports, "--config", str(file), "--dry-run"], capsys, file.read_bytes())


def test_manifests(tmp_path: Path, rng: Random) -> None:
    (tmp_path / "a.txt").write_text("alpha")
    made_by = Producer(step="merge", version="0", code="c")
    manifest = new_manifest("model", tmp_path, made_by, metrics={"loss": 2.0}, config={"seed": 1}, warnings=["w"])
    data = manifest.to_bytes()
    for number in range(rounds(2000)):
        changed = damaged(data, rng) if number % 2 else json.dumps(mutated(json.loads(data), rng)).encode()
        try:
            read = Manifest.from_bytes(changed, "here")
        except UserError as error:
            check_line(error)
        else:
            free = {"seconds": 0.0, "created": "", "folder": ""}
            assert read.model_copy(update=free) == manifest.model_copy(update=free)


def test_addresses(rng: Random) -> None:
    texts = (
        "s3://bucket/a b?x#y@sha256:" + "0" * 64,
        "file:///x/y%20z@sha256:" + "a" * 64,
        "hf://org/name@main",
        "~/x",
    )
    readers: tuple[Callable[[str], object], ...] = (Reference.parse, normalize_uri)
    for _ in range(rounds(1000)):
        text = damaged(rng.choice(texts).encode(), rng).decode(errors="replace").replace("\0", "")
        for read in readers:
            try:
                read(text)
            except UserError as error:
                check_line(error)


def write_rows(folder: Path, rng: Random) -> Path:
    """A file of rows in some format, a few of its values or bytes wrong."""
    rows = [mutated(ROW, rng) if rng.random() < 0.3 else ROW for _ in range(4)]
    text = "\n".join(json.dumps(row) for row in rows).encode()
    kind = rng.choice(("jsonl", "json", "csv", "jsonl.gz", "parquet", "arrow", "txt"))
    path = folder / f"rows.{kind}"
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist([{"prompt": "a", "completion": "b"}] * 20), path)
    elif kind == "arrow":
        with pa.ipc.new_file(path, pa.schema({"prompt": pa.string(), "completion": pa.string()})) as writer:
            writer.write_table(pa.Table.from_pylist([{"prompt": "a", "completion": "b"}] * 20))
    elif kind == "jsonl.gz":
        path.write_bytes(gzip.compress(text))
    elif kind == "csv":
        path.write_text('prompt,completion\na,b\n"c\nd",e\n')
    else:
        path.write_bytes(json.dumps(rows).encode() if kind == "json" else text)
    if rng.random() < 0.7:
        path.write_bytes(damaged(path.read_bytes(), rng))
    return path


def test_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str], rng: Random) -> None:
    for number in range(rounds(1500)):
        folder = tmp_path / str(number)
        folder.mkdir()
        path = write_rows(folder, rng)
        config = json.dumps({"sources": [{"uri": str(path)}], "validation_size": 0, "test_size": 0})
        arguments = ["data-prep", "--config-json", config, "--store", str(tmp_path / "store")]
        check(arguments, capsys, (path.name, path.read_bytes()))


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "config.json", "chat_template.jinja"])
def test_base_models(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], rng: Random) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(json.dumps({"prompt": f"q{i}", "completion": f"a{i}"}) for i in range(12)))
    store = str(tmp_path / "store")
    config = json.dumps({"sources": [{"uri": str(rows)}], "validation_size": 0, "test_size": 0})
    assert main(["data-prep", "--config-json", config, "--store", store]) == 0
    reference = capsys.readouterr().out.strip()
    original = (MODEL / name).read_bytes()
    for number in range(rounds(150)):
        folder = tmp_path / str(number)
        folder.mkdir()
        for path in MODEL.iterdir():
            if path.is_file() and path.suffix != ".py":
                (folder / path.name).symlink_to(path)
        (folder / name).unlink()
        parsed = number % 2 and name.endswith(".json")
        changed = json.dumps(mutated(json.loads(original), rng)).encode() if parsed else damaged(original, rng)
        (folder / name).write_bytes(changed)
        arguments = ["chat-format", "--rows", reference, "--base-model", str(folder), "--store", store]
        check(arguments, capsys, (name, number, changed[:300]))
