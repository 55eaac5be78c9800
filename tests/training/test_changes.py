"""What is said when a run goes on with another config, and what is nobody's concern."""

from __future__ import annotations

import copy
import dataclasses
import json

import pytest

from kimi_jax.training.changes import changes
from kimi_jax.training.config import TrainConfig

CONFIG = {"model": {"preset": "tiny"}, "data": {"sources": ["a", {"path": "b", "weight": 2.0}]}}


def changed(key, value):
    values = copy.deepcopy(CONFIG)
    *sections, name = key.split(".")
    section = values
    for part in sections:
        section = section.setdefault(part, {})
    section[name] = value
    return TrainConfig.from_config(values)


@pytest.fixture
def meta():
    config = dataclasses.asdict(TrainConfig.from_config(CONFIG))
    return json.loads(json.dumps({"config": config, "data": {"next_step": 4, "tokenizer": "bytes"}}))


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("model.num_experts_per_tok", 2, "model.num_experts_per_tok 4 -> 2"),
        ("model.q_lora_rank", None, "model.q_lora_rank 64 -> None"),
        ("model.rope.mscale", 0.5, "model.rope.mscale 1.0 -> 0.5"),
        ("seed", 1, "seed 0 -> 1"),
        ("batch_size", 16, "batch_size 8 -> 16"),
        ("seq_len", 64, "seq_len 512 -> 64"),
        ("data.holdout", 0.1, "data.holdout 0.05 -> 0.1"),
        ("data.shuffle", False, "data.shuffle True -> False"),
    ],
)
def test_what_is_said(meta, key, value, says):
    assert says in changes(meta, changed(key, value), "bytes")


def test_sources_and_tokenizer(meta):
    assert changes(meta, changed("data.sources", ["a"]), "bytes")[0].startswith("data.sources [")
    assert changes(meta, TrainConfig.from_config(CONFIG), "tiktoken:12") == ["tokenizer bytes -> tiktoken:12"]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model.dtype", "float32"),
        ("model.remat", "full"),
        ("data.cache", "/tokens"),
        ("data.tokenizer", "/moved/tiktoken.model"),
        ("optimizer.learning_rate", 1.0),
        ("mesh.fsdp", 2),
        ("steps", 2000),
        ("accumulation", 2),
    ],
)
def test_what_is_not(meta, key, value):
    assert changes(meta, changed(key, value), "bytes") == []


def test_what_an_older_checkpoint_lacks_is_the_same(meta):
    del meta["config"]["seed"], meta["config"]["model"]["n_shared_experts"], meta["data"]["tokenizer"]
    values = CONFIG | {"seed": 5, "model": {"preset": "tiny", "n_shared_experts": 2}}
    assert changes(meta, TrainConfig.from_config(values), "tiktoken:12") == []
