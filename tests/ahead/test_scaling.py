"""The table of `benchmarks/scaling.py`: what is kept is shown, what another command made is not."""

from __future__ import annotations

import json

from benchmarks import scaling


def kept(command: list[str], compiled: dict | None, fast: bool = False) -> dict:
    report = dict(devices=512, mesh=dict(fsdp=8, expert=64), sequences_per_device=4.0, seq_len=4096, accumulation=1)
    report |= dict(remat="full", peak_gib=61.25, peak_over_hbm=0.645, compile_seconds=153.2, compiled=compiled)
    return dict(command=command, fast=fast, date="2026-01-31", jax="0.12.0", libtpu="0.0.50", report=report)


COMPILED = dict(
    flops_over_model=1.325,
    optimizer_flops_over_minimum=1.04,
    wire_gb=588.4,
    wire_gb_by_scope=dict(update=12.25),
    seconds_overlapped=8.125,
    seconds_serial=16.5,
    mfu_serial=0.42,
    mfu_overlapped=0.86,
)


def test_rows_come_from_reports_of_the_same_command(tmp_path):
    same, other = scaling.CONFIGURATIONS["v5p-512"].command, ["--config", "another.py"]
    (tmp_path / "v5p-512.json").write_text(json.dumps(kept(same, COMPILED)))
    (tmp_path / "v5p-1024.json").write_text(json.dumps(kept(other, COMPILED)))
    shown = scaling.table(tmp_path).splitlines()
    assert shown[2] == (
        "| v5p-512 | 512 | fsdp 8 expert 64 | 4 x 4,096 | full | 61.2 | 64% | 1.32 | 1.04 | 588 | 12.2 | 8.12-16.50 "
        "| 42-86 | 153 |"
    )
    assert "(jax 0.12.0, libtpu 0.0.50, 2026-01-31)" in shown
    assert shown[-1].startswith("not there: v5p-1024, ")


def test_what_does_not_fit_says_so(tmp_path):
    same = scaling.CONFIGURATIONS["v6e-256"].command
    (tmp_path / "v6e-256.json").write_text(json.dumps(kept(same, None, fast=True)))
    row = scaling.table(tmp_path).splitlines()[2]
    assert row.count("|") == len(scaling.HEAD) + 1 and row.count("does not fit") == 6 and row.endswith("| 153 (O1) |")
