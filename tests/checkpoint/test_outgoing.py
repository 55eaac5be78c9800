"""The order and dtypes of what is exported, against the released checkpoint."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest

from kimi_jax import presets
from kimi_jax.checkpoint.hf_names import Entry
from kimi_jax.checkpoint.outgoing import Outgoing
from kimi_jax.checkpoint.safetensors_writer import plan_shards
from kimi_jax.checkpoint.weights import CheckpointWeights
from tests.checkpoint.examples import BF16, FP8, random_params, save_run

F32 = np.float32


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> CheckpointWeights:
    return CheckpointWeights.open(save_run(tmp_path_factory.mktemp("run"), random_params()))


def test_order(weights):
    """Layer by layer, so that a file holds few layers; each weight is followed by its scales."""
    names = [tensor.name for tensor in Outgoing.plan(weights, "fp8").tensors()]
    assert names[0] == "model.embed_tokens.weight" and set(names[-2:]) == {"model.norm.weight", "lm_head.weight"}
    layers = [int(name.split(".")[2]) for name in names[1:-2]]
    assert layers == sorted(layers) and set(layers) == {0, 1, 2}
    for name, following in zip(names, names[1:], strict=False):
        assert following.removesuffix("_scale_inv") == name or not following.endswith("_scale_inv")


@pytest.mark.parametrize("wanted, projection, other", [(None, F32, F32), ("bf16", BF16, BF16), ("fp8", FP8, BF16)])
def test_dtypes(weights, wanted, projection, other):
    """What the release keeps in bf16: embedding, head, norms and routers; in f32: the routers' biases."""
    for name, dtype in Outgoing.plan(weights, wanted).dtypes.items():
        last = name.split(".")[-2]
        if name.endswith("e_score_correction_bias"):
            assert dtype == F32
        elif last in ("embed_tokens", "lm_head", "gate") or last.endswith("norm"):
            assert dtype == other, name
        else:
            assert last.endswith(("_proj", "_proj_with_mqa")) and dtype == projection, name


def test_pieces_of_a_file_with_scales_alone(weights):
    """The weight is read again for them."""
    outgoing = Outgoing.plan(weights, "fp8")
    scales = tuple(tensor for tensor in outgoing.tensors() if tensor.name.endswith("o_proj.weight_scale_inv"))
    assert [piece for piece in outgoing.pieces(scales[:1])] == [("model.layers.0.self_attn.o_proj.weight", 0, 136)]
    assert scales[0].dtype == F32 and scales[0].shape == (2, 2)


class Abstract:
    """The released model's weights, in bf16 but for the routers' biases, without a byte of them."""

    cfg, block = presets.kimi_k2_1t(), (128, 128)

    def dtype(self, entry: Entry) -> np.dtype:
        return np.dtype(F32 if entry.path[-1] == "bias" else BF16)


def test_the_released_model():
    """As many tensors and bytes of each dtype as in its 61 files, without the 61 stray ``inv_freq`` [56] in bf16."""
    tensors = list(Outgoing.plan(Abstract(), "fp8").tensors())  # type: ignore
    assert Counter(tensor.dtype for tensor in tensors) == {
        np.dtype(FP8): 69_608,
        np.dtype(F32): 69_608 + 60,
        np.dtype(BF16): 368 - 61,
    }
    assert sum(tensor.nbytes for tensor in tensors) == 1_029_173_256_720 - 61 * 56 * 2
    assert sum(math.prod(tensor.shape) for tensor in tensors if tensor.dtype == FP8) == 1_023_893_241_856
    shards = plan_shards(tensors, 5_000_000_000)
    assert 206 <= len(shards) <= 208
    assert all(len(shard.header) + shard.data_bytes <= 5_000_000_000 for shard in shards)
