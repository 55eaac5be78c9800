"""Hand-written programs, whose figures are counted by hand."""

from __future__ import annotations

import pytest

from kimi_jax.ahead.hlo import parse, shapes
from kimi_jax.ahead.program import Program

LOOPS = """
HloModule jit_f, is_scheduled=true

%inner_body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %p = (s32[], f32[8]{0:T(128)}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %x = f32[8]{0:T(128)} get-tuple-element(%p), index=1
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one)
  ROOT %t = (s32[], f32[8]{0:T(128)}) tuple(%next, %x)
}

%inner_condition (p: (s32[], f32[8])) -> pred[] {
  %p.1 = (s32[], f32[8]{0:T(128)}) parameter(0)
  %i.1 = s32[] get-tuple-element(%p.1), index=0
  %bound = s32[] constant(7)
  ROOT %less = pred[]{:S(6)} compare(%i.1, %bound), direction=LT
}

%compared (a: s32[], b: s32[]) -> pred[] {
  %a = s32[] parameter(0)
  %b = s32[] parameter(1)
  ROOT %less.1 = pred[] compare(%a, %b), direction=LT
}

%outer_condition (p: (s32[], f32[8], s32[])) -> pred[] {
  %p.2 = (s32[], f32[8]{0}, /*index=2*/s32[]) parameter(0)
  %i.2 = s32[] get-tuple-element(%p.2), index=0
  %n.2 = s32[] get-tuple-element(%p.2), index=2
  ROOT %f = pred[] fusion(%i.2, %n.2), kind=kLoop, calls=%compared
}

%outer_body (p: (s32[], f32[8], s32[])) -> (s32[], f32[8], s32[]) {
  %p.3 = (s32[], f32[8]{0}, s32[]) parameter(0)
  %i.3 = s32[] get-tuple-element(%p.3), index=0
  %x.3 = f32[8]{0} get-tuple-element(%p.3), index=1
  %n.3 = s32[] get-tuple-element(%p.3), index=2
  %two = s32[] constant(2)
  %start = (s32[], f32[8]{0}) tuple(%two, %x.3)
  %while.1 = (s32[], f32[8]{0}) while(%start), condition=%inner_condition, body=%inner_body
  %x.4 = f32[8]{0} get-tuple-element(%while.1), index=1
  ROOT %t.3 = (s32[], f32[8]{0}, s32[]) tuple(%i.3, %x.4, %n.3)
}

ENTRY %main (x: f32[8], n: s32[]) -> f32[8] {
  %x.5 = f32[8]{0} parameter(0)
  %n.5 = s32[] parameter(1)
  %zero = s32[] constant(0)
  %three = s32[] constant(3)
  %copied = s32[] copy(%three)
  %start.5 = (s32[], f32[8]{0}, s32[]) tuple(%zero, %x.5, BOUND)
  %while.2 = (s32[], f32[8]{0}, s32[]) while(%start.5), condition=%outer_condition, body=%outer_body
  ROOT %out = f32[8]{0} get-tuple-element(%while.2), index=1
}
"""

BRANCHES = """
%cheap (x: f32[8]) -> f32[8] {
  %x = f32[8]{0} parameter(0)
  ROOT %y = f32[8]{0} negate(%x), backend_config={"window_config":{"estimated_cycles":"10"}}
}

%dear (x: f32[8]) -> f32[8] {
  %x.1 = f32[8]{0} parameter(0)
  ROOT %y.1 = f32[8]{0} exponential(%x.1), backend_config={"window_config":{"estimated_cycles":"30"}}
}

%unknown (x: f32[8]) -> f32[8] {
  %x.2 = f32[8]{0} parameter(0)
  ROOT %y.2 = f32[8]{0} sine(%x.2), backend_config={"window_config":{"estimated_cycles":"9223372036854775807"}}
}

ENTRY %main (x: f32[8], p: s32[]) -> f32[8] {
  %x.3 = f32[8]{0} parameter(0)
  %p = s32[] parameter(1)
  %never = (s32[], f32[8]{0}) tuple(%p, %x.3)
  ROOT %c = f32[8]{0} conditional(%p, %x.3, %x.3, %x.3), branch_computations={%cheap, %dear, %unknown}
}
"""


def test_nested_loops_multiply():
    program = Program.from_text(LOOPS.replace("BOUND", "%copied"))
    assert program.runs["outer_body"] == 3  # from 0 below the carried 3, compared inside a fusion
    assert program.runs["inner_body"] == 3 * (7 - 2)
    assert program.runs["main"] == 1
    assert program.unknown_trips == []


def test_a_loop_of_unknown_length_counts_once_and_is_named():
    program = Program.from_text(LOOPS.replace("BOUND", "%n.5"))
    assert program.runs["outer_body"] == 1 and program.runs["inner_body"] == 5
    assert [loop.name for loop in program.unknown_trips] == ["while.2"]


def test_what_xla_noted_comes_first():
    noted = 'body=%outer_body, backend_config={"known_trip_count":{"n":"11"}}'
    program = Program.from_text(LOOPS.replace("BOUND", "%n.5").replace("body=%outer_body", noted))
    assert program.runs["inner_body"] == 55


def test_of_a_conditional_the_dearest_branch_runs():
    assert Program.from_text(BRANCHES).runs == {"cheap": 0, "dear": 1, "unknown": 0, "main": 1}


def test_types():
    found = shapes("(bf16[3,4]{1,0:T(8,128)(2,1)S(1)}, f8e4m3fn[16], s4[10]{0}, pred[], (f32[<=8,2]{1,0}, token[]))")
    assert [shape.bytes for shape in found] == [24, 16, 5, 1, 64, 0]
    assert [shape.space for shape in found] == [1, 0, 0, 0, 0, 0]
    assert [shape.dynamic for shape in found] == [False, False, False, False, True, False]


def test_quotes_and_line_breaks_in_attributes():
    text = """
ENTRY %main (x: f32[2,3]) -> f32[2,3] {
  %x = f32[2,3]{1,0} parameter(0), metadata={op_name="a(\\"b\\"" }
  %k = f32[2,3]{1,0} custom-call(%x, /*index=1*/%x), custom_call_target="t)", backend_config={"text":"one
}} two (", "estimated_cycles":"5"}, metadata={op_name="jit(f)/kernel"}
  ROOT %y = f32[2,3]{1,0} negate(%k)
}
"""
    computations, entry = parse(text)
    kernel = computations[entry]["k"]
    assert list(computations[entry]) == ["x", "k", "y"]
    assert kernel.operands == ("x", "x") and kernel.cycles == 5 and kernel.op_name == "jit(f)/kernel"


def test_what_is_no_program_is_refused():
    with pytest.raises(ValueError, match="no ENTRY"):
        parse("func.func @main() { return }")
