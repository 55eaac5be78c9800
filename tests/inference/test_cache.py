"""The paged cache against a dict of tokens."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kimi_jax import presets
from kimi_jax.errors import UserError
from kimi_jax.inference import cache

CFG = presets.tiny().replace(num_hidden_layers=3, kv_lora_rank=5, qk_rope_head_dim=2)
PAGES_BP = np.asarray([[7, 2, 9, 0], [4, 11, 0, 0], [1, 3, 5, 6], [0, 0, 0, 0]])


@pytest.mark.parametrize("page_size", [1, 3, 4])
def test_what_is_written_at_a_position_is_gathered_there(page_size):
    rng, held = np.random.default_rng(0), {}
    pages, write = cache.init(CFG, 12, page_size, lanes=4, dtype="float32"), jax.jit(cache.write)
    room = 4 * page_size
    start = np.zeros(4, int)
    for counts in ([2, 1, 4, 0], [0, 1, 3, 0], [1, 0, 1, 0]):
        counts = np.minimum(counts, np.asarray([3, 2, 4, 0]) * page_size - start)
        for layer in range(3):
            new = rng.standard_normal((4, 5, 7)).astype(np.float32)  # rows are wider than what counts
            pages = write(pages, layer, new, PAGES_BP, start, counts)
            held |= {(layer, b, start[b] + i): new[b, i] for b in range(4) for i in range(counts[b])}
        start += counts
    for layer in range(3):
        found = np.asarray(cache.gather(pages, jnp.asarray(layer), jnp.asarray(PAGES_BP)))
        assert found.shape == (4, room, 8)
        for b in range(4):
            for position in range(start[b]):
                np.testing.assert_array_equal(found[b, position, :7], held[layer, b, position])
    unused = [8, 10]
    assert not np.asarray(pages)[:, unused].any()


def test_eight_bits_hold_what_is_too_large_as_their_largest_number():
    pages = cache.init(CFG, 2, 4, dtype="float8_e4m3fn")
    new = jnp.asarray([600, -1e9, 448, 0.5, -0.25, 1, 465], jnp.float32)[None, None]
    one = np.asarray([[1]]), np.asarray([0]), np.asarray([1])
    found = cache.gather(cache.write(pages, 0, new, *one), 0, jnp.asarray([[1]]))
    assert np.asarray(found[0, 0, :7], np.float32).tolist() == [448, -448, 448, 0.5, -0.25, 1, 448]


def test_the_memory_of_a_token_of_the_released_model():
    """576 numbers in each of 61 layers: 70,272 bytes in bf16."""
    assert cache.n_bytes(presets.kimi_k2_1t(), 3, 64) == 3 * 64 * 70_272
    assert cache.n_bytes(presets.kimi_k2_1t(), 3, 64, dtype="float32") == 2 * 3 * 64 * 70_272
    assert cache.n_bytes(presets.kimi_k2_1t(), 3, 64, lanes=128) == 3 * 64 * 78_080
    assert cache.n_bytes(CFG, 9, 4) == cache.init(CFG, 9, 4).nbytes


@pytest.mark.parametrize("n_pages, page_size", [(1, 16), (8, 0)])
def test_a_cache_without_room_is_refused(n_pages, page_size):
    with pytest.raises(UserError, match="page 0 is padding"):
        cache.init(CFG, n_pages, page_size)
