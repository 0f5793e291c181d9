import json

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
    for schema in ("{", '{"type": "text"}', "5", '{"pattern": "("}'):
        with pytest.raises(UserError, match="no JSON schema"):
            read_schema(schema)


@pytest.mark.parametrize("reference", ["#/$defs/name", "http://127.0.0.1/name.json", "#name"])
def test_a_reference_to_nothing_is_named_before_the_first_answer(reference: str) -> None:
    with pytest.raises(UserError, match="refers to what it does not hold"):
        read_schema({"properties": {"name": {"$ref": reference}}})


def test_what_a_schema_refers_to_is_read_from_it() -> None:
    schema = {"$ref": "#/$defs/name", "$defs": {"name": {"type": "string"}}}
    assert keeps_schema('"Ann"', read_schema(schema))
    assert not keeps_schema("5", read_schema(schema))
    with pytest.raises(UserError, match="to itself without end"):
        keeps_schema("5", '{"$ref": "#"}')


def test_a_pattern_that_takes_forever_is_not_kept() -> None:
    assert not keeps_schema(json.dumps("a" * 40 + "!"), '{"type": "string", "pattern": "^(a+)+b$"}')
    assert keeps_schema('"\N{LATIN SMALL LETTER E WITH ACUTE}"', r'{"pattern": "^\\p{L}+$"}')
