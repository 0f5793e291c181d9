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


@pytest.mark.parametrize(
    ("schema", "kept", "broken"),
    [
        ({"multipleOf": 0.1}, "0.3", "0.35"),
        ({"multipleOf": 0.5}, "1" + "0" * 400, "0.25"),
        ({"pattern": r"^\d\w$"}, '"1a"', '"1\u00e9"'),
        ({"pattern": "^ab$"}, '"ab"', r'"ab\n"'),
        ({"patternProperties": {r"^\p{L}$": {"type": "string"}}}, '{"\u00e9": "a"}', '{"\u00e9": 1}'),
        ({"patternProperties": {r"^\p{L}$": {}}, "additionalProperties": False}, '{"\u00e9": 1}', '{"1": 1}'),
        ({"additionalProperties": {"type": "integer"}, "properties": {"a": {}}}, '{"a": "", "b": 1}', '{"b": ""}'),
        ({"format": "hostname"}, '"a-b.com"', '"-a.com"'),
        ({"format": "email"}, '"a.b@c.org"', '"@"'),
        ({"format": "duration"}, '"P1DT2H"', '"1 day"'),
        ({"format": "json-pointer"}, '"/a/0"', '"a"'),
        ({"format": "uri-reference"}, '"/a?b#c"', '"a b"'),
        ({"enum": [{"$ref": "#/none"}]}, '{"$ref": "#/none"}', "1"),
        ({"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "string"}}}, '"a"', "1"),
        ({"name": "x", "strict": True, "schema": {"type": "string"}}, '"a"', "1"),
    ],
)
def test_schemas_mean_what_their_standard_says(schema: dict[str, object], kept: str, broken: str) -> None:
    rule = read_schema(schema)
    assert (keeps_schema(kept, rule), keeps_schema(broken, rule)) == (True, False)


def test_names_of_properties_take_no_forever_either() -> None:
    schema = {"patternProperties": {"^(a+)+b$": {"type": "string"}}, "additionalProperties": {"type": "integer"}}
    assert keeps_schema(json.dumps({"a" * 40 + "!": 1}), read_schema(schema))
    with pytest.raises(UserError, match="no JSON schema: NaN"):
        read_schema('{"maximum": NaN}')


def test_a_fence_may_be_on_one_line() -> None:
    assert keeps_schema('```json {"name": "Ann"} ```', SCHEMA)
