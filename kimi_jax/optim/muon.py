"""MuonClip: Muon on hidden matrices, AdamW on the rest, QK-Clip last.

Muon (Moonlight, arXiv 2502.16982, section 2.2), for every matrix W [n, m]:

    B <- mu B + G;   O = NewtonSchulz(mu B + G)  (Nesterov)  or  NewtonSchulz(B)
    W <- W - lr (rms sqrt(max(n, m)) O + wd W)

AdamW (arXiv 1711.05101) for embeddings, the head, gains and biases, with the same lr and wd:

    W <- W - lr (m_hat / (sqrt(v_hat) + eps) + wd W)

QK-Clip (Kimi K2, arXiv 2507.20534, section 2.1): see ``qk_clip``.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from kimi_jax.dims import Array
from kimi_jax.optim import axes as matrix_axes
from kimi_jax.optim import qk_clip
from kimi_jax.optim.axes import ELEMENTWISE, FROZEN, MATRIX, Layout
from kimi_jax.optim.newton_schulz import newton_schulz

LearningRate = float | Callable[[Array], Array]
PIECES = 3  # that a stack of experts is taken in: only one at a time has temporaries


class MuonClipState(NamedTuple):
    """``momentum`` of every trained leaf (Adam's first moment where AdamW acts); ``second`` moment where it acts."""

    count: Array
    momentum: Any
    second: Any
    ever_clipped: Array  # bool [L, N]: heads that QK-Clip has touched so far; one False without such leaves


def orthogonalised(direction: Array, layout: Layout, rms: float, steps: int, dtype: Any) -> Array:
    """rms sqrt(max(n, m)) NewtonSchulz of every matrix of a leaf."""
    stacks = [
        rms * max(m.shape[-2:]) ** 0.5 * newton_schulz(m, steps, dtype) for m in matrix_axes.matrices(direction, layout)
    ]
    return matrix_axes.leaf(stacks, direction.shape, layout)


def by_pieces(
    f: Callable[..., tuple[Array, ...]], stacks: tuple[Array, ...], others: tuple[Array, ...]
) -> tuple[Array, ...]:
    """``f(*stacks, *others)``, new values of ``stacks``, some layers at a time and each in the place of the old."""
    L = len(stacks[0])
    size = -(-L // PIECES)

    def piece(start: Array | int, size: int, stacks: tuple[Array, ...]) -> tuple[Array, ...]:
        new = f(*(lax.dynamic_slice_in_dim(stack, start, size) for stack in (*stacks, *others)))
        new = [n.astype(stack.dtype) for n, stack in zip(new, stacks, strict=True)]
        new = lax.optimization_barrier(new)  # all is read before anything is written, else the stacks are copied
        return tuple(lax.dynamic_update_slice_in_dim(s, n, start, 0) for s, n in zip(stacks, new, strict=True))

    stacks = lax.fori_loop(0, L // size, lambda i, stacks: piece(i * size, size, stacks), stacks)
    return piece(L - L % size, L % size, stacks) if L % size else stacks


def muon_clip(
    learning_rate: LearningRate,
    *,
    momentum: float = 0.95,
    momentum_dtype: Any | None = None,
    nesterov: bool = True,
    ns_steps: int = 5,
    ns_dtype: Any = "bfloat16",
    weight_decay: float = 0.1,
    rms: float = 0.2,
    tau: float | None = 100.0,
    axes: Any | None = None,
    split_fused: bool = False,
    b1: float = 0.9,
    b2: float = 0.95,
    eps: float = 1e-8,
    orthogonalise: Callable[[Array, Layout, float, int, Any], Array] | None = None,
    layouts: Callable[[Any], Any] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """The MuonClip transform: ``update(grads, state, params, max_logits=S)``, S [layers, heads] of this step's forward.

    ``learning_rate``: a number, or a function of the number of steps taken.
    ``axes``: logical axis names, a tuple per leaf in the structure of the parameters (``kimi_jax.dims``). "layers" and
    "experts" stack matrices; "heads" and the axis after it form one side; a leaf with "vocab" is an embedding or head;
    "router_bias" is a buffer that stays as it is; ``Fused`` parts named "nope" and "rope" after "heads" are what
    QK-Clip scales. Without ``axes`` a 2-D leaf is a matrix unless its path names an embedding, a head, a bias or a
    scale, and nothing is clipped.
    ``momentum_dtype``: of the momentum of matrices as it is kept; ``None`` means that of the parameter.
    ``split_fused``: orthogonalise each part of a ``Fused`` axis as its own matrix.
    ``orthogonalise``: takes the place of ``orthogonalised``, for matrices that lie spread over devices; leaves that are
    ``alike`` come as one.
    ``layouts``: gives the ``Layout`` of every leaf of the parameters, which else follows from ``axes``.
    ``tau``: QK-Clip's threshold; ``None`` turns it off. Under gradient accumulation S is the maximum over microbatches.
    Rows of S are attention layers, each the module whose children are its projections, in the order of their paths,
    "layer_2" before "layer_10".
    """
    orthogonalise = orthogonalise or orthogonalised
    layouts = layouts or partial(matrix_axes.layouts, axes=axes, split_fused=split_fused)

    def matrix_updates(grads: list[Array], buffers: list[Array], layout: Layout) -> list[Array]:
        directions = [momentum * b + g if nesterov else b for g, b in zip(grads, buffers, strict=True)]
        if len(directions) == 1:
            return [orthogonalise(directions[0], layout, rms, ns_steps, ns_dtype)]
        ends = [sum(len(d) for d in directions[: i + 1]) for i in range(len(directions) - 1)]
        return jnp.split(orthogonalise(jnp.concatenate(directions), layout, rms, ns_steps, ns_dtype), ends)

    def clipped(params: Any) -> tuple[dict[str, qk_clip.Clipped], tuple[int, int]]:
        if axes is None:
            return {}, (0, 0)
        return qk_clip.clipped_leaves(matrix_axes.match(params, axes), params)

    def init(params: Any) -> MuonClipState:
        kinds = jax.tree.map(lambda layout: layout.kind, layouts(params))

        def first_of(p: Array, kind: str):
            dtype = momentum_dtype if kind == MATRIX else None
            return optax.MaskedNode() if kind == FROZEN else jnp.zeros_like(p, dtype)

        first = jax.tree.map(first_of, params, kinds)
        second = jax.tree.map(
            lambda p, kind: jnp.zeros_like(p) if kind == ELEMENTWISE else optax.MaskedNode(), params, kinds
        )
        leaves, n_layers_and_heads = clipped(params)
        ever_clipped = jnp.zeros(n_layers_and_heads if leaves else (), bool)  # never empty: Orbax saves no empty array
        return MuonClipState(jnp.zeros((), jnp.int32), first, second, ever_clipped)

    def update(grads: Any, state: MuonClipState, params: Any | None = None, *, max_logits: Array | None = None, **_):
        if params is None:
            raise ValueError("muon_clip needs the parameters: update(grads, state, params)")
        leaves, n_layers_and_heads = clipped(params)
        lr = learning_rate(state.count) if callable(learning_rate) else learning_rate
        lr = lax.optimization_barrier(jnp.asarray(lr))  # computed once: XLA:CPU would do so in the update of every leaf
        count = state.count + 1
        g_LN, ever_clipped = None, state.ever_clipped
        if leaves and tau is not None:
            g_LN = qk_clip.clip_factors(qk_clip.check_shape(max_logits, n_layers_and_heads), tau)
            ever_clipped = ever_clipped | (g_LN < 1)

        def decayed(direction: Array, p: Array) -> Array:
            return -lr * (direction + weight_decay * p)

        def muon(layout: Layout, *columns: list[Array]) -> list[tuple[Array, ...]]:
            """Steps and momenta of leaves whose matrices are taken as one stack."""

            def steps(grads: list[Array], firsts: list[Array], ps: list[Array]) -> list[tuple[Array, ...]]:
                totals = [momentum * m.astype(jnp.float32) + g for g, m in zip(grads, firsts, strict=True)]
                found = zip(matrix_updates(grads, totals, layout), ps, totals, firsts, strict=True)
                return [(decayed(o, p), total.astype(first.dtype)) for o, p, total, first in found]

            if layout.stack < 2:
                return steps(*columns)
            (grad,), (first,), (p,) = columns
            grad = grad.astype(jnp.promote_types(grad.dtype, p.dtype))  # the steps take its place
            return [by_pieces(lambda *leaf: steps(*([x] for x in leaf))[0], (grad, first), (p,))]

        def adam(grad: Array, first: Array, p: Array, second: Array) -> tuple[Array, Array, Array]:
            grad = grad.astype(first.dtype)
            first = b1 * first + (1 - b1) * grad
            second = b2 * second + (1 - b2) * jnp.square(grad)
            m_hat, v_hat = first / (1 - b1**count), second / (1 - b2**count)
            return decayed(m_hat / (jnp.sqrt(v_hat) + eps), p), first, second

        def clipped_step(path, step: Array, p: Array) -> Array:
            key = jax.tree_util.keystr(path)
            if key in leaves:
                step = lax.optimization_barrier(step)  # no fused multiply-add with p that the clip would prevent
                if g_LN is not None:
                    step = qk_clip.scaled_update(step, p, g_LN, leaves[key])
            return step.astype(p.dtype)

        flat, tree = jax.tree_util.tree_flatten_with_path(params)
        paths, ps = [path for path, _ in flat], [p for _, p in flat]
        kinds, gs, firsts, seconds = (
            tree.flatten_up_to(t) for t in (layouts(params), grads, state.momentum, state.second)
        )
        steps = [jnp.zeros_like(p) for p in ps]
        for layout, members in matrix_axes.alike(kinds, gs):
            if layout.kind == MATRIX:
                found = muon(layout, *([column[i] for i in members] for column in (gs, firsts, ps)))
                for i, (step, first) in zip(members, found, strict=True):
                    steps[i], firsts[i] = step, first
            elif layout.kind == ELEMENTWISE:
                for i in members:
                    steps[i], firsts[i], seconds[i] = adam(gs[i], firsts[i], ps[i], seconds[i])
        updates = [clipped_step(*of) for of in zip(paths, steps, ps, strict=True)]
        updates, first, second = (jax.tree.unflatten(tree, column) for column in (updates, firsts, seconds))
        return updates, MuonClipState(count, first, second, ever_clipped)

    return optax.GradientTransformationExtraArgs(init, update)  # pyright: ignore[reportArgumentType]


def adamw(
    learning_rate: LearningRate,
    *,
    weight_decay: float = 0.1,
    tau: float | None = None,
    axes: Any | None = None,
    b1: float = 0.9,
    b2: float = 0.95,
    eps: float = 1e-8,
) -> optax.GradientTransformationExtraArgs:
    """AdamW on every leaf but buffers, with QK-Clip if ``tau`` is given: what MuonClip is compared with."""

    def layouts(params: Any) -> Any:
        found = matrix_axes.layouts(params, axes, False)
        return jax.tree.map(lambda layout: layout if layout.kind == FROZEN else Layout(ELEMENTWISE), found)

    return muon_clip(
        learning_rate, weight_decay=weight_decay, tau=tau, axes=axes, b1=b1, b2=b2, eps=eps, layouts=layouts
    )
