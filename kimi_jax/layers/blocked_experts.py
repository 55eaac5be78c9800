"""Routed experts on a CPU: one walk over the experts, each a few dense products on just its own rows.

XLA needs static shapes, and the number of rows of an expert is known at run time only. So the sorted assignments are
cut into pieces that never cross an expert; the products of a piece are computed at the smallest of a ladder of sizes
that holds it (``lax.switch``), and what it writes past its end, the next piece overwrites. A balanced expert is one
piece and wastes a few per cent; one with many more rows is several pieces; an empty one costs nothing. Forward and
backward are one walk each, and no copy of a layer's weights is made. A matrix is sliced out and cast where it is used,
which XLA does in one pass over it: with few rows, reading the weights is all the work there is.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from kimi_jax.dims import Array, Params
from kimi_jax.layers.dispatch import Hidden, combine, sort_assignments, sum_copies
from kimi_jax.layers.linear import product, weight_gradient
from kimi_jax.layers.mlp import swiglu

LADDER = (1, 2, 4, 6, 8, 10, 12)  # in units of about an eighth of the mean load
SMALL = 2**18  # multiplications: a product with fewer is computed at the longest size, and the others are not compiled


class Pieces(NamedTuple):
    """Piece i < count covers the sorted rows from ``start_I[i]`` up to ``end_I[i]``, of expert ``expert_I[i]``."""

    count: Array
    expert_I: Array
    start_I: Array
    end_I: Array


def ladder(n_rows: int, n_experts: int, n_weights: int) -> tuple[int, ...]:
    """The sizes at which pieces are computed, in rows; ``n_weights`` are in one matrix of an expert."""
    unit = max(n_rows // (8 * n_experts), 1)
    unit = 1 << (unit - 1).bit_length()
    sizes = tuple(unit * step for step in LADDER)
    return sizes if sizes[-1] * n_weights >= SMALL else sizes[-1:]


def cut(sizes_E: Array, n_rows: int, longest: int) -> Pieces:
    E = sizes_E.shape[0]
    per_expert_E = -(-sizes_E // longest)
    last_E, ends_E = jnp.cumsum(per_expert_E), jnp.cumsum(sizes_E)
    i_I = jnp.arange(n_rows // longest + E)
    expert_I = jnp.minimum(jnp.searchsorted(last_E, i_I, side="right"), E - 1)
    start_I = (ends_E - sizes_E)[expert_I] + (i_I - (last_E - per_expert_E)[expert_I]) * longest
    return Pieces(last_E[-1], expert_I, start_I, jnp.minimum(start_I + longest, ends_E[expert_I]))


class Piece(NamedTuple):
    """One piece for ``compute``: as many rows from ``start`` as the longest size; its own are those before ``end``."""

    start: Array
    end: Array
    sizes: tuple[int, ...]
    expert: Array
    weights: Params

    def rows(self, x: Array) -> Array:
        return lax.dynamic_slice_in_dim(x, self.start, self.sizes[-1])

    def times(self, spec: str, x: Array, name: str) -> Array:
        """``product`` of rows with one of the expert's matrices."""
        w = jax.tree.map(partial(lax.dynamic_index_in_dim, index=self.expert, keepdims=False), self.weights[name])
        return product(spec, x, w.astype(x.dtype))

    def products(self, f: Callable, *rows: Array):
        """f of the first n rows each, n the smallest size that holds the piece; its results padded to all rows."""
        pad = lambda y, n: jnp.pad(y, ((0, self.sizes[-1] - n), (0, 0)))  # noqa: E731
        return self._at_size(lambda n, *rows: jax.tree.map(partial(pad, n=n), f(*rows)), *rows)

    def sums(self, f: Callable, *rows: Array):
        """f of the first n rows each, n as in ``products``, where f sums over the rows."""
        return self._at_size(lambda n, *rows: f(*rows), *rows)

    def _at_size(self, f: Callable, *rows: Array):
        rung = jnp.searchsorted(jnp.asarray(self.sizes), self.end - self.start)
        return lax.switch(rung, [lambda *rows, n=n: f(n, *(x[:n] for x in rows)) for n in self.sizes], *rows)


def _walk(pieces: Pieces, sizes: tuple[int, ...], weights: Params, compute, store, carry, first: Array | int = 0):
    """For every piece: carry = store(carry, expert, start, compute(piece)). Expert 0 is ``weights[first]``."""

    def step(i: Array, carry):
        piece = Piece(pieces.start_I[i], pieces.end_I[i], sizes, first + pieces.expert_I[i], weights)
        return store(carry, piece.expert, piece.start, compute(piece))

    return lax.fori_loop(0, pieces.count, step, carry)


def _put(out: Array, rows: Array, start: Array) -> Array:
    return lax.dynamic_update_slice_in_dim(out, rows, start, 0)


def _pad(x: Array, extra: int) -> Array:
    return jnp.pad(x, ((0, extra), *((0, 0),) * (x.ndim - 1)))


def forward(p: Params, x_MD: Array, weights_MK: Array, experts_MK: Array) -> tuple[Array, Hidden]:
    """y [M, D] = sum_k weights[m, k] SwiGLU(x_m; p[experts[m, k]]), summed in f32, in the dtype of ``x``."""
    return _run(p, x_MD, weights_MK, experts_MK, p["gate"].shape[0], 0)


def blocked_experts_of(stack: Params, layer: Array, x_MD: Array, weights_MK: Array, experts_MK: Array) -> Array:
    """``forward`` with the weights of one layer of a stack [L, E, ...], read in place. Not differentiable."""
    _, E, _, _ = stack["gate"].shape
    flat = jax.tree.map(lambda w: w.reshape(-1, *w.shape[2:]), stack)
    return _run(flat, x_MD, weights_MK, experts_MK, E, layer * E)[0]


def _run(p: Params, x_MD: Array, weights_MK: Array, experts_MK: Array, E: int, first: Array | int):
    (M, K), dtype = experts_MK.shape, x_MD.dtype
    _, D, F = p["gate"].shape
    order = sort_assignments(experts_MK, E)
    sizes = ladder(M * K, E, D * F)
    longest = sizes[-1]
    token_A = _pad(order.order_A // K, longest)

    def compute(piece: Piece):
        def expert(x_nD: Array):
            gate_nF, up_nF = (piece.times("nD,DF->nF", x_nD, name).astype(dtype) for name in ("gate", "up"))
            return gate_nF, up_nF, piece.times("nF,FD->nD", swiglu(gate_nF, up_nF), "down").astype(dtype)

        return piece.products(expert, x_MD[piece.rows(token_A)])

    def store(outputs, _, start: Array, results):
        return tuple(_put(out, rows, start) for out, rows in zip(outputs, results, strict=True))

    outputs = tuple(jnp.zeros((M * K + longest, width), dtype) for width in (F, F, D))
    pieces = cut(order.sizes_E, M * K, longest)
    gate_AF, up_AF, y_AD = _walk(pieces, sizes, p, compute, store, outputs, first)
    return combine(y_AD[order.inverse_MK], weights_MK).astype(dtype), Hidden(order, gate_AF, up_AF)


def backward(p: Params, x_MD: Array, weights_MK: Array, hidden: Hidden, dy_MD: Array) -> tuple[Params, Array, Array]:
    """The gradients of ``p`` (in f32), ``x`` and ``weights``."""
    (order, gate_AF, up_AF), (M, K), dtype = hidden, weights_MK.shape, x_MD.dtype
    E, D, F = p["gate"].shape
    sizes = ladder(M * K, E, D * F)
    longest = sizes[-1]
    token_A = _pad(order.order_A // K, longest)
    weight_A1 = _pad(weights_MK.reshape(-1)[order.order_A], longest)[:, None]

    def compute(piece: Piece):
        own_n1 = (piece.start + jnp.arange(longest) < piece.end)[:, None]
        token_n, weight_n1 = piece.rows(token_A), piece.rows(weight_A1)
        x_nD, dy_nD = x_MD[token_n], jnp.where(own_n1, dy_MD[token_n], 0)
        h_nF, swiglu_vjp = jax.vjp(swiglu, piece.rows(gate_AF), piece.rows(up_AF))
        dh_nF = piece.products(lambda dy_nD: piece.times("nD,FD->nF", dy_nD, "down"), dy_nD)
        h_f32, weighted_nF = h_nF.astype(jnp.float32), (h_nF.astype(jnp.float32) * weight_n1).astype(dtype)
        dweight_n1 = jnp.sum(dh_nF * h_f32, axis=-1, keepdims=True)
        dgate_nF, dup_nF = swiglu_vjp((dh_nF * weight_n1).astype(dtype))

        def dx(dgate_nF: Array, dup_nF: Array):
            dx_nD = piece.times("nF,DF->nD", dgate_nF, "gate") + piece.times("nF,DF->nD", dup_nF, "up")
            return dx_nD.astype(dtype)

        def dw(x_nD: Array, dy_nD: Array, dgate_nF: Array, dup_nF: Array, weighted_nF: Array):
            return {
                "gate": weight_gradient("nD,nF->DF", x_nD, dgate_nF),
                "up": weight_gradient("nD,nF->DF", x_nD, dup_nF),
                "down": weight_gradient("nF,nD->FD", weighted_nF, dy_nD),
            }

        return (
            piece.products(dx, dgate_nF, dup_nF),
            dweight_n1,
            piece.sums(dw, x_nD, dy_nD, dgate_nF, dup_nF, weighted_nF),
        )

    def store(carry, expert: Array, start: Array, results):
        dx_AD, dweight_A1, dw = carry
        dx_nD, dweight_n1, new = results
        added = {name: lax.dynamic_index_in_dim(dw[name], expert, keepdims=False) + new[name] for name in dw}
        dw = {name: lax.dynamic_update_index_in_dim(dw[name], added[name], expert, 0) for name in dw}
        return _put(dx_AD, dx_nD, start), _put(dweight_A1, dweight_n1, start), dw

    carry = (
        jnp.zeros((M * K + longest, D), dtype),
        jnp.zeros((M * K + longest, 1), jnp.float32),
        {name: jnp.zeros(p[name].shape, jnp.float32) for name in p},
    )
    pieces = cut(order.sizes_E, M * K, longest)
    dx_AD, dweight_A1, dw = _walk(pieces, sizes, p, compute, store, carry)
    return dw, sum_copies(dx_AD, order).astype(dtype), dweight_A1[order.inverse_MK, 0]
