"""``verify``: do two checkpoints of any kind hold the same weights? Both are streamed, tensor by tensor."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import xxhash

from kimi_jax.checkpoint import fp8, paths
from kimi_jax.checkpoint.hf_names import Entry, plan
from kimi_jax.checkpoint.weights import Weights, open_weights, pieces
from kimi_jax.errors import UserError

F32 = np.dtype(np.float32)


@dataclass(frozen=True)
class Verdict:
    """``same`` says whether the weights are the same, or within the tolerance."""

    same: bool
    tensors: int
    different: int  # tensors
    max_difference: float  # largest absolute difference of two weights, in f32
    worst: str | None  # the tensor that has it
    rounded: int  # tensors with two dtypes: the same once the finer is rounded to the coarser
    digests: tuple[str, str] | None

    def __str__(self) -> str:
        if self.digests:
            return f"digests {'are equal' if self.same else 'differ'}: {' and '.join(dict.fromkeys(self.digests))}"
        rounded = f", {self.rounded} of them in two dtypes" if self.rounded else ""
        if not self.different:
            return f"the same: {self.tensors} tensors{rounded}"
        most = f"by up to {self.max_difference:.6g}, in {self.worst}"
        found = f"{self.different} of {self.tensors} tensors differ{rounded}: {most}"
        return f"within the tolerance; {found}" if self.same else found


class Difference(NamedTuple):
    name: str
    same: bool
    rounded: bool
    largest: float


def verify(
    a: paths.AnyPath, b: paths.AnyPath, tolerance: float = 0.0, digest: bool = False, workers: int | None = None
) -> Verdict:
    """Compares Hugging Face directories, converted targets and training steps, in any combination.

    Weights of one dtype must have the same bits, fp8 weights and their scales too. Of two dtypes, the finer is rounded
    once to the coarser, as the conversion does. What differs so may differ by ``tolerance``, absolute, in f32.
    ``digest`` computes one digest of all bits for each side and compares those. Raises ``UserError`` if the two are
    different models or cannot be read.
    """
    left, right = open_weights(a), open_weights(b)
    entries = _common(left, right)
    if digest:
        return _by_digest(left, right, entries, workers)
    found = _over(workers, lambda entry: _compare(left, right, entry), entries)
    different = [d for d in found if not d.same]
    worst = max(found, key=lambda d: d.largest)
    return Verdict(
        same=all(d.largest <= tolerance for d in different) if tolerance else not different,
        tensors=len(found),
        different=len(different),
        max_difference=worst.largest,
        worst=worst.name if worst.largest else different[0].name if different else None,
        rounded=sum(d.rounded for d in found),
        digests=None,
    )


def _common(left: Weights, right: Weights) -> list[Entry]:
    """The tensors, which must be those of both."""
    theirs = {entry.name: entry.shape for entry in plan(right.cfg)}
    entries = list(plan(left.cfg))
    for entry in entries:
        shape = theirs.pop(entry.name, None)
        if shape != entry.shape:
            fact = (
                f"has no {entry.name}" if shape is None else f"has {entry.name} with shape {shape}, not {entry.shape}"
            )
            raise UserError(f"{left.where} and {right.where} are different models: the second {fact}")
    for name in theirs:
        raise UserError(f"{left.where} and {right.where} are different models: the first has no {name}")
    return entries


def _over(workers: int | None, f: Callable[[Entry], Any], entries: Iterable[Entry]) -> list[Any]:
    pool = ThreadPoolExecutor(workers or min(4, os.cpu_count() or 1))
    try:
        return list(pool.map(f, entries))
    finally:
        pool.shutdown(cancel_futures=True)


def _compare(left: Weights, right: Weights, entry: Entry) -> Difference:
    dtypes = left.dtype(entry), right.dtype(entry)
    common = _coarser(*dtypes)
    same, largest = True, 0.0
    for start, stop in pieces(entry, math.lcm(left.block[0], right.block[0])):
        x, y = left.read(entry, start, stop), right.read(entry, start, stop)
        blocks_agree = x.scale is None or left.block == right.block
        if dtypes[0] == dtypes[1] and blocks_agree and all(map(_same_bits, x, y)):
            continue
        xs, ys = x.in_f32(entry.name, left.block), y.in_f32(entry.name, right.block)
        with np.errstate(invalid="ignore", over="ignore"):
            if dtypes[0] != dtypes[1] and np.array_equal(xs.astype(common), ys.astype(common)):
                continue
            gap = np.abs(xs - ys)
        same = False
        largest = max(largest, math.inf if np.isnan(gap).any() else float(gap.max()))
    return Difference(entry.name, same, dtypes[0] != dtypes[1], largest)


def _coarser(x: np.dtype, y: np.dtype) -> np.dtype:
    """Of the two dtypes, the one with fewer bits of mantissa; what has scales stands for f32."""
    candidates = (F32 if dtype == fp8.E4M3 else dtype for dtype in (x, y))
    return min(candidates, key=lambda dtype: ml_dtypes.finfo(dtype).nmant)


def _same_bits(x: np.ndarray | None, y: np.ndarray | None) -> bool:
    if x is None or y is None:
        return x is y
    as_bits = f"u{x.itemsize}"
    return x.dtype == y.dtype and np.array_equal(x.view(as_bits), y.view(as_bits))


def _by_digest(left: Weights, right: Weights, entries: list[Entry], workers: int | None) -> Verdict:
    found = _digest(left, entries, workers), _digest(right, entries, workers)
    return Verdict(found[0] == found[1], len(entries), 0, 0.0, None, 0, digests=found)


def _digest(weights: Weights, entries: list[Entry], workers: int | None) -> str:
    """Of the names, dtypes and bits of all tensors and scales."""

    def of_tensor(entry: Entry) -> str:
        digest = xxhash.xxh3_128(f"{entry.name} {entry.shape} {weights.dtype(entry)}".encode())
        scales = xxhash.xxh3_128()
        for start, stop in pieces(entry, weights.block[0]):
            values, scale = weights.read(entry, start, stop)
            digest.update(values.view(f"u{values.itemsize}"))
            if scale is not None:
                scales.update(scale.view(f"u{scale.itemsize}"))
        return digest.hexdigest() + scales.hexdigest()

    ordered = sorted(entries, key=lambda entry: entry.name)
    return xxhash.xxh3_128("".join(_over(workers, of_tensor, ordered)).encode()).hexdigest()
