"""Training that starts from given weights: a converted checkpoint, a Hugging Face directory or another run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from kimi_jax.checkpoint.convert import from_hf
from kimi_jax.checkpoint.export import to_hf
from kimi_jax.checkpoint.manager import Checkpoints, restore_params
from kimi_jax.checkpoint.verify import verify
from kimi_jax.errors import UserError
from kimi_jax.training.config import load as load_config
from kimi_jax.training.loop import Run
from tests.checkpoint.examples import random_tensors, save_hf
from tests.training.test_run import CONFIG

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A config, weights of its model as Hugging Face has them, and the same converted to bf16."""
    folder = tmp_path_factory.mktemp("given")
    (folder / "config.py").write_text(CONFIG)
    model = load_config(folder / "config.py").model
    save_hf(folder / "hf", {name: w * 0.1 for name, w in random_tensors(model).items()}, model)
    from_hf(folder / "hf", folder / "converted", "bf16")
    return folder


def test_the_first_state(folder, tmp_path):
    """The given weights in the run's dtype, at step 0, with a fresh optimizer."""
    run = Run(load_config(folder / "config.py", [f"--config.init_from={folder / 'converted'}"]), tmp_path)
    run._begin()
    stored, _ = restore_params(folder / "converted")
    for ours, theirs in zip(jax.tree.leaves(run.state.params), jax.tree.leaves(stored), strict=True):
        assert ours.dtype == np.float32
        np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs, np.float32))
    assert run.step == 0 and int(run.state.step) == 0
    assert int(run.state.opt_state.count) == 0


def test_another_shape_is_refused(folder, tmp_path):
    changes = [f"--config.init_from={folder / 'converted'}", "--config.model.moe_intermediate_size=24"]
    run = Run(load_config(folder / "config.py", changes), tmp_path)
    with pytest.raises(UserError, match=r"moe\S+ has shape \(.*\) in .*converted but has shape \(.*\) in the config"):
        run._begin()
    deeper = [f"--config.init_from={folder / 'converted'}", "--config.model.q_lora_rank=None"]
    with pytest.raises(UserError, match=r"attn.q\S* does not exist in .*converted but has shape"):
        Run(load_config(folder / "config.py", deeper), tmp_path)._begin()


@pytest.mark.slow
def test_a_run_starts_and_resumes(folder, tmp_path):
    """The weights are where a run starts, not where it resumes; generation reads what was converted."""
    command = [sys.executable, "-m", "kimi_jax.train", "--config", folder / "config.py", "--workdir", tmp_path]
    for steps in (2, 4):
        changes = [f"--config.init_from={folder / 'hf'}", f"--config.steps={steps}", "--config.checkpoint_every=2"]
        done = subprocess.run([*command, *changes], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert ("starting from the weights" in done.stdout) == (steps == 2)
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    assert checkpoints.latest() == 4
    checkpoints.close()
    to_hf(tmp_path, tmp_path / "exported")
    assert verify(tmp_path, tmp_path / "exported").same
    generate = [sys.executable, "-m", "kimi_jax.generate", "--checkpoint", folder / "converted", "--prompt", "a"]
    done = subprocess.run([*generate, "--tokenizer", "bytes", "--max-new-tokens", "4"], cwd=ROOT, capture_output=True)
    assert done.returncode == 0, done.stderr
