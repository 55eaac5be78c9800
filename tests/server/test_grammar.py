"""Every value sampled under a mask validates, by jsonschema (2020-12)."""

import itertools
import json
import re
import warnings

import jsonschema
import numpy as np
import pytest

from kimi_jax.data import tokenizer as tk
from kimi_jax.errors import UserError
from kimi_jax.server import grammar
from kimi_jax.server.dialogue import compiled
from kimi_jax.server.errors import ApiError
from kimi_jax.server.grammar import Vocabulary, Without
from tests.server.schemas import INT, REFUSED, SCHEMAS, S, obj
from tests.server.walks import Walker, allowed


@pytest.fixture(scope="module")
def walker(tokenizer):
    return Walker(tokenizer, seed=0)


@pytest.mark.parametrize("schema", SCHEMAS, ids=lambda s: json.dumps(s)[:60])
def test_values_validate(schema, vocabulary, tokenizer, walker):
    jsonschema.Draft202012Validator.check_schema(schema)
    finished = 0
    for _ in range(3):
        ids = walker.walk(vocabulary.matcher(grammar.of_schema(schema)))
        if ids is None:
            continue
        finished += 1
        assert max(ids) < len(tokenizer.pieces)
        value = json.loads(tokenizer.decode_bytes(ids).decode("utf-8"))
        jsonschema.Draft202012Validator(schema).validate(value)
    assert finished


@pytest.mark.parametrize(
    ("schema", "fits"),
    [
        ({"type": "string", "pattern": r"^[^\W\d_]+$", "maxLength": 3}, lambda s: re.fullmatch("[A-Za-z]+", s)),
        ({"type": "string", "format": "time"}, lambda s: int(s[6:8]) < 60),
        ({"type": "string", "format": "date-time"}, lambda s: int(s[17:19]) < 60),
        ({"type": "string", "format": "date-time", "maxLength": 22}, lambda s: len(s) <= 22 and int(s[17:19]) < 60),
    ],
    ids=["letters", "time", "date-time", "short date-time"],
)
def test_what_dialects_and_readers_disagree_on(schema, fits, vocabulary, tokenizer, walker):
    """ECMAScript's word is ASCII; second 60 is a time at 23:59 UTC alone, and many a reader takes none."""
    texts = [walker.walk(vocabulary.matcher(grammar.of_schema(schema))) for _ in range(60)]
    texts = [json.loads(tokenizer.decode_bytes(ids).decode("utf-8")) for ids in texts if ids]
    assert len(texts) > 20 and all(fits(text) for text in texts)


def test_an_object_of_thousands_of_optional_properties(vocabulary, tokenizer):
    matcher = vocabulary.matcher(grammar.of_schema(obj(**{f"p{i}": INT for i in range(3000)})))
    for token in tokenizer.encode('{"p5":1,"p2999":2}'):
        assert token in allowed(matcher.mask())
        matcher.accept(token)
    assert set(allowed(matcher.mask())) >= tokenizer.stop_ids


@pytest.mark.parametrize("schema", REFUSED, ids=lambda s: json.dumps(s)[:60])
def test_what_cannot_be_enforced_is_refused(schema, vocabulary):
    with pytest.raises(UserError) as caught:
        vocabulary.compiled(grammar.of_schema(schema))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("schema", "text"),
    [
        ({"type": "object", "properties": {"a": INT}, "additionalProperties": S}, '{"a":"x"}'),
        ({"type": "object", "properties": {"a": INT}, "additionalProperties": S}, '{"\\u0061":"x"}'),
        ({"type": "object", "properties": {"a": INT}, "additionalProperties": S}, '{"b":"x","a":"x"}'),
        ({"type": "object", "properties": {"n_a": S}, "patternProperties": {"^n_": {"minLength": 2}}}, '{"n_a":"x"}'),
        ({"type": "string", "pattern": '^[^"]$'}, '"\\""'),
        ({"type": "string", "pattern": r"^[^\\]$"}, '"\\\\"'),
        ({"type": "string", "maxLength": 1}, '"ab"'),
        ({"type": "integer"}, "1.5"),
        ({"type": "object"}, '{"a":1'),
        ({"type": "object"}, ' {"a":1}'),
        ({"type": "object"}, "{  }"),
    ],
)
def test_texts_that_do_not_fit(schema, text):
    assert not accepts(grammar.of_schema(schema), text)


@pytest.mark.parametrize(
    "text", ['{"a":"é😀","b":[1,2]}', '{"a": "x", "b": [1, 2]}', '{\n  "a": "x",\n  "b": [\n    1\n  ]\n}']
)
def test_usual_layouts_fit(text):
    schema = {"type": "object", "properties": {"a": S, "b": {"type": "array", "items": INT}}}
    assert accepts(grammar.of_schema(schema), text)


BYTES = Vocabulary(tk.load("bytes"), 520)


def accepts(source, text):
    matcher = BYTES.matcher(source)
    for byte in text.encode():
        if byte not in allowed(matcher.mask()):
            return False
        matcher.accept(byte)
    return BYTES.stop_ids <= set(allowed(matcher.mask()).tolist())


def nested(schema, depth, wrap):
    for _ in range(depth):
        schema = wrap(schema)
    return schema


@pytest.mark.parametrize(
    "schema",
    [
        *(nested(S, depth, lambda inner: obj(["a"], a=inner)) for depth in (64, 100, 250, 900)),
        *({key: nested(1, 900, lambda inner: [inner])} for key in ("const", "default")),
        *({"type": "string", "format": value} for value in (["date"], {}, None)),
        {"type": "number", "maximum": float("inf")},
        {"type": "array", "minItems": float("inf")},
    ],
    ids=lambda s: json.dumps(s)[:40],
)
def test_what_breaks_the_compiler_is_a_bad_request(schema):
    with pytest.raises(ApiError) as caught:
        compiled(BYTES, lambda: grammar.of_schema(schema), "here")
    assert (caught.value.status, caught.value.param) == (400, "here")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("pattern", "texts"),
    [
        (r"^[a-z&&[^b]]$", ["a]", "&]", "[]", "b]", "a"]),
        (r"^[[:alpha:]]$", ["a]", ":]", "a", "b]"]),
        (r"^[^[\]]{2}$", ["ab", "[a", "a]", '"\\']),
        (r"^[~~a&&]$", ["~", "&", "a", "b"]),
        *((pattern, ["a", '"', "\\", "\n"]) for pattern in (r"^[^\x00-\x1f]$", "^[^\0-\x1f]$")),
        (r"^\<\w[\>]$", ["<a>", "a"]),
    ],
)
def test_patterns_match_what_the_validator_matches(pattern, texts):
    schema = {"type": "string", "pattern": pattern}
    source, validator = grammar.of_schema(schema), jsonschema.Draft202012Validator(schema)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of classes that look nested
        fit = [text for text in texts if validator.is_valid(text)]
    assert [text for text in texts if accepts(source, json.dumps(text))] == fit


def test_a_bad_pattern_is_said_in_full():
    with pytest.raises(UserError, match="unclosed group"):
        BYTES.compiled(grammar.of_schema({"type": "string", "pattern": "(a"}))


@pytest.mark.parametrize(
    "value", [-(2**63), 2**53 + 1, 123456789012345678, 2**60, 1e300, 22.027123201874474, [{"a": 2**64}]]
)
@pytest.mark.parametrize("wrap", [lambda v: {"const": v}, lambda v: {"type": "array", "items": {"enum": [1, v]}}])
def test_numbers_of_too_many_digits_are_refused(value, wrap):
    """The compiler would write another number, or abort the process."""
    with pytest.raises(UserError, match="too many digits"):
        grammar.of_schema(wrap(value))


NEAR_2_53 = range(2**53 - 2, 2**53 + 8)


@pytest.mark.parametrize("kind", ["integer", "number"])
@pytest.mark.parametrize("low_name", ["minimum", "exclusiveMinimum"])
@pytest.mark.parametrize("high_name", ["maximum", "exclusiveMaximum"])
def test_bounds_between_doubles_are_narrowed(kind, low_name, high_name):
    for low, high in itertools.product(NEAR_2_53, NEAR_2_53):
        schema = {"type": kind, low_name: low, high_name: high}
        try:
            source = grammar.of_schema(schema)
            BYTES.compiled(source)
        except UserError:
            continue
        validator = jsonschema.Draft202012Validator(schema)
        assert [v for v in NEAR_2_53 if accepts(source, str(v)) and not validator.is_valid(v)] == [], schema


@pytest.mark.parametrize("bounds", [(-(2**63), 2**63 - 1), (0, 2**64 - 1), (-1.7e308, 1.7e308), (-(2**64), 0)])
@pytest.mark.parametrize("kind", ["integer", "number"])
def test_bounds_of_machine_types_are_enforced(kind, bounds):
    source = grammar.of_schema({"type": kind, "minimum": bounds[0], "maximum": bounds[1]})
    for value in (-(10**20), -(2**62), 0, 2**62, 10**20):
        assert accepts(source, str(value)) == (bounds[0] <= value <= bounds[1] and abs(value) < 2**63)


@pytest.mark.parametrize("bound", [{"minimum": 2**63}, {"maximum": -(2**63)}, {"exclusiveMinimum": 1e300}])
def test_bounds_past_64_bits_are_refused(bound):
    with pytest.raises(UserError, match="64 bits"):
        grammar.of_schema({"type": "number", **bound})


def ref(name):
    return {"$ref": f"#/$defs/{name}"}


DEFINITIONS = {
    "Node": obj(["next"], next={"oneOf": [ref("Node"), {"type": "null"}]}),
    "D": obj(["t"], t={"const": "d"}, v=INT),
    "E": obj(["t"], t=ref("Kind"), v=S),
    "Kind": {"enum": ["e", "f"]},
    "Either": {"oneOf": [ref("D"), ref("E")]},
}
VALUES = [None, True, False, 0, 1, 1.0, 2, "", "d", [], [1], {}]
VALUES += [{"next": None}, {"next": {"next": None}}, {"next": {"next": 1}}]
VALUES += [{"t": t} for t in ("d", "e", "f", "g", 0, 1, True)] + [{"t": "d", "v": 1}, {"t": "e", "v": 1}]


@pytest.mark.parametrize(
    "alternatives",
    [
        [ref("Node"), {"type": "null"}],
        [ref("D"), ref("E")],
        [ref("D"), {"type": "string"}],
        [ref("Either"), {"type": ["null", "boolean"]}, {"type": "string"}],
        [{"const": 1}, {"const": 2}, {"const": True}],
        [{"const": [1]}, {"const": []}, {"enum": [{}, {"t": "d"}]}],
        [obj(["t"], t={"const": 0}), obj(["t"], t={"const": 1}), obj(["t"], t={"const": True})],
        [obj(["t"], t={"const": 1}), {"allOf": [ref("D")]}, ref("E")],
    ],
    ids=json.dumps,
)
def test_one_of_what_cannot_overlap(alternatives, vocabulary, tokenizer, walker):
    items = {"type": "array", "items": {"oneOf": alternatives}, "minItems": 1, "$defs": DEFINITIONS}
    for schema, wrap in (({"oneOf": alternatives, "$defs": DEFINITIONS}, lambda v: v), (items, lambda v: [v])):
        source, validator = grammar.of_schema(schema), jsonschema.Draft202012Validator(schema)
        for value in map(wrap, VALUES):
            assert not accepts(source, json.dumps(value)) or validator.is_valid(value), value
        whole = [value for value in map(wrap, VALUES) if "1.0" not in json.dumps(value)]  # const 1 is written 1
        assert [v for v in whole if validator.is_valid(v) and not accepts(source, json.dumps(v))] == []
        ids = walker.walk(vocabulary.matcher(source))
        assert ids is None or validator.is_valid(json.loads(tokenizer.decode(ids)))


@pytest.mark.parametrize(
    "alternatives",
    [
        [ref("D"), ref("D")],
        [ref("D"), {"type": "object"}],
        [ref("Kind"), {"type": "string"}],
        [{"const": 1}, {"const": 1.0}],
        [{"type": "integer"}, {"const": 1.5}],
        [{"properties": {"t": {"const": t}}, "required": ["t"]} for t in "de"],
        [ref("D"), obj(t={"const": "e"})],
        [ref("D"), {"$ref": "#/$defs/missing"}],
    ],
    ids=json.dumps,
)
def test_one_of_what_may_overlap_is_refused(alternatives):
    with pytest.raises(UserError):
        BYTES.compiled(grammar.of_schema({"oneOf": alternatives, "$defs": DEFINITIONS}))


def test_lenient_ignores_what_cannot_be_enforced():
    source = grammar.of_schema({"type": "object", "properties": {"a": INT}, "not": {"required": ["b"]}}, lenient=True)
    assert accepts(source, '{"a":1}') and not accepts(source, '{"a":"x"}')


def test_regex_and_choice(vocabulary, tokenizer, walker):
    ids = walker.walk(vocabulary.matcher(grammar.of_regex(r"[a-c]{2,5}-[0-9]{1,9}")))
    assert ids and set(tokenizer.decode(ids)) <= set("abc-0123456789")
    assert accepts(grammar.of_choice(['say "é"', "no"]), 'say "é"') and not accepts(grammar.of_choice(["yes"]), "ye")
    with pytest.raises(UserError):
        vocabulary.compiled(grammar.of_regex("(a"))


def test_masks_hold_what_they_say(vocabulary):
    ids = [0, 31, 32, 63, 64, vocabulary.vocab_size - 1]
    assert allowed(vocabulary.mask_of(ids)).tolist() == ids
    assert allowed(Without(vocabulary, ids).mask())[:3].tolist() == [1, 2, 3]
    assert not set(ids) & set(allowed(Without(vocabulary, ids).mask()).tolist())
    mask = vocabulary.matcher(grammar.of_schema({})).mask()
    assert mask.dtype == np.uint32 and mask.shape == vocabulary.mask_of([]).shape


def test_a_token_outside_the_mask_is_an_error(vocabulary):
    matcher = vocabulary.matcher(grammar.of_schema({"type": "boolean"}))
    with pytest.raises(UserError, match="breaks the grammar"):
        matcher.accept(vocabulary.special_ids["<|im_end|>"])


def test_a_matcher_is_fresh_each_time(vocabulary, walker):
    source = grammar.of_schema({"const": 12})
    assert walker.walk(vocabulary.matcher(source)) and walker.walk(vocabulary.matcher(source))


LOW, HIGH = (None, -1.5, -1, -0.25, 0, 0.1, 1), (None, -1, -0.25, 0, 0.1, 0.25, 1, 1.5, 10)
NEAR = "-2 -1.5 -1.01 -1 -0.3 -0.25 -0.2 -0.001 -0 0 0.0 0.001 0.1 0.2 0.25 0.9 0.999 1 1.0 1.2 1.5 9.99 10".split()


@pytest.mark.parametrize("low_name", ["minimum", "exclusiveMinimum"])
@pytest.mark.parametrize("high_name", ["maximum", "exclusiveMaximum"])
def test_bounds_hold_for_numbers_near_them(low_name, high_name):
    for low, high in itertools.product(LOW, HIGH):
        if None not in (low, high) and low >= high:
            continue
        bounds = {low_name: low, high_name: high}
        schema = {"type": "number", **{key: value for key, value in bounds.items() if value is not None}}
        source, validator = grammar.of_schema(schema), jsonschema.Draft202012Validator(schema)
        wrong = [text for text in NEAR if not validator.is_valid(json.loads(text)) and accepts(source, text)]
        assert wrong == [], schema


@pytest.mark.parametrize(
    ("schema", "texts"),
    [
        ({"minimum": 0, "maximum": 1}, "0 0.5 0.999 1"),
        ({"exclusiveMinimum": 0, "exclusiveMaximum": 1}, "0.001 0.999"),
        ({"exclusiveMinimum": 0, "maximum": 0.25}, "0.001 0.1 0.20 0.25"),
        ({"exclusiveMaximum": 5}, "-7 0 4.99"),
        ({"exclusiveMinimum": 0}, "0.1 1 99.5"),
    ],
)
def test_numbers_between_bounds_fit(schema, texts):
    assert [t for t in texts.split() if not accepts(grammar.of_schema({"type": "number", **schema}), t)] == []
