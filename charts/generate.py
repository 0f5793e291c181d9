"""Write the chart's generated files: the pipelines, the schema of its values, and its README. `make chart` runs it."""

import json
import re
import sys
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from hera.workflows.models import Affinity, EnvVarSource, Volume, VolumeMount

from finemill.config import parse_config
from finemill.credentials import SECRET_VARIABLES
from finemill.pipelines.affinity import AFFINITY_RULES
from finemill.pipelines.catalog import PIPELINES
from finemill.pipelines.cluster import CACHE_PATH, SHARED_MEMORY_PATH, ClusterConfig
from finemill.pipelines.names import (
    ARGO_PATH,
    ARGO_VOLUME,
    FILE_KEY,
    HIGHEST_ID,
    IMAGE_PATHS,
    LABEL_KEY,
    LABEL_VALUE,
    LONGEST_NAME,
    LONGEST_S,
    MOUNT_PATH,
    NAME,
    OWN_LABEL,
    PASSWORD,
    REPOSITORY,
    RESOURCE,
    SHORT_NAME,
    TAG,
    VARIABLE,
)
from finemill.pipelines.parameters import SHARED_STORE, with_optional_fields
from finemill.pipelines.quantity import CPU_PATTERN, MEMORY_PATTERN
from finemill.pipelines.render_argo import build_argo_template
from finemill.pipelines.schedule import cron_pattern
from finemill.runtime.images import IMAGES

CHART = Path(__file__).parent / "finemill"
CONFIGS = Path(__file__).parents[1] / "pipelines" / "configs"
# --set gives numbers for what looks like one.
NOT_ZERO = {"not": {"type": "string", "pattern": "^[0.]+([a-zA-Z]|$)"}}
CPU = {"type": ["string", "number"], "pattern": CPU_PATTERN, "exclusiveMinimum": 0, **NOT_ZERO}
MEMORY = {"type": ["string", "integer"], "pattern": MEMORY_PATTERN, "minimum": 2**20, **NOT_ZERO}
# Everybody who may read the ConfigMap would read a password in it.
PORT = "(6553[0-5]|655[0-2][0-9]|65[0-4][0-9]{2}|6[0-4][0-9]{3}|[1-5][0-9]{4}|[1-9][0-9]{0,3})"
URL = {"pattern": rf"^(https?://([^\[\]/\s@:]+|\[[0-9A-Fa-f:.]+\])(:{PORT})?(/\S*)?)?$"}
NAMED = {"pattern": f"^$|{NAME}", "maxLength": LONGEST_NAME}
# Argo would evaluate it.
PLAIN = {"type": "string", "not": {"pattern": r"\{\{"}}
# Whoever may read workflows would read the password.
OPEN = {"type": "string", "not": {"pattern": rf"\{{\{{|{PASSWORD}"}}
KEYS = {"propertyNames": {"pattern": LABEL_KEY}}
LABELS = {"additionalProperties": {"type": "string", "pattern": LABEL_VALUE}, **KEYS}
TOLERATIONS = {
    "items": {
        "type": "object",
        "additionalProperties": False,
        "properties": {
            "key": {"type": "string", "pattern": f"^$|{LABEL_KEY}"},
            "value": {"type": "string", "pattern": LABEL_VALUE},
            "operator": {"enum": ["Exists", "Equal"]},
            "effect": {"enum": ["", "NoSchedule", "PreferNoSchedule", "NoExecute"]},
            "tolerationSeconds": {"type": "integer"},
        },
        "if": {"properties": {"operator": {"const": "Exists"}}, "required": ["operator"]},
        "then": {"properties": {"value": {"const": ""}}},
        "else": {"properties": {"key": {"minLength": 1}}, "required": ["key"]},
        "dependencies": {
            "tolerationSeconds": {"properties": {"effect": {"const": "NoExecute"}}, "required": ["effect"]}
        },
    }
}
ENVIRONMENT = {
    "items": {
        "type": "object",
        "additionalProperties": False,
        "required": ["name"],
        "properties": {
            "name": {"type": "string", "pattern": VARIABLE},
            "value": OPEN,
            "valueFrom": {"allOf": [{"$ref": "#/definitions/EnvVarSource"}, {"minProperties": 1, "maxProperties": 1}]},
        },
        # Whoever may read workflows would read it.
        "if": {"properties": {"name": {"enum": sorted(SECRET_VARIABLES)}}},
        "then": {"properties": {"value": {"const": "from a Secret, by valueFrom"}}},
        "dependencies": {"value": {"properties": {"valueFrom": {"const": "none beside a value"}}}},
    }
}
OF_KUBERNETES = (Affinity, EnvVarSource, Volume, VolumeMount)
"""What values hold as Kubernetes spells it."""
# A name and one source.
VOLUME = {"minProperties": 2, "maxProperties": 2, "properties": {"name": {"pattern": SHORT_NAME}}}
MOUNT = {
    "properties": {
        "mountPath": {"pattern": MOUNT_PATH},
        "subPath": {"not": {"pattern": r"^/|(^|/)\.\.(/|$)"}},
    }
}
_SELECTOR = {"$ref": "#/definitions/LabelSelector"}
_BYTE = "(25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])"
_CIDR = (
    rf"^({_BYTE}(\.{_BYTE}){{3}}/(3[0-2]|[12]?[0-9])|[0-9a-fA-F:]*:[0-9a-fA-F:.]*/(12[0-8]|1[01][0-9]|[1-9]?[0-9]))$"
)
_PORT = {"type": "integer", "minimum": 1, "maximum": 65535}
EGRESS_PORT = {
    "type": "object",
    "additionalProperties": False,
    "properties": {
        "port": {
            "type": ["integer", "string"],
            "minimum": 1,
            "maximum": 65535,
            "pattern": "^[a-z0-9-]*[a-z][a-z0-9-]*$",
        },
        "endPort": _PORT,
        "protocol": {"enum": ["TCP", "UDP", "SCTP"]},
    },
}
EGRESS_PEER = {
    "type": "object",
    "additionalProperties": False,
    "minProperties": 1,
    "properties": {
        "ipBlock": {
            "type": "object",
            "additionalProperties": False,
            "required": ["cidr"],
            "properties": {
                "cidr": {"type": "string", "pattern": _CIDR},
                "except": {"type": "array", "items": {"type": "string", "pattern": _CIDR}},
            },
        },
        "namespaceSelector": _SELECTOR,
        "podSelector": _SELECTOR,
    },
    "dependencies": {"ipBlock": {"maxProperties": 1}},
}
EGRESS = {
    "items": {
        "type": "object",
        "additionalProperties": False,
        "properties": {
            "ports": {"type": "array", "items": EGRESS_PORT},
            "to": {"type": "array", "items": EGRESS_PEER},
        },
    }
}
# As botocore takes it.
REGION = {"pattern": "^$|^[a-zA-Z0-9]([a-zA-Z0-9-]{0,61}[a-zA-Z0-9])?$"}
NAMES = (
    *(f"{service}.existingSecret" for service in ("s3", "mlflow", "hub")),
    *("caBundle.configMap", "cache.existingClaim", "priorityClassName", "serviceAccount.name"),
)
SIZES = ("small", "large", "gpu")
VOLUMES = ("tmp", "cache", "shared-memory", "ca-bundle", ARGO_VOLUME)
PATHS = ("/tmp", CACHE_PATH, SHARED_MEMORY_PATH, "/etc/finemill/ca", ARGO_PATH, *IMAGE_PATHS)
TIMEZONES = resources.files("tzdata").joinpath("zones").read_text().split()


def _but(key: str, taken: tuple[str, ...]) -> dict[str, Any]:
    """What the steps' pods have already."""
    return {"properties": {key: {"not": {"enum": list(taken)}}}}


ID = {"type": "integer", "minimum": 0, "maximum": HIGHEST_ID}
POD_SECURITY = {
    "additionalProperties": False,
    "properties": {
        "runAsUser": {**ID, "minimum": 1},
        "runAsGroup": ID,
        "fsGroup": ID,
        "supplementalGroups": {"type": "array", "items": ID},
    },
}

# What the default of a value cannot tell about the others that are allowed.
RULES: dict[str, dict[str, Any]] = {
    "store": {"pattern": SHARED_STORE},
    "s3.endpointUrl": URL,
    "s3.region": REGION,
    "hub.endpoint": URL,
    # Plug-ins have schemes of their own; a host and a port are none.
    "mlflow.trackingUri": {
        "not": {"pattern": "^[^/:]+:[0-9]+(/|$)|//[^/@]*:[^/@]*@|[?&][^=]*(token|secret|password|key)="}
    },
    "images.pullPolicy": {"enum": ["IfNotPresent", "Always", "Never"]},
    "images.cpu.digest": {"pattern": "^(sha256:[0-9a-f]{64})?$"},
    "images.train.digest": {"pattern": "^(sha256:[0-9a-f]{64})?$"},
    **{f"images.{role}.repository": {"pattern": REPOSITORY} for role in IMAGES},
    **{f"images.{role}.tag": {"pattern": f"^$|{TAG}"} for role in IMAGES},
    **dict.fromkeys(NAMES, NAMED),
    "gpu.queue": {"pattern": f"^$|{SHORT_NAME}"},
    "gpu.queuePriority": {"pattern": f"^$|{SHORT_NAME}"},
    "images.pullSecrets": {"items": {"type": "string", **NAMED, "minLength": 1}},
    "caBundle.key": {"pattern": FILE_KEY},
    "gpu.resource": {"pattern": RESOURCE},
    "gpu.count": {"minimum": 0},
    "gpu.memoryGiB": {"type": "number", "minimum": 0},
    "images.registry": {"pattern": r"^([^/\s]+(/[^/\s]+)*)?$"},
    "gpu.sharedMemory": MEMORY,
    "gpu.nodeSelector": LABELS,
    "gpu.tolerations": TOLERATIONS,
    "extraEnv": ENVIRONMENT,
    "affinity": {"$ref": "#/definitions/Affinity"},
    "extraVolumes": {
        "items": {"allOf": [{"$ref": "#/definitions/Volume"}, VOLUME, _but("name", VOLUMES)]},
    },
    "extraVolumeMounts": {
        "items": {"allOf": [{"$ref": "#/definitions/VolumeMount"}, MOUNT, _but("mountPath", PATHS)]},
    },
    "networkPolicy.extraEgress": EGRESS,
    "podLabels": {**LABELS, "propertyNames": {"pattern": LABEL_KEY, "not": {"pattern": OWN_LABEL}}},
    "podSecurityContext": POD_SECURITY,
    "podAnnotations": {"additionalProperties": PLAIN, **KEYS},
    "nodeSelector": LABELS,
    "tolerations": TOLERATIONS,
    # A schedule's name may have 52 characters, `retrain` in it.
    "workflow.namePrefix": {"pattern": "^([a-z0-9]([a-z0-9-]*))?$", "maxLength": 40},
    "schedule.cron": {"pattern": cron_pattern()},
    "schedule.timezone": {"enum": TIMEZONES},
    "serviceAccount.annotations": {"additionalProperties": {"type": "string"}, **KEYS},
    "workflow.terminationGracePeriodSeconds": {"minimum": 1, "maximum": LONGEST_S},
    "workflow.timeoutSeconds": {"minimum": 0, "maximum": LONGEST_S},
    "workflow.ttlSeconds": {"minimum": 1, "maximum": LONGEST_S},
    "trainingRuntime.numNodes": {"minimum": 1},
    **{f"resources.{size}.cpu": CPU for size in SIZES},
    **{f"resources.{size}.memory": MEMORY for size in SIZES},
    **{f"resources.{size}.ephemeralStorage": {**MEMORY, "pattern": f"^$|{MEMORY_PATTERN}"} for size in SIZES},
    **{f"networkPolicy.{name}Ports": {"items": _PORT} for name in ("dns", "apiServer", "s3", "mlflow", "hub")},
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
    if path == "config":
        return {"type": "object", **described, "additionalProperties": False, "properties": config_properties()}
    if isinstance(value, dict):
        if not value:
            return {"type": "object", **described, **RULES.get(path, {})}
        properties = {key: schema_of(item, f"{path}.{key}".lstrip("."), comments) for key, item in value.items()}
        return {"type": "object", **described, "additionalProperties": False, "properties": properties}
    return {"type": TYPES[type(value)], **described, **RULES.get(path, {})}


def config_properties() -> dict[str, Any]:
    """The schema of each pipeline's parameters: texts, and the steps' own configurations."""
    texts = {item.name for pipeline in PIPELINES.values() for item in pipeline.values}
    sections = {name: task.step for pipeline in PIPELINES.values() for name, task in pipeline.sections.items()}
    return {
        **{name: {"type": "string", "minLength": 1, "pattern": r"^(\S(.*\S)?)?$"} for name in sorted(texts)},
        **{name: {"$ref": f"#/definitions/{step.section_class.__name__}"} for name, step in sorted(sections.items())},
    }


def definitions() -> dict[str, Any]:
    """The schemas of the steps' configurations and of what they hold, by class."""
    sections = {task.step.section_class for pipeline in PIPELINES.values() for task in pipeline.sections.values()}
    found: dict[str, Any] = {}
    for model in sections:
        schema = model.model_json_schema(ref_template="#/definitions/{model}")
        found |= {**schema.pop("$defs", {}), model.__name__: schema}
    for shape in OF_KUBERNETES:
        schema = shape.model_json_schema(ref_template="#/definitions/{model}")
        found |= {
            name: _strict(item, AFFINITY_RULES.get(name))
            for name, item in {**schema.pop("$defs", {}), shape.__name__: schema}.items()
        }
    return dict(sorted((name, _without_texts(schema)) for name, schema in found.items()))


def _strict(schema: dict[str, Any], rules: dict[str, Any] | None) -> dict[str, Any]:
    """The schema of a class of Kubernetes without what is null and keys that it does not have, and with its rules."""
    if "properties" not in schema:
        return schema
    properties = {name: item["anyOf"][0] if "anyOf" in item else item for name, item in schema["properties"].items()}
    strict = {**schema, "properties": properties, "additionalProperties": False}
    return {**strict, "allOf": [rules]} if rules else strict


def _without_texts(schema: Any) -> Any:
    """A schema without titles and descriptions, which `finemill schema` has; a field of such a name is a mapping."""
    if isinstance(schema, dict):
        return {
            key: _without_texts(value)
            for key, value in schema.items()
            if key not in ("title", "description") or not isinstance(value, str)
        }
    return [_without_texts(item) for item in schema] if isinstance(schema, list) else schema


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
    schema["properties"] |= {"global": {"type": "object"}, "enabled": {"type": "boolean"}}
    schema["definitions"] = definitions()
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
