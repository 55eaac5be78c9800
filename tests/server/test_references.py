"""Pointers: where they lead, and what becomes of those that lead nowhere from the root."""

import json

import jsonschema
import pytest

from kimi_jax.server import grammar
from kimi_jax.server.references import rebase, references, resolve
from tests.server.schemas import EMBEDDED, SCHEMAS
from tests.server.walks import Walker

ROOT = {"a": [1, {"b/c": 2, "d~e": 3, "f g%": 4}], "": 5}


@pytest.mark.parametrize(
    ("ref", "target"),
    [
        ("#", ROOT),
        ("#/a/0", 1),
        ("#/a/1/b~1c", 2),
        ("#/a/1/d~0e", 3),
        ("#/a/1/f%20g%25", 4),
        ("#/", 5),
        ("#/a/2", None),
        ("#/a/-1", None),
        ("#/b", None),
        ("#/a/0/x", None),
        ("#anchor", None),
        ("https://example.com", None),
    ],
)
def test_resolve(ref, target):
    assert resolve(ROOT, ref) == target


def test_references_are_those_of_schemas():
    assert references({"$ref": "#/a", "anyOf": [{"$ref": "#/b"}], "const": {"$ref": "#/c"}}) == {"#/a", "#/b"}


NAMES = ["enum", "const", "default", "example", "examples", "properties", "$defs", "$id", "$ref"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("key", ["properties", "patternProperties", "dependentSchemas", "$defs", "definitions"])
def test_names_that_look_like_keywords_hold_schemas(key, name):
    assert references({key: {name: {"$ref": "#/a"}}}) == {"#/a"}
    inner = {key: {name: {"$ref": f"#/{key}/x"}, "x": {}}}
    assert rebase({"items": inner})["items"][key][name] == {"$ref": f"#/items/{key}/x"}


@pytest.mark.parametrize("name", NAMES)
def test_properties_named_like_keywords_work(name, vocabulary, tokenizer):
    schema = {
        "type": "object",
        "properties": {name: {"type": "array", "items": {"$ref": f"#/$defs/{name}"}, "minItems": 1}},
        "required": [name],
        "additionalProperties": False,
        "$defs": {name: {"$ref": "#/$defs/A"}, "A": {"enum": [1, "x"]}},
    }
    walker, outer = Walker(tokenizer, seed=3), {"type": "array", "items": schema, "minItems": 1, "maxItems": 1}
    for source, unwrapped in ((schema, lambda value: value), (outer, lambda value: value[0])):
        ids = walker.walk(vocabulary.matcher(grammar.of_schema(source)))
        assert ids is not None
        value = unwrapped(json.loads(tokenizer.decode(ids)))
        jsonschema.Draft202012Validator(schema).validate(value)


def test_pointers_that_lead_somewhere_stay():
    for schema in SCHEMAS:
        assert rebase(schema) == schema


def test_the_nearest_enclosing_schema_is_taken():
    inner = {"items": {"$ref": "#/$defs/x"}, "$defs": {"x": {"type": "null"}}}
    schema = {"properties": {"p/q": {"anyOf": [inner, {"$ref": "#/$defs/x"}]}}}
    (first, second) = rebase(schema)["properties"]["p/q"]["anyOf"]
    assert first["items"] == {"$ref": "#/properties/p~1q/anyOf/0/$defs/x"}
    assert second == {"$ref": "#/$defs/x"}  # leads nowhere, and is refused later
    assert rebase({"properties": {"p": {"$id": "own", **inner}}}) == {"properties": {"p": {"$id": "own", **inner}}}


@pytest.mark.parametrize("schema", EMBEDDED, ids=lambda s: json.dumps(s)[:40])
def test_embedded_roots_work(schema, vocabulary, tokenizer):
    walker = Walker(tokenizer, seed=2)
    outer = {
        "type": "object",
        "properties": {"é value": schema},
        "required": ["é value"],
        "additionalProperties": False,
    }
    for _ in range(5):
        ids = walker.walk(vocabulary.matcher(grammar.of_schema(outer)))
        if ids is not None:
            jsonschema.Draft202012Validator(schema).validate(json.loads(tokenizer.decode(ids))["é value"])
