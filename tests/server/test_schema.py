"""What normalising a schema takes out, keeps and refuses; which schemas have a finite value."""

import itertools
import random

import jsonschema
import pytest

from kimi_jax.errors import UserError
from kimi_jax.server import schema as schemas
from kimi_jax.server.disjoint import Disjoint
from kimi_jax.server.finite import Finite

STRING, INTEGER = {"type": "string"}, {"type": "integer"}


def test_names_and_values_that_look_like_keywords_stay():
    schema = {
        "type": "object",
        "properties": {"format": {"enum": ["color"]}, "x-guidance": {"const": {"format": "color"}}, "pattern": STRING},
        "default": {"format": "color"},
    }
    assert schemas.normalize(schema) == schema


def test_what_constrains_nothing_is_taken_out():
    schema = {
        "x-guidance": {},
        "anyOf": [{"type": "string", "format": "color"}, {"type": "array", "uniqueItems": False}],
        "propertyNames": STRING,
    }
    assert schemas.normalize(schema) == {"anyOf": [{"type": "string"}, {"type": "array"}]}
    assert schemas.normalize({"propertyNames": {"minLength": 1}}) == {"propertyNames": {"minLength": 1}}
    assert schemas.normalize({"format": "uuid", "uniqueItems": True}) == {"format": "uuid", "uniqueItems": True}


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (r"^[^a]\[^b\][c^]\\[^d]", r"^[^\x00a]\[^b\][c^]\\[^\x00d]"),
        (r"\w[\w.][^\w]\d[^\d]", r"\w[\w.][^\x00\w\p{L}\p{M}\p{N}]\d[^\x00\d\p{N}]"),
        (r"\W[\D]", r"[^\x00\w\p{L}\p{M}\p{N}][[^\x00\d\p{N}]]"),
        (r"[^\W\d_]", r"[^\x00[^A-Za-z0-9_]\d\p{N}_]"),
        (r"[^\D]", r"[^\x00[^0-9]]"),
        (r"a\.b$", r"a\.b$"),
        (r"[a&&[^b]~[:w:]\w", r"[a\&\&\[^b]~[:w:]\w"),
        (r"^[^\x00-\x1f\u007F]\\0\<\>$", r"^[^\x00\x00-\x1f\u007F]\\0<>$"),
    ],
)
def test_patterns_are_narrowed(before, after):
    assert schemas.normalize({"pattern": before}) == {"pattern": after}
    assert schemas.normalize({"patternProperties": {before: INTEGER}}) == {"patternProperties": {after: INTEGER}}


@pytest.mark.parametrize("pattern", [r"[\x00-a]", r"\u0000", r"\0", "[\0-a]"])
def test_nul_in_a_pattern_is_refused(pattern):
    with pytest.raises(UserError, match="NUL"):
        schemas.normalize({"pattern": pattern})


@pytest.mark.parametrize("pattern", ["^[]a]$", "^[^]a]$"])
def test_a_class_that_dialects_end_at_other_places_is_refused(pattern):
    with pytest.raises(UserError, match="first in a class"):
        schemas.normalize({"pattern": pattern})


ENDLESS = {"type": "object", "properties": {"more": {"$ref": "#/$defs/e"}}, "required": ["more"]}


def with_endless(schema):
    return {**schema, "$defs": {"e": ENDLESS}}


@pytest.mark.parametrize(
    ("schema", "finite"),
    [
        ({}, True),
        (False, False),
        (with_endless({"$ref": "#/$defs/e"}), False),
        (with_endless({"type": "object", "properties": {"a": {"$ref": "#/$defs/e"}}}), True),
        (with_endless({"type": "object", "properties": {"a": {"$ref": "#/$defs/e"}}, "required": ["a"]}), False),
        (with_endless({"type": "object", "additionalProperties": {"$ref": "#/$defs/e"}, "required": ["a"]}), False),
        (with_endless({"anyOf": [{"$ref": "#/$defs/e"}, STRING]}), True),
        (with_endless({"allOf": [{"$ref": "#/$defs/e"}, {}]}), False),
        (with_endless({"type": "array", "items": {"$ref": "#/$defs/e"}}), True),
        (with_endless({"type": "array", "items": {"$ref": "#/$defs/e"}, "minItems": 1}), False),
        (with_endless({"type": "array", "prefixItems": [STRING], "items": {"$ref": "#/$defs/e"}, "minItems": 1}), True),
        (
            with_endless({"type": ["object", "null"], "required": ["a"], "properties": {"a": {"$ref": "#/$defs/e"}}}),
            True,
        ),
        ({"$ref": "#"}, False),
        ({"$ref": "https://elsewhere"}, True),
        (
            {
                "$ref": "#/$defs/a",
                "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"anyOf": [{"$ref": "#/$defs/a"}, STRING]}},
            },
            True,
        ),
        ({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"anyOf": [{"$ref": "#/$defs/a"}]}}}, False),
    ],
)
def test_finite(schema, finite):
    assert Finite(schema)(schema) is finite


def test_endless_parts_are_closed_off():
    schema = with_endless({"type": "object", "properties": {"a": {"$ref": "#/$defs/e"}, "b": INTEGER}})
    assert schemas.normalize(schema)["properties"] == {"a": False, "b": INTEGER}
    schema = with_endless({"type": "array", "items": {"anyOf": [{"$ref": "#/$defs/e"}, INTEGER]}})
    assert schemas.normalize(schema)["items"] == {"anyOf": [INTEGER]}


def random_schema(rng, depth=3):
    """Of the parts by which alternatives are told apart, and some by which they are not."""
    inner = [lambda: random_schema(rng, depth - 1)] * 2
    schema = {}
    for key, value in {
        "type": lambda: rng.choice(["object", "integer", "number", "boolean", ["object", "null"], ["string", "array"]]),
        "const": lambda: rng.choice(ATOMS),
        "enum": lambda: rng.sample(ATOMS, 3),
        "properties": lambda: {name: make() for name, make in zip("ab", inner, strict=True)},
        "required": lambda: rng.sample("abc", 2),
        "$ref": lambda: rng.choice(["#/$defs/x", "#/$defs/y", "#/$defs/z"]),
        "allOf": lambda: [make() for make in inner],
        "anyOf": lambda: [make() for make in inner],
        "oneOf": lambda: [make() for make in inner],
        "minimum": lambda: 1,
    }.items():
        if rng.random() < (0.2 if depth else 0.1) and (depth or key in ("type", "const", "enum")):
            schema[key] = value()
    return schema


ATOMS = [None, True, False, 0, 1, 1.0, "", "x", [], [1], [True], {}, {"a": 1}]
PLAIN = [*ATOMS, *({"a": a, "b": b} for a, b in itertools.product(ATOMS, ATOMS))]


def test_no_value_fits_two_of_what_is_disjoint():
    rng, found = random.Random(0), 0
    for _ in range(200):
        defs = {"x": random_schema(rng), "y": random_schema(rng), "z": {}}
        parts = [random_schema(rng), random_schema(rng)]
        root = {"oneOf": parts, "$defs": defs}
        if not Disjoint(root)(parts):
            continue
        found += 1
        both = jsonschema.Draft202012Validator({"allOf": parts, "$defs": defs})
        try:
            assert not any(map(both.is_valid, PLAIN)), root
        except RecursionError:  # a reference to itself
            pass
    assert found > 30


def test_one_of_stays_where_its_name_is_needed():
    pointed_at = {"oneOf": [STRING, INTEGER], "properties": {"a": {"$ref": "#/oneOf/0"}}}
    beside_another = {"oneOf": [STRING, INTEGER], "anyOf": [STRING, INTEGER]}
    many = {"oneOf": [{"const": i} for i in range(1000)]}
    own = {"$defs": {"a": {"$id": "own", "oneOf": [{"$ref": "#/$defs/b"}, STRING]}, "b": INTEGER}}
    inside = {"oneOf": [{"$id": "own", "$ref": "#/$defs/b"}, STRING], "$defs": {"b": INTEGER}}
    for schema in (pointed_at, beside_another, many, own, inside):
        assert schemas.normalize(schema) == schema


def test_what_pointers_lead_to_is_normalised_wherever_it_is():
    pet, narrow = {"pattern": r"[^a]"}, {"pattern": r"[^\x00a]"}
    for before, after in (
        ({"$ref": "#/components/schemas/a~1b", "components": {"schemas": {"a/b": pet, "c": pet}}}, [narrow, pet]),
        ({"$ref": "#/x/1/y", "x": [{"y": pet}, {"y": pet}]}, [narrow, narrow]),
        ({"properties": {"p": {"$ref": "#/properties/q/x"}, "q": {"x": pet}}}, [narrow]),
    ):
        found = str(schemas.normalize(before))
        assert [found.count(str(part)) for part in (narrow, pet)] == [after.count(narrow), after.count(pet)]
    with pytest.raises(UserError, match="too many digits"):
        schemas.normalize({"$ref": "#/x", "x": {"const": -(2**63)}})


def test_alternatives_that_share_definitions_are_judged_fast():
    defs = {f"d{i}": {"anyOf": [{"$ref": f"#/$defs/d{i + 1}"}] * 2} for i in range(60)} | {"d60": INTEGER}
    parts = [{"$ref": "#/$defs/d0"}, STRING]
    assert schemas.normalize({"oneOf": parts, "$defs": defs})["anyOf"] == parts


def test_counting_properties():
    for fine in (
        {"minProperties": 1},
        {"minProperties": 2, "required": ["a"]},
        {"minProperties": 2, "required": ["a", "b"]},
    ):
        assert schemas.normalize(fine) == fine
    with pytest.raises(UserError, match="minProperties 3"):
        schemas.normalize({"minProperties": 3, "required": ["a", "a"]})


def test_deep_nesting_is_refused():
    schema = {}
    for _ in range(5000):
        schema = {"items": schema}
    with pytest.raises(UserError, match="nested too deeply"):
        schemas.normalize(schema)


def test_arguments_are_an_object_without_undeclared_members():
    closed = {"properties": {"a": STRING}, "type": "object", "additionalProperties": False}
    assert schemas.of_parameters({"properties": {"a": STRING}}) == closed
    assert schemas.of_parameters(None) == {"type": "object", "properties": {}, "additionalProperties": False}
    for open_ in (
        {"type": "object"},
        {"type": "object", "properties": {"a": STRING}, "additionalProperties": True},
        {"type": "object", "properties": {"a": STRING}, "required": ["b"]},
        {"type": "object", "properties": {"a": STRING}, "anyOf": [{"required": ["a"]}, {"required": ["b"]}]},
    ):
        assert schemas.of_parameters(open_) == open_
    assert schemas.of_parameters({})["type"] == "object"
    for bad in ({"type": "string"}, {"type": ["object", "null"]}, True, [], "x"):
        with pytest.raises(UserError):
            schemas.of_parameters(bad)


@pytest.mark.parametrize(
    ("given", "normal"),
    [
        ({"exclusiveMinimum": 0, "maximum": 0.25}, {"minimum": 1e-9, "maximum": 0.25}),
        (
            {"minimum": -1, "exclusiveMinimum": 1, "exclusiveMaximum": 1.5},
            {"minimum": 1 + 1e-9, "exclusiveMaximum": 1.5},
        ),
        ({"minimum": -1.5, "exclusiveMaximum": -1}, {"minimum": -1.5, "maximum": -1 - 1e-9}),
        ({"exclusiveMinimum": 0, "exclusiveMaximum": 1}, {"exclusiveMinimum": 0, "exclusiveMaximum": 1}),
        ({"exclusiveMinimum": 0}, {"exclusiveMinimum": 0}),
        ({"exclusiveMinimum": 0.5, "maximum": 0.75}, {"exclusiveMinimum": 0.5, "maximum": 0.75}),
        ({"exclusiveMinimum": True, "minimum": 0}, {"exclusiveMinimum": True, "minimum": 0}),
    ],
)
def test_bounds_that_the_compiler_would_let_through(given, normal):
    assert schemas.normalize(given) == normal
