"""Products of activations and weights against float64 einsum, forward and backward."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kimi_jax.layers import linear
from kimi_jax.layers.linear import contract, product, transposed, weight_gradient

SIZES = dict(B=2, T=5, S=6, N=3, M=7, D=10, Q=9, C=8, X=11, H=4, W=6, F=13, V=17)
CONTRACTIONS = [
    "BTD,DNX->BTNX",
    "BTD,DQ->BTQ",
    "BTQ,QNX->BTNX",
    "BTD,DX->BTX",
    "BSC,CNX->BSNX",
    "BSC,NCX->BSNX",
    "BTNW,NWD->BTD",
    "BTNH,CNH->BTNC",
    "BTNC,CNW->BTNW",
    "BTD,DF->BTF",
    "BTF,FD->BTD",
    "MD,DF->MF",
    "MF,FD->MD",
]
WEIGHT_GRADIENTS = ["MD,MV->DV", "nD,nF->DF", "nF,nD->FD", "BTD,BTNX->DNX", "BTNW,BTD->NWD", "BTNH,BTNC->CNH"]


def operand(axes: str, seed: int) -> np.ndarray:
    """Numbers that bf16 holds exactly."""
    shape = [SIZES[axis.upper()] for axis in axes]
    return np.asarray(np.random.default_rng(seed).standard_normal(shape).astype(jnp.bfloat16), np.float64)


def assert_close(ours, theirs, dtype):
    tolerance = 2e-6 if dtype == jnp.float32 else 2**-8  # of the largest, and one rounding to bf16
    assert ours.dtype == dtype
    np.testing.assert_allclose(
        np.asarray(ours, np.float64), theirs, rtol=tolerance, atol=tolerance * np.abs(theirs).max()
    )


@pytest.mark.parametrize("spec", CONTRACTIONS)
@pytest.mark.parametrize(
    ("dtype", "param_dtype"), [(jnp.float32, jnp.float32), (jnp.bfloat16, jnp.float32), (jnp.bfloat16, jnp.bfloat16)]
)
def test_contract(spec, dtype, param_dtype):
    inputs, y_axes = spec.split("->")
    x_axes, w_axes = inputs.split(",")
    x, w, dy = operand(x_axes, 0), operand(w_axes, 1), operand(y_axes, 2)

    @jax.jit
    def run(x, w, dy):
        y, pullback = jax.vjp(lambda x, w: contract(spec, x, w), x, w)
        return y, *pullback(dy)

    y, dx, dw = run(jnp.asarray(x, dtype), jnp.asarray(w, param_dtype), jnp.asarray(dy, dtype))
    assert_close(y, np.einsum(spec, x, w), dtype)
    assert_close(dx, np.einsum(f"{y_axes},{w_axes}->{x_axes}", dy, w), dtype)
    assert_close(dw, np.einsum(f"{x_axes},{y_axes}->{w_axes}", x, dy), param_dtype)


def test_every_contraction_of_the_project_is_tested(request):
    sources = (request.config.rootpath / "kimi_jax").rglob("*.py")
    found = {spec for path in sources for spec in re.findall(r'contract\("([^"]+)"', path.read_text(encoding="utf-8"))}
    assert found == set(CONTRACTIONS)


@pytest.mark.parametrize("spec", WEIGHT_GRADIENTS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_weight_gradient_is_not_rounded(spec, dtype):
    inputs, w_axes = spec.split("->")
    x, dy = (operand(axes, i) for i, axes in enumerate(inputs.split(",")))
    dw = jax.jit(lambda x, dy: weight_gradient(spec, x, dy))(jnp.asarray(x, dtype), jnp.asarray(dy, dtype))
    assert_close(dw, np.einsum(spec, x, dy), jnp.float32)


@pytest.mark.parametrize("sizes", [{}, dict(B=1), dict(T=1), dict(S=1), dict(N=1), dict(B=1, T=1), dict(B=8, T=1)])
@pytest.mark.parametrize("spec", ["BTNC,BSC->BNTS", "BNTS,BSC->BNTC", "BNTS,BSC->BTNC", "BTNH,CNH->BTNC", "BST,SB->TB"])
@pytest.mark.parametrize("few", [0, linear.FEW])
def test_every_order_of_axes_runs_in_bfloat16(spec, sizes, few, monkeypatch):
    monkeypatch.setattr(linear, "FEW", few)
    for axis, size in sizes.items():
        monkeypatch.setitem(SIZES, axis, size)
    x, y = (operand(axes, i) for i, axes in enumerate(spec.split("->")[0].split(",")))
    ours = jax.jit(lambda x, y: product(spec, x, y))(jnp.asarray(x, jnp.bfloat16), jnp.asarray(y, jnp.bfloat16))
    assert_close(ours, np.einsum(spec, x, y), jnp.float32)


@pytest.mark.parametrize("widest", [6, 30, 60, 1000])
@pytest.mark.parametrize("spec", ["BTD,DV->BTV", "MF,FD->MD", "BTQ,QNX->BTNX", "MD,VD->MV"])
def test_a_few_rows_meet_a_large_matrix_part_by_part(spec, widest, monkeypatch):
    for name, value in (("LARGE", 1), ("WIDEST", widest), ("AT_ONCE", 2)):
        monkeypatch.setattr(linear, name, value)
    monkeypatch.setitem(SIZES, "T", 3)
    x, y = (operand(axes, i) for i, axes in enumerate(spec.split("->")[0].split(",")))
    ours = jax.jit(lambda x, y: product(spec, x, y))(jnp.asarray(x, jnp.bfloat16), jnp.asarray(y, jnp.bfloat16))
    assert_close(ours, np.einsum(spec, x, y), jnp.float32)


def test_products_accumulate_in_float32():
    """4096 ones: a bf16 sum stops at 256."""
    ones = jnp.ones((1, 4096), jnp.bfloat16)
    assert float(product("MD,ND->MN", ones, ones)[0, 0]) == 4096
    x = jnp.full((1, 2), 1 + 2**-20, jnp.float32)  # lost if f32 operands were multiplied in lower precision
    assert float(product("MD,ND->MN", x, x)[0, 0]) == pytest.approx(2 * (1 + 2**-20) ** 2, rel=1e-7)


@pytest.mark.parametrize("shape", [(3, 4), (2, 3, 4), (2, 1, 5, 3)])
def test_transposed(shape):
    x = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    np.testing.assert_array_equal(jax.jit(transposed)(x), x.swapaxes(-1, -2))
