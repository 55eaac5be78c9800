"""Tool calls in model output: golden examples, a twin by regular expression, and any cut into steps."""

import json
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kimi_jax.server import tool_parser
from kimi_jax.server.template import ARGUMENT_BEGIN, CALL_BEGIN, CALL_END, SECTION_BEGIN, SECTION_END
from kimi_jax.server.tool_parser import Answer, Arguments, CallEnd, CallStart, Text, ToolParser

GOLDEN = json.loads(Path(__file__).with_name("parsed.json").read_text(encoding="utf-8"))


def parse_in_steps(steps):
    """From ``(text, control)`` pairs."""
    parser, answer = ToolParser(), Answer()
    for text, control in steps:
        answer.add(parser.feed(text, control))
    answer.add(parser.finish())
    return answer


def parse(text):
    return parse_in_steps([(text, False)])


def call_dicts(answer):
    return [{"id": call.id, "name": call.name, "arguments": call.arguments} for call in answer.calls]


@pytest.mark.parametrize("case", GOLDEN, ids=range(1, len(GOLDEN) + 1))
@pytest.mark.parametrize("width", [1, 2, 7, 1000])
def test_golden(case, width):
    text = case["text"]
    answer = parse_in_steps([(text[i : i + width], False) for i in range(0, len(text), width)])
    wanted = case["content"] or ""
    assert answer.content == (wanted.rstrip() if answer.calls else wanted)
    assert call_dicts(answer) == case["tool_calls"]
    assert (case["finish_reason"] == "tool_calls") == bool(answer.calls)


def test_events_of_a_stream():
    parser = ToolParser()
    steps = ["Go", ". ", SECTION_BEGIN, CALL_BEGIN, " functions.a:3", ARGUMENT_BEGIN, ' {"x"', ": ", "1} ", CALL_END]
    events = [parser.feed(step, control=step.startswith("<|")) for step in steps]
    assert events == [
        *([Text("Go")], [Text(".")], [], [], [], [CallStart(0, "functions.a:3", "a")]),
        *([Arguments(0, '{"x"')], [Arguments(0, ":")], [Arguments(0, " 1}")], [CallEnd(0)]),
    ]
    assert parser.finish() == []


def wrap(*calls, end=CALL_END):
    body = "".join(f"{CALL_BEGIN}{id_}{ARGUMENT_BEGIN}{arguments}{end}" for id_, arguments in calls)
    return f"{SECTION_BEGIN}{body}{SECTION_END}"


@pytest.mark.parametrize(
    ("id_", "name"),
    [
        ("functions.ns.tool:0", "ns.tool"),
        ("functions.a-b_c/d:12", "a-b_c/d"),
        ("functions.a:b:1", "a:b"),
        ("functions.functions.x:0", "functions.x"),
        ("ünï:7", "ünï"),
        ("\n functions.a:0\t", "a"),
    ],
)
def test_ids(id_, name):
    (call,) = parse(wrap((id_, "{}"))).calls
    assert (call.id, call.name) == (id_.strip(), name)


@pytest.mark.parametrize(
    "id_", ["", ":0", "functions.a", "functions.a:", "functions.a:x", "functions.a: 1", "a b:1", "a:٣"]
)
def test_malformed_ids_are_skipped(id_):
    answer = parse("t" + wrap((id_, '{"x":1}'), ("functions.ok:1", "{}")))
    assert [(call.name, call.arguments) for call in answer.started] == [("ok", "{}")]
    assert answer.content == "t"


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        (f"a{CALL_END}b{ARGUMENT_BEGIN}c{SECTION_END}d", "abcd", []),
        (f"x{CALL_BEGIN}functions.a:0{ARGUMENT_BEGIN}{{}}{CALL_END}", "x", [("a", "{}")]),
        (f"{SECTION_BEGIN}junk{CALL_BEGIN}functions.a:0{ARGUMENT_BEGIN}1{CALL_END}junk", "", [("a", "1")]),
        (f"x{SECTION_BEGIN}{CALL_BEGIN}functions.a:0{CALL_END}{SECTION_END} y", "x y", []),
        (
            f"{SECTION_BEGIN}{CALL_BEGIN}functions.a:0{CALL_BEGIN}functions.b:1{ARGUMENT_BEGIN}1{CALL_END}",
            "",
            [("b", "1")],
        ),
        (f"x {SECTION_BEGIN} {SECTION_END} y ", "x  y ", []),
        (f"{wrap(('f:0', '1'))}mid{wrap(('g:1', '2'))}end", "", [("f", "1"), ("g", "2")]),
        (f"{wrap(('f:0', '1'), ('g:1', '2'), end='')}", "", [("f", "1"), ("g", "2")]),
        (wrap(("f:0", "")), "", [("f", "")]),
        (wrap(("f:0", "not json <|")), "", [("f", "not json <|")]),
        (f"{SECTION_BEGIN}{CALL_BEGIN}f:0{ARGUMENT_BEGIN}1{ARGUMENT_BEGIN}2{CALL_END}", "", [("f", "12")]),
        (wrap(("f:0", "1")).replace("calls_section", "call_section"), "", [("f", "1")]),
    ],
)
def test_markers_out_of_place(text, content, calls):
    for control in (False, True):
        steps = [(part, control and part in tool_parser.MARKERS) for part in re.split(r"(<\|\w+\|>)", text)]
        answer = parse_in_steps(steps)
        assert answer.content == content
        assert [(call.name, call.arguments) for call in answer.calls] == calls


@pytest.mark.parametrize("cut", range(1, len(wrap(("functions.a:0", '{"x": "y z"}'))) + 1))
def test_an_output_that_is_cut_off(cut):
    whole = wrap(("functions.a:0", '{"x": "y z"}'))
    answer = parse("Hm. " + whole[:cut])
    assert bool(answer.calls) == (CALL_END in whole[:cut])
    released = whole[:cut] if cut < len("<|tool_call") else ""
    assert answer.content == ("Hm." if answer.started else "Hm. " + released)
    assert all('{"x": "y z"}'.startswith(call.arguments) for call in answer.started)


def test_arguments_after_control_tokens_are_data():
    spelled = f'{{"doc": "{wrap(("functions.b:1", "{}"))}"}}'
    steps = [(SECTION_BEGIN, True), (CALL_BEGIN, True), ("functions.a:0", False), (ARGUMENT_BEGIN, True)]
    steps += [(char, False) for char in spelled] + [(CALL_END, True), (SECTION_END, True)]
    answer = parse_in_steps(steps)
    assert [(call.name, call.arguments) for call in answer.calls] == [("a", spelled)]


fragments = st.sampled_from(
    [*tool_parser.MARKERS, *tool_parser._SINGULAR, "functions.a:0", "b:1", "{}", " ", "\n", "<", "<|"]
)
pieces = st.lists(st.tuples(fragments | st.text(max_size=4), st.booleans()), max_size=14)


@settings(max_examples=600, deadline=None)
@given(pieces, st.data())
def test_any_cut_gives_the_same_answer(pieces, data):
    steps = [(text, control and text in tool_parser.MARKERS) for text, control in pieces]
    cut = []
    for text, control in steps:
        if control:
            cut.append((text, True))
            continue
        at = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=4)))
        cut += [(text[a:b], False) for a, b in zip([0, *at], [*at, len(text)], strict=True)]
    assert parse_in_steps(cut) == parse_in_steps(steps)
    shown = parse_in_steps(cut).content
    assert not re.search(r"<\|tool_calls?_(section_)?(begin|end|argument_begin)\|>", shown)


text_without_markers = st.text(max_size=8).filter(lambda t: "<" not in t)
well_formed = st.lists(
    st.tuples(st.from_regex(r"functions\.[\w-]{1,5}:[0-9]{1,2}", fullmatch=True), text_without_markers), max_size=3
)


@settings(max_examples=200, deadline=None)
@given(text_without_markers, well_formed)
def test_well_formed_output_equals_a_regular_expression(text, calls):
    output = text + wrap(*calls)
    found = re.findall(
        re.escape(CALL_BEGIN) + "(.*?)" + re.escape(ARGUMENT_BEGIN) + "(.*?)" + re.escape(CALL_END), output, re.S
    )
    answer = parse(output)
    assert [(call.id, call.arguments) for call in answer.calls] == [(id_, a.strip(" \t\r\n")) for id_, a in found]
    assert answer.content == (text.rstrip(" \t\r\n") if calls else text)
