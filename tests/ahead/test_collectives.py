"""Kinds, bytes and axes of collectives, counted by hand."""

from __future__ import annotations

import numpy as np
import pytest

from kimi_jax.ahead.collectives import BETWEEN_SLICES, collectives
from kimi_jax.ahead.groups import groups, mesh_axes
from kimi_jax.ahead.program import Program

MESH = {"data": 1, "fsdp": 2, "expert": 4}  # device = 4 fsdp + expert
LISTED = "{{0,1,2,3},{4,5,6,7}}"

PROGRAM = """
%sum (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %c = f32[] add(%a, %b)
}

%all-reduce-scatter.1 (x: f32[64]) -> f32[16] {
  %x = f32[64]{0} parameter(0)
  %r = f32[64]{0} all-reduce(%x), replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%sum
  %zero = s32[] constant(0)
  ROOT %s = f32[16]{0} dynamic-slice(%r, %zero), dynamic_slice_sizes={16}
}

%body (p: (s32[], f32[64])) -> (s32[], f32[64]) {
  %p = (s32[], f32[64]{0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %y = f32[64]{0} get-tuple-element(%p), index=1
  %rs = f32[16]{0} fusion(%y), kind=kCustom, calls=%all-reduce-scatter.1, metadata={op_name="jit(f)/transpose(jvp())/a"}
  %ag = f32[64]{0} all-gather(%rs), replica_groups=[2,4]<=[8], dimensions={0}, metadata={op_name="jit(f)/jvp()/b"}
  ROOT %t = (s32[], f32[64]{0}) tuple(%i, %ag)
}

%condition (p: (s32[], f32[64])) -> pred[] {
  %p.1 = (s32[], f32[64]{0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%p.1), index=0
  %five = s32[] constant(5)
  ROOT %less = pred[] compare(%i.1, %five), direction=LT
}

ENTRY %main (x: f32[64], n: s32[8]) -> f32[64] {
  %x.1 = f32[64]{0} parameter(0)
  %n = s32[8]{0} parameter(1)
  %zero.1 = s32[] constant(0)
  %start = (s32[], f32[64]{0}) tuple(%zero.1, %x.1)
  %w = (s32[], f32[64]{0}) while(%start), condition=%condition, body=%body
  %z = f32[64]{0} get-tuple-element(%w), index=1
  %ar = f32[64]{0} all-reduce(%z), replica_groups=[4,2]<=[2,4]T(1,0), to_apply=%sum, metadata={op_name="jit(f)/add"}
  %gs = (f32[64]{0}, f32[128]{0}) all-gather-start(%ar), replica_groups=[4,2]<=[2,4]T(1,0), dimensions={0}
  %gd = f32[128]{0} all-gather-done(%gs)
  %ps = (f32[64]{0}, f32[64]{0}, u32[]{:S(2)}) collective-permute-start(%ar), source_target_pairs={{0,1},{1,0}}
  %pd = f32[64]{0} collective-permute-done(%ps)
  %aa = f32[64]{0} all-to-all(%pd), replica_groups=mesh['data'=1,'fsdp'=2,'expert'=4] {'fsdp','expert'}, dimensions={0}
  %rr = f32[64]{0} ragged-all-to-all(%aa, %x.1, %n, %n, %n, %n), replica_groups={{0,1,2,3},{4,5,6,7}}
  %after = token[] after-all()
  %s = (f32[64]{0}, token[]) send(%rr, %after), frontend_attributes={_xla_megascale_transfer_type="ALL_REDUCE"}
  ROOT %out = f32[64]{0} copy(%rr)
}
"""


def test_bytes_runs_axes_and_scopes():
    found = list(collectives(Program.from_text(PROGRAM), MESH, slices=2))
    assert {(c.kind, c.axes): (c.bytes, c.runs, c.scope) for c in found} == {
        ("reduce-scatter", ("expert",)): (5 * 256 * 3 / 4, 5, "backward"),  # the name is the fusion's
        ("all-gather", ("expert",)): (5 * 256 * 3 / 4, 5, "forward"),
        ("all-reduce", ("fsdp",)): (2 * 256 / 2, 1, "update"),
        ("all-gather", ("fsdp",)): (512 / 2, 1, "unlabelled"),
        ("collective-permute", ("expert",)): (256, 1, "unlabelled"),
        ("all-to-all", ("fsdp", "expert")): (256 * 7 / 8, 1, "unlabelled"),
        ("ragged-all-to-all", ("expert",)): (256, 1, "unlabelled"),
        ("dcn-all-reduce", (BETWEEN_SLICES,)): (2 * 256 / 2, 1, "unlabelled"),
    }
    ends = {c.kind: (c.group, c.hops) for c in found}
    assert ends["ragged-all-to-all"] == ((0, 1, 2, 3), ())
    assert ends["collective-permute"] == ((), ((0, 1), (1, 0)))


@pytest.mark.parametrize(
    ("text", "expected", "axes"),
    [
        (f"replica_groups={LISTED}, x={{1}}", [[0, 1, 2, 3], [4, 5, 6, 7]], ("expert",)),
        ("replica_groups=[2,4]<=[8], a=b", [[0, 1, 2, 3], [4, 5, 6, 7]], ("expert",)),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", [[0, 4], [1, 5], [2, 6], [3, 7]], ("fsdp",)),
        ("replica_groups=[1,8]<=[8]", [list(range(8))], ("fsdp", "expert")),
        ("replica_groups=mesh['data'=1,'fsdp'=2,'expert'=4] {'fsdp'}", [[0, 4], [1, 5], [2, 6], [3, 7]], ("fsdp",)),
        ("replica_groups=mesh['a'=8] {'a':(1)2}", [[0, 4], [1, 5], [2, 6], [3, 7]], ("fsdp",)),
        ("replica_groups=mesh['a'=8] {'a':(4)2}", [[0, 1], [2, 3], [4, 5], [6, 7]], ("expert",)),
        ("source_target_pairs={{0,4},{4,0}}", [[0, 4], [4, 0]], ("fsdp",)),
        ("replica_groups={}", [list(range(8))], ("fsdp", "expert")),
    ],
)
def test_groups_in_every_notation(text, expected, axes):
    found = groups(text, 8)
    assert sorted(found.tolist()) == expected
    assert mesh_axes(found, MESH) == axes


def test_counted_groups_equal_their_definition():
    """Group g of [64,8]<=[8,64]T(1,0) holds g, 64 + g, 128 + g, ..."""
    found = groups("replica_groups=[64,8]<=[8,64]T(1,0), dimensions={0}", 512)
    assert np.array_equal(found, [[64 * k + g for k in range(8)] for g in range(64)])
