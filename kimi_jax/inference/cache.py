"""The paged latent cache: what decoding keeps of the past, in pages that any request may hold.

    cache_LPGX [layers, pages, slots of a page, X]: per token its normed latent, C numbers, and its rotated rotary key,
                                                    R numbers, side by side, for all heads together

X is C + R, or the next multiple of ``lanes``. A TPU stores rows of 128 lanes in any case: with 576 numbers a token the
compiler would choose another order of the axes, and copy the whole cache for a kernel that reads rows.

A request owns a list of pages, its page table: the token at position t lies in slot t % G of its page t // G. Page 0
belongs to nobody: page tables are padded with it, and what padding writes goes there. The array is never sliced by
layer: an index of (layer, page) reads and writes it in place, so that a step needs no second copy of it.
"""

from __future__ import annotations

import math

import jax.numpy as jnp

from kimi_jax.config import ModelConfig
from kimi_jax.dims import Array
from kimi_jax.errors import UserError

PAGE_SIZE = 16  # tokens: small, since whole pages are shared; of 32 in eight bits, XLA:TPU would copy all at every step


def shape(cfg: ModelConfig, n_pages: int, page_size: int, lanes: int = 1) -> tuple[int, int, int, int]:
    if n_pages < 2 or page_size < 1:
        raise UserError(f"a cache needs 2 pages of 1 token or more (page 0 is padding), not {n_pages} of {page_size}")
    X = cfg.kv_lora_rank + cfg.qk_rope_head_dim
    return (cfg.num_hidden_layers, n_pages, page_size, -(-X // lanes) * lanes)


def n_bytes(cfg: ModelConfig, n_pages: int, page_size: int, lanes: int = 1, dtype: str | None = None) -> int:
    """layers * pages * slots * X * bytes per number."""
    return math.prod(shape(cfg, n_pages, page_size, lanes)) * jnp.dtype(dtype or cfg.dtype).itemsize


def init(cfg: ModelConfig, n_pages: int, page_size: int, lanes: int = 1, dtype: str | None = None) -> Array:
    return jnp.zeros(shape(cfg, n_pages, page_size, lanes), dtype or cfg.dtype)


def padded(x: Array, X: int) -> Array:
    """Zeros behind the last axis, up to X."""
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, X - x.shape[-1])])


def write(
    cache_LPGX: Array, layer: Array | int, new_BTX: Array, pages_BP: Array, start_B: Array, length_B: Array
) -> Array:
    """Stores the first ``length`` new tokens of every row in one layer, from position ``start`` on.

    What is beyond the range of an eight-bit cache becomes its largest number: its cast alone would make it NaN.
    """
    G, i_T = cache_LPGX.shape[2], jnp.arange(new_BTX.shape[1])
    position_BT = start_B[:, None] + i_T
    page_BT = jnp.take_along_axis(pages_BP, jnp.minimum(position_BT // G, pages_BP.shape[1] - 1), axis=1)
    page_BT = jnp.where(i_T < length_B[:, None], page_BT, 0)
    new_BTX = padded(new_BTX, cache_LPGX.shape[-1])
    if cache_LPGX.dtype.itemsize == 1:
        most = float(jnp.finfo(cache_LPGX.dtype).max)
        new_BTX = jnp.clip(new_BTX, -most, most)
    new_BTX = new_BTX.astype(cache_LPGX.dtype)
    return cache_LPGX.at[layer, page_BT, position_BT % G].set(new_BTX)


def gather(cache_LPGX: Array, layer: Array | int, pages_BP: Array) -> Array:
    """The slots of every row's pages in order of position, [B, S, X] with S = pages * slots."""
    kv_BPGX = cache_LPGX[layer, pages_BP]
    return kv_BPGX.reshape(kv_BPGX.shape[0], -1, kv_BPGX.shape[-1])
