"""The arithmetic that prunes a sweep, and what it finds; nothing is compiled here."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from kimi_jax.ahead import sweep
from kimi_jax.ahead.estimate import estimate, kept_bytes
from kimi_jax.ahead.hardware import CHIPS
from kimi_jax.ahead.topology import topology_devices
from kimi_jax.errors import UserError
from kimi_jax.flops import training_flops_per_token
from kimi_jax.sharding.mesh import make_mesh
from kimi_jax.training.config import TrainConfig, load

LONG = dict(preset="tiny", num_hidden_layers=4, num_attention_heads=8, n_routed_experts=8)


def config(**changes) -> TrainConfig:
    values = dict(model=LONG, mesh=dict(fsdp=4, expert=2), batch_size=64, seq_len=128, accumulation=2)
    return TrainConfig.from_config({**values, **changes})


def devices() -> list[Any]:
    return topology_devices("v5p:2x2x2")


def test_what_the_backward_pass_needs_grows_by_whole_layers():
    """With full remat a layer keeps its input, [M, D] bf16; without any, that is the least of it."""
    cfg = config(model={**LONG, "remat": "full"}).model
    deeper = cfg.replace(num_hidden_layers=6)
    per_layer = (kept_bytes(deeper, 96) - kept_bytes(cfg, 96)) / 2
    statistics = 4 * cfg.num_experts_per_tok + 4 * (cfg.n_routed_experts + cfg.num_attention_heads + 1) / 96
    assert 2 * cfg.hidden_size <= per_layer <= 2 * cfg.hidden_size + statistics
    plain = cfg.replace(remat="none")
    assert kept_bytes(plain.replace(num_hidden_layers=6), 96) - kept_bytes(plain, 96) > 10 * per_layer


def test_what_is_offloaded_takes_no_device_memory():
    """The inputs of blocks, which full remat keeps: [M, D] bf16 a layer."""
    full, offload = (config(model={**LONG, "remat": remat}).model for remat in ("full", "offload"))
    assert kept_bytes(full, 96) - kept_bytes(offload, 96) == pytest.approx(4 * 2 * full.hidden_size)
    assert kept_bytes(offload, 96, on_host=True) == 4 * 2 * full.hidden_size and not kept_bytes(full, 96, on_host=True)


def test_state_is_exact_and_sequences_cost_memory():
    wide = config(model={**LONG, "hidden_size": 1024, "moe_intermediate_size": 2048, "remat": "full"}, seq_len=16)
    mesh = make_mesh(wide.mesh, devices())
    experts = 3 * 3 * 8 * 1024 * 2048 / 8  # elements a device: 3 MoE layers, split over all
    least = experts * 4 * 4  # parameters, momentum, gradients twice
    one = estimate(dataclasses.replace(wide, accumulation=8), mesh)
    four = estimate(wide, mesh)
    assert least < one.gib * 2**30 < 2.5 * least
    assert one.gib < four.gib and one.seconds > four.seconds  # more microbatches: more gathers


def test_compute_alone_bounds_the_time():
    cfg = config()
    alone = training_flops_per_token(cfg.model, 128) * 64 * 128 / 8 / (459e12 * CHIPS["TPU v5"].matmul_efficiency)
    found = estimate(cfg, make_mesh(cfg.mesh, devices()))
    assert found.seconds > alone and found.seconds_per_token == found.seconds / (64 * 128)
    again = estimate(config(model={**LONG, "remat": "full"}), make_mesh(cfg.mesh, devices()))
    assert again.seconds > found.seconds + alone / 4


def test_choices_keep_the_batch_and_come_fastest_first():
    cfg = config()
    found = sweep.choices(cfg, devices(), 1)
    assert len(found) > 10
    times = [choice.estimate.seconds_per_token for choice in found]
    assert times == sorted(times)
    for choice in found:
        sizes = dataclasses.asdict(choice.cfg.mesh)
        assert np.prod(list(sizes.values())) == 8 and cfg.model.n_routed_experts % sizes["expert"] == 0
        assert choice.cfg.batch_size == 64 and 64 % choice.cfg.accumulation == 0
        assert choice.cfg.model.replace(remat="none") == cfg.model.replace(remat="none")
    assert {choice.cfg.model.remat for choice in found} == set(sweep.REMAT_POLICIES)


def test_a_choice_reads_as_overrides_of_the_config_that_it_is_made_from(tmp_path):
    """Those whose tensor or expert has one device too, where the config has more."""
    mesh = dict(fsdp=2, expert=2, tensor=2)
    values = dict(model=LONG, mesh=mesh, batch_size=64, seq_len=128, accumulation=2)
    (tmp_path / "config.py").write_text(f"def get_config():\n    return {values}\n")
    found = sweep.choices(config(mesh=mesh), devices(), 1)
    assert {1, 2} <= {choice.cfg.mesh.tensor for choice in found} and {choice.cfg.mesh.fsdp for choice in found} > {1}
    for choice in found:
        overrides = [f"--config.{override}" for override in str(choice).split()]
        assert load(tmp_path / "config.py", overrides) == choice.cfg


def refused(cfg: TrainConfig, peak_gib: float) -> SimpleNamespace:
    guess = estimate(cfg, make_mesh(cfg.mesh, devices())).gib
    return SimpleNamespace(hbm_gib=95, peak_gib=peak_gib, estimated_gib=guess, devices=8)


def test_what_would_fit():
    """Said to need 100 of 95 GiB, of which 87.4 may be used: by half of the sequences, or with remat."""
    cfg = config()
    found = sweep.would_fit(cfg, devices(), refused(cfg, 100), 1)
    less = [f"model.remat={policy}" for policy in sweep.REMAT_POLICIES if policy != "none"]
    assert found == [*less, "accumulation=4 (2 sequences per device)"]


def test_more_devices_are_the_last_resort():
    cfg = config(model={**LONG, "remat": "full"}, batch_size=16)
    found = sweep.would_fit(cfg, devices(), refused(cfg, 95 * 7), 1)
    assert found == ["8 times as many devices"]  # 665 GiB, of 87.4 that may be used


HUGE = {**LONG, "hidden_size": 16384, "moe_intermediate_size": 12800, "n_routed_experts": 512}


def test_how_many_more_devices_what_was_compiled_takes():
    """The state alone would take 16 times as many."""
    cfg = config(model=HUGE)
    assert sweep.would_fit(cfg, devices(), refused(cfg, 2700), 1) == ["32 times as many devices"]


def test_state_that_fits_nowhere():
    """9.7e11 parameters, three f32 arrays of them over 8 devices: 1,350 GiB each, which takes 16 times as many."""
    with pytest.raises(UserError, match=r"alone need 135\d\.\d GiB a device, of 87.4 .*: use 16 times as many devices"):
        sweep.choices(config(model=HUGE), devices(), 1)


def test_a_batch_that_divides_nowhere():
    with pytest.raises(UserError, match="no mesh of 8 devices divides batch_size 7"):
        sweep.choices(config(batch_size=7, accumulation=1, model={**LONG, "num_attention_heads": 7}), devices(), 1)


def test_parameters_that_no_mesh_divides():
    with pytest.raises(UserError, match=r"no mesh of 8 devices with mesh.context = 1 divides every parameter"):
        sweep.choices(config(model={**LONG, "hidden_size": 25, "num_attention_heads": 7}), devices(), 1)


def test_sequences_that_the_context_does_not_divide():
    with pytest.raises(UserError, match=r"seq_len 33 does not divide over mesh.context = 2: a multiple of 2 would"):
        sweep.choices(config(mesh=dict(fsdp=4, context=2), seq_len=33), devices(), 1)
