import pytest
import yaml

from finemill.commands.pipeline_argument import default_config_file
from finemill.config import parse_config
from finemill.errors import UserError
from finemill.pipelines.align import ALIGN
from finemill.pipelines.config import AlignConfig
from finemill.pipelines.parameters import run_parameters, with_optional_fields

ROWS = {"sources": [{"uri": "rows.jsonl"}]}


def test_the_default_promotes_what_prefers_the_chosen_answers_and_still_ends_them() -> None:
    file = default_config_file(ALIGN)
    assert file is not None
    config = parse_config(AlignConfig, yaml.safe_load(file.read_text()), "align.yaml")
    assert [gate.metric for gate in config.promote.gates if gate.controls_base] == ["preference_accuracy"]
    assert "format_ok" in {gate.metric for gate in config.promote.gates}
    assert run_parameters(config)["promote"]["gates"]


@pytest.mark.parametrize(
    ("values", "message"), [({}, "'promote': Field required"), ({"promote": {"confidence": 0.9}}, "give gates")]
)
def test_a_configuration_without_gates_is_refused(values: dict[str, object], message: str) -> None:
    """Promote's own ask for a lower loss, which aligning raises as a rule: nothing would ever be promoted."""
    with pytest.raises(UserError, match=message):
        parse_config(AlignConfig, {"data_prep": ROWS, **values}, "my.yaml")


def test_a_submitted_run_may_leave_the_installed_gates() -> None:
    config = parse_config(with_optional_fields(AlignConfig), {"base_model": "hf://o/m@r"}, "submit")
    assert config.model_dump()["promote"] is None
