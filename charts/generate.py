"""Write the chart's generated files: the pipelines, the schema of its values, and its README. `make chart` runs it."""

import json
import re
import sys
from pathlib import Path
from typing import Any

import yaml

from finemill.config import parse_config
from finemill.pipelines.catalog import PIPELINES
from finemill.pipelines.cluster import ClusterConfig
from finemill.pipelines.parameters import with_optional_fields
from finemill.pipelines.render_argo import build_argo_template

CHART = Path(__file__).parent / "finemill"
CONFIGS = Path(__file__).parents[1] / "pipelines" / "configs"
QUANTITY = {"pattern": r"^[0-9.]+(m|[kKMGT]i?)?$"}
# What the default of a value cannot tell about the others that are allowed.
RULES: dict[str, dict[str, Any]] = {
    "store": {"pattern": "^s3://[a-z0-9.-]+(/.*)?$"},
    "images.pullPolicy": {"enum": ["IfNotPresent", "Always", "Never"]},
    "images.cpu.digest": {"pattern": "^(sha256:[0-9a-f]{64})?$"},
    "images.train.digest": {"pattern": "^(sha256:[0-9a-f]{64})?$"},
    "images.pullSecrets": {"items": {"type": "string"}},
    "gpu.count": {"minimum": 0},
    "gpu.memoryGiB": {"type": "number", "minimum": 0},
    "gpu.sharedMemory": QUANTITY,
    "gpu.nodeSelector": {"additionalProperties": {"type": "string"}},
    "gpu.tolerations": {"items": {"type": "object"}},
    "schedule.cron": {"pattern": r"^\S+( \S+){4}$"},
    "serviceAccount.annotations": {"additionalProperties": {"type": "string"}},
    "workflow.terminationGracePeriodSeconds": {"minimum": 1},
    "workflow.ttlSeconds": {"minimum": 1},
    "trainingRuntime.numNodes": {"minimum": 1},
    **{f"resources.{size}.{unit}": QUANTITY for size in ("small", "large", "gpu") for unit in ("cpu", "memory")},
    **{
        f"networkPolicy.{name}Ports": {"items": {"type": "integer", "minimum": 1, "maximum": 65535}}
        for name in ("apiServer", "s3", "mlflow", "hub")
    },
}
TYPES = {bool: "boolean", int: "integer", float: "number", str: "string", list: "array"}


def read_comments(text: str) -> dict[str, str]:
    """The comment above each value of a YAML file, by dotted path."""
    comments: dict[str, str] = {}
    path: list[str] = []
    pending: list[str] = []
    for line in text.splitlines():
        key = re.match(r"( *)([A-Za-z0-9]+):", line)
        if line.lstrip().startswith("# "):
            pending.append(line.lstrip()[2:])
        elif key:
            path = [*path[: len(key[1]) // 2], key[2]]
            comments[".".join(path)] = " ".join(pending)
            pending = []
    return comments


def schema_of(value: Any, path: str, comments: dict[str, str]) -> dict[str, Any]:
    """A strict JSON schema: a mapping with defaults knows its keys, an empty one is free."""
    described = {"description": comments[path]} if comments.get(path) else {}
    if isinstance(value, dict):
        if not value:
            return {"type": "object", **described, **RULES.get(path, {})}
        properties = {key: schema_of(item, f"{path}.{key}".lstrip("."), comments) for key, item in value.items()}
        return {"type": "object", **described, "additionalProperties": False, "properties": properties}
    return {"type": TYPES[type(value)], **described, **RULES.get(path, {})}


def readme_rows(value: Any, path: str, comments: dict[str, str]) -> list[str]:
    """One table row per value."""
    if isinstance(value, dict) and value:
        return [row for key, item in value.items() for row in readme_rows(item, f"{path}.{key}".lstrip("."), comments)]
    return [f"| `{path}` | `{json.dumps(value)}` | {comments[path].replace('|', '/')} |"]


def generate() -> dict[Path, str]:
    """Every generated file's text, by path."""
    values_text = (CHART / "values.yaml").read_text()
    values, comments = yaml.safe_load(values_text), read_comments(values_text)
    schema = {"$schema": "http://json-schema.org/draft-07/schema#", **schema_of(values, "", comments)}
    # Helm itself passes these down to charts that are parts of others.
    schema["properties"]["global"] = {"type": "object"}
    table = "\n".join(["| value | default | meaning |", "| --- | --- | --- |", *readme_rows(values, "", comments)])
    files = {
        CHART / "values.schema.json": json.dumps(schema, indent=2) + "\n",
        CHART / "README.md": (CHART / "README.md.gotmpl").read_text().replace("VALUES\n", table + "\n"),
    }
    for name, pipeline in PIPELINES.items():
        config = CONFIGS / f"{name}.yaml"
        values = yaml.safe_load(config.read_text()) if config.exists() else {}
        parsed = parse_config(with_optional_fields(pipeline.config), values, str(config))
        defaults = parsed.model_dump(mode="json", exclude_unset=True, by_alias=True)
        text = build_argo_template(pipeline, defaults, ClusterConfig()).to_yaml()
        files[CHART / "workflows" / f"{name}.yaml"] = text
    return files


if __name__ == "__main__":
    for file, content in generate().items():
        file.write_text(content)
        print(file, file=sys.stderr)
