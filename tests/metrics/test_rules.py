import pytest

from finemill.errors import UserError
from finemill.metrics.rules import keeps_pattern, keeps_schema, read_schema

SCHEMA = '{"type": "object", "required": ["name"], "properties": {"age": {"type": "integer", "minimum": 0}}}'


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ('{"name": "Ann", "age": 3}', True),
        ('<think>\nhm\n</think>\n\n```json\n{"name": "Ann"}\n```', True),
        ('{"name": "Ann", "age": -3}', False),
        ('{"age": 3}', False),
        ('Here it is: {"name": "Ann"}', False),
        ('{"name": "Ann", "age": NaN}', False),
        ('<think>\n{"name": "Ann"}', False),
        ("[" * 100_000, False),
        ("", False),
    ],
)
def test_json_by_its_schema(text: str, kept: bool) -> None:
    assert keeps_schema(text, SCHEMA) is kept


def test_a_pattern_is_for_the_whole_answer() -> None:
    assert keeps_pattern("<think>\nhm\n</think>\n\n2024-05-01\n", r"\d{4}-\d\d-\d\d")
    assert not keeps_pattern("on 2024-05-01", r"\d{4}-\d\d-\d\d")


def test_a_broken_rule_is_named() -> None:
    with pytest.raises(UserError, match="no regular expression: missing"):
        keeps_pattern("a", "(")
    for schema in ("{", '{"type": "text"}'):
        with pytest.raises(UserError, match="no JSON schema"):
            read_schema(schema)
