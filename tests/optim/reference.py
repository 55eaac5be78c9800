"""MuonClip in float64 numpy, one matrix and one head at a time: what the tests of this folder compare with."""

from __future__ import annotations

import jax
import numpy as np


def newton_schulz(m: np.ndarray, steps: int = 5) -> np.ndarray:
    """The polynomial a X + b (X X^T) X + c (X X^T)^2 X, written on the side that is given; no transposing."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = np.asarray(m, np.float64)
    x = x / (np.sqrt(np.sum(x**2)) + 1e-7)
    for _ in range(steps):
        cubic = x @ x.T @ x
        x = a * x + b * cubic + c * x @ x.T @ cubic
    return x


class Muon:
    """Muon's rule on one leaf: ``stack`` leading axes, then ``rows`` axes of rows; columns end at ``ends``."""

    def __init__(self, stack=0, rows=1, ends=(None,), momentum=0.95, nesterov=True, rms=0.2):
        self.stack, self.rows, self.ends = stack, rows, ends
        self.momentum, self.nesterov, self.rms, self.buffer = momentum, nesterov, rms, 0.0

    def direction(self, grad: np.ndarray) -> np.ndarray:
        self.buffer = self.momentum * self.buffer + grad
        mixed = self.momentum * self.buffer + grad if self.nesterov else self.buffer
        out = np.full_like(mixed, np.nan)
        for index in np.ndindex(mixed.shape[: self.stack]):
            start = 0
            for end in self.ends:
                part = mixed[index][..., start:end]
                matrix = part.reshape(int(np.prod(part.shape[: self.rows])), -1)
                scale = self.rms * np.sqrt(max(matrix.shape))
                out[index][..., start:end] = (scale * newton_schulz(matrix)).reshape(part.shape)
                start = end
        return out


class AdamW:
    def __init__(self, b1=0.9, b2=0.95, eps=1e-8):
        self.b1, self.b2, self.eps = b1, b2, eps
        self.first = self.second = 0.0
        self.t = 0

    def direction(self, grad: np.ndarray) -> np.ndarray:
        self.t += 1
        self.first = self.b1 * self.first + (1 - self.b1) * grad
        self.second = self.b2 * self.second + (1 - self.b2) * grad**2
        unbiased = self.first / (1 - self.b1**self.t), self.second / (1 - self.b2**self.t)
        return unbiased[0] / (np.sqrt(unbiased[1]) + self.eps)


def train(rule: Muon | AdamW, weight, grads, lr: float, decay: float, after=lambda step, w: w) -> np.ndarray:
    """The weight after one step per gradient; ``after(step, w)`` acts on it at the end of every step."""
    w = np.asarray(weight, np.float64)
    for step, grad in enumerate(grads):
        w = after(step, w - lr * (rule.direction(np.asarray(grad, np.float64)) + decay * w))
    return w


def clip(weight: np.ndarray, max_logits_LN: np.ndarray, tau: float, parts) -> np.ndarray:
    """QK-Clip of a stack [L, in, N, parts], head by head."""
    out = weight.copy()
    for layer, head in np.ndindex(max_logits_LN.shape):
        g, start = min(1.0, tau / float(max_logits_LN[layer, head])), 0
        for name, size in parts:
            out[layer, :, head, start : start + size] *= {"nope": np.sqrt(g), "rope": g}.get(name, 1.0)
            start += size
    return out


def error(got, want: np.ndarray) -> float:
    """Relative, in the Frobenius norm."""
    return float(np.linalg.norm(np.asarray(got, np.float64) - want) / np.linalg.norm(want))


def flat(tree) -> dict:
    """{"a/b": leaf} of a nested dict; tuples are leaves, so it serves for axes as well."""
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: isinstance(x, tuple))
    return {"/".join(key.key for key in path): leaf for path, leaf in leaves}


def gaussian(like, seed: int, scale: float = 1.0):
    """A float32 tree in the shapes of ``like``."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: (scale * rng.standard_normal(x.shape)).astype(np.float32), like)
