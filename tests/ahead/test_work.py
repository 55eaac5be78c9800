"""FLOPs and HBM bytes of single instructions, by hand and by brute force."""

from __future__ import annotations

import itertools

import pytest

from kimi_jax.ahead import work
from kimi_jax.ahead.kernels import kernel_name
from kimi_jax.ahead.program import Program

PROGRAM = """
%sliced (stack: f32[10,8,128], at: s32[]) -> f32[8,128] {
  %stack = f32[10,8,128]{2,1,0} parameter(0)
  %at = s32[] parameter(1)
  %zero = s32[] constant(0)
  %slice = f32[1,8,128]{2,1,0} dynamic-slice(%stack, %at, %zero, %zero), dynamic_slice_sizes={1,8,128}
  ROOT %b = f32[8,128]{1,0} bitcast(%slice)
}

%updated (stack: f32[10,8,128], row: f32[1,8,128], at: s32[]) -> f32[10,8,128] {
  %stack.1 = f32[10,8,128]{2,1,0} parameter(0)
  %row = f32[1,8,128]{2,1,0} parameter(1)
  %at.1 = s32[] parameter(2)
  %zero.1 = s32[] constant(0)
  ROOT %u = f32[10,8,128]{2,1,0} dynamic-update-slice(%stack.1, %row, %at.1, %zero.1, %zero.1)
}

%product (a: bf16[64,32], b: bf16[32,16]) -> f32[64,16] {
  %a.2 = bf16[64,32]{1,0} parameter(0)
  %b.2 = bf16[32,16]{1,0} parameter(1)
  ROOT %c = f32[64,16]{1,0} convolution(%a.2, %b.2), dim_labels=bf_io->bf
}

ENTRY %main (s: f32[10,8,128], i: s32[], a: bf16[64,32], b: bf16[32,16]) -> f32[64,16] {
  %s = f32[10,8,128]{2,1,0} parameter(0)
  %i = s32[] parameter(1)
  %a = bf16[64,32]{1,0} parameter(2)
  %b.1 = bf16[32,16]{1,0} parameter(3)
  %one = f32[8,128]{1,0} fusion(%s, %i), kind=kLoop, calls=%sliced
  %row.1 = f32[1,8,128]{2,1,0:T(8,128)S(1)} bitcast(%one)
  %two = f32[10,8,128]{2,1,0} fusion(%s, %row.1, %i), kind=kLoop, calls=%updated
  %onchip = f32[8,128]{1,0:S(1)} negate(%one)
  %start = (f32[8,128]{1,0:S(1)}, f32[8,128]{1,0}, u32[]{:S(2)}) copy-start(%one)
  %dot = f32[64,16]{1,0} dot(%a, %b.1), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %kernel = f32[64,16]{1,0} custom-call(%a), custom_call_target="tpu_custom_call", backend_config={"config":\
{"cost_estimate":{"flops":"1000","transcendentals":"0","bytes_accessed":"70"}}}
  %silent.3 = f32[64,16]{1,0} custom-call(%a), custom_call_target="tpu_custom_call", backend_config={}
  %stack.9 = f32[10,8,128]{2,1,0:S(5)} custom-call(), custom_call_target="AllocateBuffer"
  %out = ((f32[10,8,128]{2,1,0:S(5)}, f32[1,8,128]{2,1,0}, s32[]), f32[10,8,128]{2,1,0:S(5)}, u32[]{:S(2)}) \
dynamic-update-slice-start(%stack.9, %row.1, %i)
  %done = f32[10,8,128]{2,1,0:S(5)} dynamic-update-slice-done(%out)
  ROOT %fused = f32[64,16]{1,0} fusion(%a, %b.1), kind=kOutput, calls=%product
}
"""


@pytest.fixture(scope="module")
def program() -> Program:
    return Program.from_text(PROGRAM)


@pytest.mark.parametrize(
    ("name", "flops", "bytes_"),
    [
        ("one", 0, 2 * 4096 + 4),  # reads one slice of ten and its index, writes it
        ("two", 0, 4096 + 4),  # writes one slice in place; the row is on the chip
        ("onchip", 0, 4096),
        ("start", 0, 4096),
        ("dot", 2 * 64 * 32 * 16, 64 * 32 * 2 + 32 * 16 * 2 + 64 * 16 * 4),
        ("fused", 2 * 64 * 32 * 16, 64 * 32 * 2 + 32 * 16 * 2 + 64 * 16 * 4),
        ("kernel", 1000, 70),
        ("silent.3", 0, 64 * 32 * 2 + 64 * 16 * 4),
        ("s", 0, 0),
        ("stack.9", 0, 0),
        ("out", 0, 4096 + 4),  # read, and sent to the host
        ("done", 0, 0),
    ],
)
def test_instructions(program, name, flops, bytes_):
    main = program.computations["main"]
    assert work.flops(program, main, main[name]) == flops
    assert work.hbm_bytes(program, main, main[name]) == bytes_


def test_what_goes_to_the_host(program):
    main = program.computations["main"]
    assert [work.host_bytes(main[name]) for name in ("out", "done", "start", "one")] == [4096, 0, 0, 0]


def test_kernels_have_names(program):
    main = program.computations["main"]
    assert [kernel_name(main[name]) for name in ("kernel", "silent.3", "dot")] == ["kernel", "silent", ""]


@pytest.mark.parametrize("size, taps, low, stride, dilated, spread", [
    *itertools.product((1, 5, 8), (1, 3, 5), (0, 2), (1, 2), (1, 3), (1, 2)),
    (64, 64, 0, 63, 64, 1),  # how the compiler writes a product with a batch dimension
])  # fmt: skip
def test_convolutions_count_real_elements_alone(size, taps, low, stride, dilated, spread):
    outputs = max(1, ((size - 1) * dilated + 1 + 2 * low - (taps - 1) * spread - 1) // stride + 1)
    met = 0
    for o, k in itertools.product(range(outputs), range(taps)):
        at = o * stride - low + k * spread
        met += 0 <= at <= (size - 1) * dilated and at % dilated == 0
    text = f"""
ENTRY %main (x: f32[3,{size},4], w: f32[{taps},4,5]) -> f32[3,{outputs},5] {{
  %x = f32[3,{size},4]{{2,1,0}} parameter(0)
  %w = f32[{taps},4,5]{{2,1,0}} parameter(1)
  ROOT %y = f32[3,{outputs},5]{{2,1,0}} convolution(%x, %w), dim_labels=b0f_0io->b0f, \
window={{size={taps} stride={stride} pad={low}_{low} lhs_dilate={dilated} rhs_dilate={spread}}}
}}
"""
    program = Program.from_text(text)
    main = program.computations["main"]
    assert work.flops(program, main, main["y"]) == 2 * 3 * 4 * 5 * met
