"""Nothing that is written is unused: vulture's search, over source and tests."""

from pathlib import Path

from vulture import Vulture

from finemill.pipelines.catalog import PIPELINES
from finemill.runtime.catalog import STEPS

ROOT = Path(__file__).parents[1]
FOLDERS = ("src", "components", "kernels", "pipelines", "charts", "tests")
KINDS = ("class", "function", "import", "method", "property", "unreachable_code")
"""Not attributes and variables: people read fields of records, and libraries what is set on their objects."""
CALLED_BY_OTHERS = (
    "test_*",
    "pytest_*",
    "on_*",  # transformers' callbacks
    "do_*",  # http.server
    "log_message",
    "redirect_request",  # urllib's handler
    "handle_*",  # html.parser and socketserver
    "get_current_*",  # Triton's driver
    "get_kfp_healthz",  # kfp's client, when it is made
    "get_seq_length",  # transformers' cache layers
    "_render_block",  # jinja2, by the name that is given to call_method
)
DECORATORS = ("@*fixture*", "@*validator*", "@*pipeline*", "@*component*", "@*route*", "@*errorhandler*")


def test_every_function_and_class_is_used() -> None:
    vulture = Vulture(ignore_names=list(CALLED_BY_OTHERS), ignore_decorators=list(DECORATORS))
    # The links in src/finemill lead to folders that are read under their own names.
    vulture.scavenge([ROOT / folder for folder in FOLDERS], exclude=[f"{ROOT}/src/finemill/{f}/*" for f in FOLDERS])
    by_string = {step.state_name.split(":")[1] for step in STEPS.values() if step.state_name}
    by_string |= {step.module_name for step in STEPS.values()}
    by_string |= {pipeline.config.__name__ for pipeline in PIPELINES.values()}
    unused = [item for item in vulture.get_unused_code() if item.typ in KINDS and item.name not in by_string]
    assert [f"{item.filename}:{item.first_lineno}: {item.typ} {item.name}" for item in unused] == []
