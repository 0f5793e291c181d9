import pytest

from finemill.components.data_prep.config import DataPrepConfig
from finemill.config import parse_config
from finemill.errors import UserError


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"test_size": 0.5, "validation_size": 0.5}, "leave no training rows"),
        ({"sources": [{"uri": "a", "weight": 1}, {"uri": "b"}]}, "1 of 2 have a weight"),
        (
            {"sources": [{"uri": "a"}, {"uri": "b", "weight": 1, "into": "test"}]},
            "into validation or test has no weight",
        ),
        ({"min_characters": 9, "max_characters": 3}, "max_characters 3 is below min_characters 9"),
        ({"sources": []}, "'sources'"),
        ({"sources": [{"uri": "a", "ratio": 1}]}, r"unknown key 'sources.0.ratio'"),
        ({"sources": [{"uri": "a", "shape": "poem"}]}, r"sources.0.shape"),
    ],
)
def test_fields_that_contradict_each_other_are_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_config(DataPrepConfig, {"sources": [{"uri": "a"}], **fields}, "data-prep")


def test_every_source_has_a_name_of_its_own() -> None:
    sources = [{"uri": "a", "weight": 3, "split": "train"}, {"uri": "b", "weight": 1}, {"uri": "a", "weight": 2}]
    config = parse_config(DataPrepConfig, {"sources": sources}, "data-prep")
    assert config.source_names == ["a (1)", "b", "a (3)"]
    assert config.mix is not None
    assert config.mix.weights == {"a (1)": 3, "b": 1, "a (3)": 2}
