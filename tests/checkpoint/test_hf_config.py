"""config.json in every state that it should not be in."""

from __future__ import annotations

import pytest

from kimi_jax.checkpoint.hf_config import Quantisation, quantisation_of, read_config
from kimi_jax.errors import UserError

PACKED = {"quant_method": "compressed-tensors", "format": "pack-quantized"}
WEIGHTS = {"num_bits": 4, "type": "int", "strategy": "group", "symmetric": True}


def groups(*sizes) -> dict:
    found = {f"group_{i}": {"weights": WEIGHTS | {"group_size": size}} for i, size in enumerate(sizes)}
    return PACKED | {"config_groups": found}


@pytest.mark.parametrize(
    "text, message",
    [
        (b"", "is not valid JSON"),
        (b'{"hidden_size": "\xff"}', "is not valid JSON.*utf-8"),
        (b"[" * 10**6, "is not valid JSON.*recursion"),
        (b"[]", "must be a JSON object"),
    ],
)
def test_unreadable(tmp_path, text, message):
    (tmp_path / "config.json").write_bytes(text)
    with pytest.raises(UserError, match=message):
        read_config(tmp_path)


def test_quantisation():
    assert quantisation_of({}) == Quantisation(None)
    assert quantisation_of({"quantization_config": {"weight_block_size": [64, 32]}}) == Quantisation("fp8", (64, 32))
    assert quantisation_of({"quantization_config": groups(16, 16)}) == Quantisation("int4", group=16)


@pytest.mark.parametrize(
    "quantization, message",
    [
        (3, "quantization_config must be an object, not 3"),
        ({"quant_method": "awq"}, "quant_method='awq' is not supported"),
        ({"weight_block_size": 128}, "weight_block_size=128 must be two positive numbers"),
        ({"weight_block_size": [128, -1]}, "must be two positive numbers"),
        (PACKED | {"format": "dense"}, "format 'dense' is not supported"),
        (PACKED | {"config_groups": [1]}, r"config_groups must be an object, not \[1\]"),
        (PACKED | {"config_groups": {"g": None}}, "must say how its weights are stored, not None"),
        (PACKED | {"config_groups": {"g": {"weights": [4]}}}, "must say how its weights are stored"),
        (groups(), "needs one group_size, found"),
        (groups(16, 32), r"needs one group_size, found \['16', '32'\]"),
        (groups([32]), r"needs one group_size, found \['\[32\]'\]"),
    ],
)
def test_what_is_not_supported(quantization, message):
    with pytest.raises(UserError, match=f"^config.json: .*{message}"):
        quantisation_of({"quantization_config": quantization})
