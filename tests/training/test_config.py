"""What a run cannot be made of is refused before anything is written."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from kimi_jax import presets
from kimi_jax.errors import UserError
from kimi_jax.training.config import OptimizerConfig, ScheduleConfig, TrainConfig, load


@pytest.mark.parametrize(
    ("kind", "name", "bad", "good"),
    [
        (OptimizerConfig, "learning_rate", [-1e-3, math.inf, math.nan], [0.0, 1.0]),
        (OptimizerConfig, "weight_decay", [-0.1, math.nan], [0.0]),
        (OptimizerConfig, "tau", [-1.0, 0.0, math.inf], [None, 0.5]),
        (OptimizerConfig, "max_grad_norm", [-1.0, 0.0, math.nan], [None, 0.5]),
        (OptimizerConfig, "momentum", [-0.1, 1.0], [0.0, 0.99]),
        (OptimizerConfig, "b1", [1.0], [0.0]),
        (OptimizerConfig, "b2", [1.0], [0.999]),
        (OptimizerConfig, "ns_steps", [0], [1]),
        (ScheduleConfig, "warmup_steps", [-1], [0]),
        (ScheduleConfig, "decay_tokens", [-1], [0]),
        (ScheduleConfig, "final_factor", [-0.1, math.inf], [0.0]),
        (TrainConfig, "eval_batches", [0, -1], [1]),
        (TrainConfig, "checkpoints_kept", [0, -1], [1]),
        (TrainConfig, "bias_update_rate", [-1e-3, math.nan], [0.0]),
        (TrainConfig, "seed", [2**63, -(2**63) - 1], [-1, 2**63 - 1]),
    ],
)
def test_ranges(kind, name, bad, good):
    needed = {"model": presets.tiny()} if kind is TrainConfig else {}
    for value in bad:
        with pytest.raises(UserError, match=name):
            kind(**needed, **{name: value})
    for value in good:
        assert getattr(kind(**needed, **{name: value}), name) == value


def config(folder, text: str, name: str = "config.py") -> Path:
    path = folder / name
    path.write_text(text)
    return path


RETURNS = "def get_config():\n    return "


@pytest.mark.parametrize(
    "text",
    [
        f"from ml_collections import ConfigDict\n{RETURNS}{{'model': ConfigDict({{'preset': 'tiny'}})}}",
        f"from ml_collections import FrozenConfigDict\n{RETURNS}FrozenConfigDict({{'model': {{'preset': 'tiny'}}}})",
        "from __future__ import annotations\nimport dataclasses\n@dataclasses.dataclass\nclass Size:\n    n: int = 16\n"
        f"{RETURNS}dict(model=dict(preset='tiny'), batch_size=Size().n)",
    ],
)
@pytest.mark.parametrize("name", ["base.py", "base.yaml", "base"])
def test_config_files(tmp_path, name, text):
    cfg = load(config(tmp_path, text, name), ["--config.model.rope.theta=1e6"])
    assert cfg.model == presets.tiny().replace(rope=cfg.model.rope) and cfg.model.rope.theta == 1e6


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: tiny\n", "config.py cannot be run"),
        ("get_config = dict(model={})", "config.py does not define get_config"),
        (RETURNS + "None", "config.py must return a dict or a ConfigDict, not None"),
        (RETURNS + "'tiny'", "config.py must return a dict or a ConfigDict, not 'tiny'"),
        (RETURNS + "{}['model']", "config.py cannot be run: KeyError: 'model'"),
        (RETURNS.replace("()", "(size)") + "{}", "config.py cannot be run: TypeError: .* argument"),
        (RETURNS + "{1: 2}", "config.py: keys of the config must be strings, not 1"),
        (
            RETURNS + "{'data': {'sources': [{b'path': 'a'}]}}",
            "config.py: keys of the config must be strings, not b'path'",
        ),
    ],
)
def test_files_that_are_no_config(tmp_path, text, message):
    with pytest.raises(UserError, match=message):
        load(config(tmp_path, text))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data={[]:1}", "config.data must be DataConfig"),
        ("data={1:2}", "data={1:2}': keys of the config must be strings, not 1"),
        ("data.sources=corpus/*.txt", r"""config.data.sources is a list of paths: write '\["corpus/\*.txt"\]'"""),
        ("data.eval_sources=a.txt", "config.data.eval_sources is a list"),
        ("model.preset=[1]", r"unknown preset \[1\]"),
        ("seed=9223372036854775808", "seed must lie in"),
    ],
)
def test_bad_overrides(tmp_path, override, message):
    with pytest.raises(UserError, match=message):
        load(config(tmp_path, RETURNS + "dict(model=dict(preset='tiny'))"), [f"--config.{override}"])


@pytest.mark.parametrize("given", ["texts/tiktoken.model", "~/texts/tiktoken.model"])
def test_the_tokenizer_is_found_from_any_directory(tmp_path, monkeypatch, given):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    path = config(tmp_path, RETURNS + "dict(model=dict(preset='tiny'))")
    assert load(path, [f"--config.data.tokenizer={given}"]).data.tokenizer == f"{tmp_path}/texts/tiktoken.model"
    assert load(path).data.tokenizer == "bytes"
