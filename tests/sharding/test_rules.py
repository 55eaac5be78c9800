"""The tables from logical axes to mesh axes, on one device; eight are in tests/multidevice."""

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh, Mesh, PartitionSpec

from kimi_jax import presets
from kimi_jax.dims import ParamSpec
from kimi_jax.errors import UserError
from kimi_jax.model import specs
from kimi_jax.sharding.mesh import AXES
from kimi_jax.sharding.rules import LOAD, SERVE, TRAIN, partition, shardings

STACK = ParamSpec((3, 8, 6, 4), ("layers", "experts", "embed", "expert_mlp"), 1.0)
HEAD = ParamSpec((6, 10), ("embed", "vocab"), 1.0)


def test_an_axis_of_one_device_splits_nothing():
    mesh = Mesh(np.asarray(jax.devices()[:1]), "expert")
    found = jax.tree.leaves(shardings(specs(presets.tiny()), mesh))
    assert all(s.is_fully_replicated for s in found)


@pytest.mark.parametrize("n", [2, 4])
def test_loading_splits_the_experts_alone(n):
    """On a mesh without devices: the rules need its shape."""
    mesh = AbstractMesh((n,), ("expert",))
    assert partition(STACK, mesh, LOAD) == PartitionSpec(None, "expert", None, None)
    assert partition(HEAD, mesh, LOAD) == PartitionSpec(None, None)
    assert partition(ParamSpec((6, 8), ("embed", "vocab"), 1.0), mesh, SERVE) == PartitionSpec(None, "expert")


def test_training_splits_every_matrix_and_no_mesh_axis_twice():
    mesh = AbstractMesh((2, 3, 2, 2, 2), AXES)
    assert partition(STACK, mesh, TRAIN) == PartitionSpec(None, "expert", ("fsdp", "context"), "tensor")
    head = ParamSpec((12, 10), ("embed", "vocab"), 1.0)
    assert partition(head, mesh, TRAIN) == PartitionSpec(("fsdp", "context", "expert"), "tensor")
    assert partition(ParamSpec((3, 6), ("layers", "embed"), fill=1.0), mesh, TRAIN) == PartitionSpec(None, None)


def test_no_matrix_is_split_over_all_devices_of_a_copy_by_two_axes():
    """XLA:TPU would reduce it where it ought to gather: the larger axis that divides is taken alone."""
    assert partition(HEAD, AbstractMesh((1, 2, 3, 1, 1), AXES), TRAIN) == PartitionSpec("expert", None)
    assert partition(HEAD, AbstractMesh((1, 2, 4, 1, 1), AXES), TRAIN) == PartitionSpec("fsdp", None)
    assert partition(HEAD, AbstractMesh((2, 2, 3, 1, 1), AXES), TRAIN) == PartitionSpec("expert", None)
    assert partition(HEAD, AbstractMesh((1, 2, 3, 2, 1), AXES), TRAIN) == PartitionSpec(("fsdp", "expert"), "tensor")


def test_one_side_of_a_matrix_alone_is_split_by_fsdp_and_expert():
    query = ParamSpec((16, 8), ("embed", "q_lora"), 1.0)
    assert partition(query, AbstractMesh((1, 2, 4, 1, 1), AXES), TRAIN) == PartitionSpec("expert", None)


def test_an_indivisible_parameter_is_named_with_what_divides():
    mesh = AbstractMesh((1, 4, 1, 1, 1), AXES)
    with pytest.raises(UserError, match="head: 6 embed do not divide over 4 devices.*fsdp.*a product of 1 or 2 would"):
        partition(HEAD, mesh, TRAIN, "head")
