"""Answers of a random model under tool rules: what is declared, with valid arguments, in the right frame."""

import json

import jsonschema
import pytest

from kimi_jax.data.detokenizer import Detokenizer
from kimi_jax.errors import UserError
from kimi_jax.server import grammar
from kimi_jax.server.dialogue import Dialogue, plan
from kimi_jax.server.errors import ApiError
from kimi_jax.server.template import CALL_BEGIN, SECTION_BEGIN, SECTION_END
from kimi_jax.server.tool_constraint import ToolCalls, ToolRules
from kimi_jax.server.tool_parser import MARKERS, Answer, ToolParser
from tests.server.schemas import SCHEMAS
from tests.server.walks import Walker, allowed

CITY = {"type": "object", "properties": {"city": {"enum": ["Oslo", "Rome"]}}, "required": ["city"]}
COUNT = {"type": "object", "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 99}}, "required": ["n"]}
PARAMETERS = {"get_time": CITY, "get_time_zone": CITY, 'odd"name"é:<|x|>': COUNT, "count": COUNT}


def rules(next_index=0, names=tuple(PARAMETERS), **options):
    grammars = {name: grammar.of_arguments(PARAMETERS[name]) for name in names}
    return ToolRules(grammars, next_index, **options)


def answer_of(ids, tokenizer):
    parser, answer, text = ToolParser(), Answer(), Detokenizer(tokenizer)
    names = {tokenizer.special_ids[name]: name for name in MARKERS}
    for i in ids:
        answer.add(parser.feed(names[i], control=True) if i in names else parser.feed(text.feed(i)))
    answer.add(parser.finish())
    return answer


@pytest.fixture(scope="module")
def walker(tokenizer):
    return Walker(tokenizer, seed=1)


@pytest.mark.parametrize("single", [True, False])
def test_forced_calls(single, vocabulary, tokenizer, walker):
    seen = set()
    for _ in range(12):
        ids = walker.walk(ToolCalls(vocabulary, rules(7, forced=True, single=single)))
        answer = answer_of(ids, tokenizer)
        assert answer.content == "" and answer.calls == answer.started and answer.calls
        assert len(answer.calls) == 1 or not single
        for i, call in enumerate(answer.calls):
            assert call.id == f"functions.{call.name}:{7 + i}"
            jsonschema.validate(json.loads(call.arguments), PARAMETERS[call.name])
            seen.add(call.name)
        text = tokenizer.decode(ids)
        assert text.startswith(SECTION_BEGIN + CALL_BEGIN) and text.endswith(SECTION_END)
    assert len(seen) > 1


def test_a_named_function(vocabulary, tokenizer, walker):
    ids = walker.walk(ToolCalls(vocabulary, rules(names=("count",), forced=True, single=True)))
    (call,) = answer_of(ids, tokenizer).calls
    assert call.id == "functions.count:0"


def test_text_is_free_until_the_section_opens(vocabulary, tokenizer, walker):
    calls = ToolCalls(vocabulary, rules())
    for i in tokenizer.encode("Let me see: {not json"):
        assert calls.mask() is None
        calls.accept(i)
    assert calls.mask() is None
    calls.accept(tokenizer.special_ids[SECTION_BEGIN])
    assert allowed(calls.mask()).tolist() == [tokenizer.special_ids[CALL_BEGIN]]
    assert all(call.name in PARAMETERS for call in answer_of(walker.walk(calls), tokenizer).calls)


@pytest.mark.parametrize("text", ["", "Let me see: "])
def test_calls_outside_a_section_are_held_to_the_rules(text, vocabulary, tokenizer, walker):
    calls, ids = ToolCalls(vocabulary, rules(3)), [*tokenizer.encode(text), tokenizer.special_ids[CALL_BEGIN]]
    for i in ids:
        calls.accept(i)
    answer = answer_of([*ids, *walker.walk(calls)], tokenizer)
    assert answer.content == text.strip() and answer.calls == answer.started and answer.calls
    for i, call in enumerate(answer.calls):
        assert call.id == f"functions.{call.name}:{3 + i}"
        jsonschema.validate(json.loads(call.arguments), PARAMETERS[call.name])


def test_content_bound_by_a_grammar_or_calls(vocabulary, tokenizer, walker):
    section = tokenizer.special_ids[SECTION_BEGIN]
    bound = rules(content=grammar.of_schema(COUNT))
    calls = ToolCalls(vocabulary, bound)
    assert section in allowed(calls.mask())
    calls.accept(tokenizer.encode("{")[0])
    assert section not in allowed(calls.mask())
    content = "{" + tokenizer.decode(walker.walk(calls))
    jsonschema.validate(json.loads(content), COUNT)
    calls = ToolCalls(vocabulary, bound)
    calls.accept(section)
    assert answer_of(walker.walk(calls), tokenizer).calls


def test_unsupported_arguments_are_refused_before_any_token(vocabulary):
    unsupported = grammar.of_schema({"type": "object", "not": {}}, lenient=False)
    with pytest.raises(UserError, match="not"):
        ToolCalls(vocabulary, ToolRules({"count": rules().arguments["count"], "bad": unsupported}, 0))


def deep(depth):
    schema = CITY
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}, "required": ["a"]}
    return schema


@pytest.mark.parametrize(
    "parameters",
    [*map(deep, (62, 63, 64, 250)), {"properties": {"a": {"format": []}}}, {"minProperties": 10**400}],
    ids=lambda p: json.dumps(p)[:30],
)
def test_arguments_that_break_the_compiler(parameters, vocabulary, tokenizer, walker):
    function = {"name": "f", "parameters": parameters}

    def planned(choice, **options):
        tools = [{"type": "function", "function": function | options}]
        return plan(Dialogue([{"role": "user", "content": "x"}], tools, choice), tokenizer, vocabulary)

    for refused in (lambda: planned("required"), lambda: planned("auto", strict=True)):
        with pytest.raises(ApiError) as caught:
            refused()
        assert (caught.value.status, caught.value.param) == (400, "tools[0].function.parameters")
    constraint = planned("auto").constraint
    assert constraint
    calls = constraint()
    calls.accept(tokenizer.special_ids[SECTION_BEGIN])
    for call in answer_of(walker.walk(calls), tokenizer).calls:
        assert isinstance(json.loads(call.arguments), dict)


def test_every_schema_as_the_type_of_one_argument(vocabulary, tokenizer, walker):
    """As public verifiers send them: wrapped as ``value``, definitions at the root."""
    finished = 0
    for schema in SCHEMAS:
        inner = {key: part for key, part in schema.items() if key not in ("$defs", "definitions", "$id")}
        outer = {key: part for key, part in schema.items() if key not in inner}
        if inner.get("$ref") == "#" or '{"$ref": "#"}' in json.dumps(inner):
            continue  # would mean the wrapper
        parameters = {"type": "object", "properties": {"value": inner}, "required": ["value"], **outer}
        source = {"f": grammar.of_arguments(parameters)}
        ids = walker.walk(ToolCalls(vocabulary, ToolRules(source, 0, forced=True, single=True)), limit=500)
        if ids is None:
            continue
        finished += 1
        (call,) = answer_of(ids, tokenizer).calls
        jsonschema.Draft202012Validator(parameters).validate(json.loads(call.arguments))
    assert finished > 0.9 * len(SCHEMAS)
