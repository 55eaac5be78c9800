"""Times, memory and routing of small hand-written programs, and the least FLOPs of the optimizer."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from kimi_jax.ahead.collectives import BETWEEN_SLICES, Collective
from kimi_jax.ahead.hardware import CHIPS, KERNEL_EFFICIENCY, LINK_EFFICIENCY, assumptions, of_kind
from kimi_jax.ahead.memory import routing, saved
from kimi_jax.ahead.optimum import newton_schulz_flops
from kimi_jax.ahead.program import Program
from kimi_jax.ahead.roofline import step_time, traffic, work_of
from kimi_jax.ahead.scopes import scope
from kimi_jax.training.config import TrainConfig

V5P = "TPU v5"

STEP = """
%big (a: bf16[8192,7168], b: bf16[7168,2048]) -> bf16[8192,2048] {
  %a.1 = bf16[8192,7168]{1,0} parameter(0)
  %b.1 = bf16[7168,2048]{1,0} parameter(1)
  ROOT %c = bf16[8192,2048]{1,0} convolution(%a.1, %b.1), dim_labels=bf_io->bf
}

%kept (stack: bf16[4,8,128], x: bf16[8,128], i: s32[]) -> (bf16[4,8,128], bf16[8,128]) {
  %stack = bf16[4,8,128]{2,1,0} parameter(0)
  %x.1 = bf16[8,128]{1,0} parameter(1)
  %i.1 = s32[] parameter(2)
  %row = bf16[1,8,128]{2,1,0} bitcast(%x.1)
  %zero = s32[] constant(0)
  %u = bf16[4,8,128]{2,1,0} dynamic-update-slice(%stack, %row, %i.1, %zero, %zero)
  %y = bf16[8,128]{1,0} negate(%x.1)
  ROOT %both = (bf16[4,8,128]{2,1,0}, bf16[8,128]{1,0}) tuple(%u, %y)
}

%body (p: (s32[], bf16[8,128], bf16[4,8,128])) -> (s32[], bf16[8,128], bf16[4,8,128]) {
  %p = (s32[], bf16[8,128]{1,0}, bf16[4,8,128]{2,1,0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %x = bf16[8,128]{1,0} get-tuple-element(%p), index=1
  %s = bf16[4,8,128]{2,1,0} get-tuple-element(%p), index=2
  %f = (bf16[4,8,128]{2,1,0}, bf16[8,128]{1,0}) fusion(%s, %x, %i), kind=kLoop, calls=%kept
  %s.1 = bf16[4,8,128]{2,1,0} get-tuple-element(%f), index=0
  %x.2 = bf16[8,128]{1,0} get-tuple-element(%f), index=1
  ROOT %t = (s32[], bf16[8,128]{1,0}, bf16[4,8,128]{2,1,0}) tuple(%i, %x.2, %s.1)
}

%condition (p: (s32[], bf16[8,128], bf16[4,8,128])) -> pred[] {
  %p.1 = (s32[], bf16[8,128]{1,0}, bf16[4,8,128]{2,1,0}) parameter(0)
  %i.2 = s32[] get-tuple-element(%p.1), index=0
  %n = s32[] constant(4)
  ROOT %less = pred[] compare(%i.2, %n), direction=LT
}

ENTRY %main (a: bf16[8192,7168], b: bf16[7168,2048], z: f32[1000000], w: (s32[], bf16[8,128], bf16[4,8,128])) -> f32[] {
  %a = bf16[8192,7168]{1,0} parameter(0)
  %b = bf16[7168,2048]{1,0} parameter(1)
  %z = f32[1000000]{0} parameter(2)
  %w = (s32[], bf16[8,128]{1,0}, bf16[4,8,128]{2,1,0}) parameter(3)
  %zero.1 = s32[] constant(0)
  %product = bf16[8192,2048]{1,0} fusion(%a, %b), kind=kOutput, calls=%big, metadata={op_name="jit(f)/jvp()/dot"}, \
backend_config={"window_config":{"estimated_cycles":"955083"}}
  %square = bf16[8192,2048]{1,0} fusion(%a, %b), kind=kOutput, calls=%big, metadata={op_name="jit(f)/while/body/dot"}
  %long = f32[1000000]{0} negate(%z)
  %kernel = f32[1]{0} custom-call(%z), custom_call_target="tpu_custom_call", \
backend_config={"cost_estimate":{"flops":"459000000000","bytes_accessed":"8"}}
  %quiet = f32[1]{0} custom-call(%z), custom_call_target="tpu_custom_call", backend_config={}
  ROOT %loop = (s32[], bf16[8,128]{1,0}, bf16[4,8,128]{2,1,0}) while(%w), condition=%condition, body=%body, \
metadata={op_name="jit(f)/jvp(g)/while"}, backend_config={"known_trip_count":{"n":"4"}}
}
"""


def test_a_step_is_the_sum_of_what_bounds_each_instruction():
    done = work_of(Program.from_text(STEP), V5P)
    flops = 2 * 8192 * 7168 * 2048
    assert done.product_flops["forward"] == flops and done.product_flops["update"] == flops
    assert done.kernel_flops == 459e9 and done.kernels_undeclared == {"quiet": 1}
    efficiency = of_kind(CHIPS, V5P).matmul_efficiency
    assert done.product_seconds == pytest.approx(2 * flops / 459e12 / efficiency)
    assert done.kernel_seconds == pytest.approx(1e-3 / KERNEL_EFFICIENCY)
    trip = (2048 + 4) + (2048 + 2048) + (4 + 4 + 1)  # reads x and i; writes a row of the stack, and x; compares
    moved = (4e6 + 4e6) + (4e6 + 4) + 4 * trip  # the negation, the quiet kernel, the loop
    assert done.memory_seconds == pytest.approx(moved / 2765e9, rel=1e-9)
    assert done.compiler_seconds == pytest.approx(955083 * 8 * 128**2 * 2 / 459e12)


def test_efficiency_is_the_compilers():
    """Its cycles of a large product, at the clock at which the data sheet's peak is one product per unit and cycle."""
    clock = 459e12 / (8 * 128 * 128 * 2)
    assert clock == pytest.approx(1.75e9, rel=1e-2)
    assert of_kind(CHIPS, V5P).matmul_efficiency == pytest.approx(2 * 8192 * 7168 * 2048 / 459e12 / (955083 / clock))
    for name in CHIPS:
        assert 0.8 < of_kind(CHIPS, name).matmul_efficiency < 1


def test_kinds_are_found_by_their_longest_name():
    assert of_kind(CHIPS, "TPU v5 lite").hbm_gib == 16 and of_kind(CHIPS, "TPU v5p").hbm_gib == 95
    assert of_kind(CHIPS, "TPU v6 lite").hbm_gib == 32 and of_kind(CHIPS, "TPU7x").hbm_gib == 96
    named = {a.name: a.value for a in assumptions("TPU7x")}
    assert named["HBM"] == 3690 and named["between slices"] == 6.25 and named["bf16 peak"] == 1153.5


def test_traffic_adds_up_and_bounds_the_step():
    devices = [SimpleNamespace(coords=(0, 0, k), device_kind=V5P) for k in range(4)]
    ring = Collective("all-gather", ("fsdp",), (0, 1, 2, 3), (), 9e9, 2, "forward")
    again = Collective("all-gather", ("fsdp",), (0, 1, 2, 3), (), 9e9, 1, "backward")
    across = Collective("dcn-all-reduce", (BETWEEN_SLICES,), (), (), 12.5e9, 1, "unlabelled")
    moved = traffic([ring, across, again], devices)
    assert [(row.kind, row.axes, row.runs, row.bytes) for row in moved] == [
        ("all-gather", "fsdp", 3, 18e9),
        ("dcn-all-reduce", BETWEEN_SLICES, 1, 12.5e9),
    ]
    took = step_time(work_of(Program.from_text(STEP), V5P), moved, V5P)
    assert took.links == pytest.approx(18e9 / (100e9 * LINK_EFFICIENCY))  # a line: 1 x 1 x 4 has no cube
    assert took.network == pytest.approx(2)
    assert took.serial == pytest.approx(took.busy + took.links + 2) and took.overlapped == pytest.approx(2)


def test_scopes():
    names = {
        "jit(f)/jvp(m)/while/body/dot": "forward",
        "jit(f)/transpose(jvp(m))/while/body/dot": "backward",
        "jit(f)/transpose(jvp(m))/while/body/checkpoint/rematted_computation/dot": "recomputed",
        "jit(f)/while/body/dot": "update",
        "ragged-dot-none": "unlabelled",
        "": "unlabelled",
    }
    assert {name: scope(name) for name in names} == names


def test_what_the_forward_loop_keeps():
    """The stack that it writes slice by slice, and not what it carries."""
    assert saved(Program.from_text(STEP)) == 4 * 8 * 128 * 2
    backward = STEP.replace("jit(f)/jvp(g)/while", "jit(f)/transpose(jvp(g))/while")
    assert saved(Program.from_text(backward)) == 0


def test_routing_cannot_change_the_peak_unless_an_array_is_dynamic():
    fixed = routing(Program.from_text(STEP))
    assert (fixed.dynamic_arrays, fixed.loops, fixed.worst_over_balanced) == (0, (), 1.0)
    rounds = STEP.replace('{"known_trip_count":{"n":"4"}}', "{}")
    assert routing(Program.from_text(rounds)).loops == ("forward",)
    dynamic = routing(Program.from_text(STEP.replace("%long = f32[1000000]", "%long = f32[<=1000000]")))
    assert dynamic.dynamic_arrays == 1 and dynamic.worst_over_balanced is None


def test_newton_schulz_at_least():
    """Every matrix of a tiny model by hand; embedding, head, gains and biases are AdamW's."""
    model = dict(preset="tiny", num_hidden_layers=3, first_k_dense_replace=1, n_shared_experts=1)
    cfg = TrainConfig.from_config(dict(model=model, optimizer=dict(ns_steps=3)))
    m = cfg.model
    D, N, F, G = m.hidden_size, m.num_attention_heads, m.moe_intermediate_size, m.intermediate_size
    qk, rope, C = m.qk_head_dim, m.qk_rope_head_dim, m.kv_lora_rank
    query = [(D, m.q_lora_rank), (m.q_lora_rank, N * qk)] if m.q_lora_rank else [(D, N * qk)]
    attention = [*query, (D, C + rope), (C, N * (m.qk_nope_head_dim + m.v_head_dim)), (N * m.v_head_dim, D)]
    moe = [(D, m.n_routed_experts)] + 3 * (m.n_routed_experts + 1) * [(D, F)]
    every = 3 * attention + 3 * [(D, G)] + 2 * moe
    cost = sum(3 * (4 * min(a, b) ** 2 * max(a, b) + 2 * min(a, b) ** 3) for a, b in every)
    assert newton_schulz_flops(cfg) == cost
    assert newton_schulz_flops(TrainConfig.from_config(dict(model=model, optimizer=dict(name="adamw")))) == 0
