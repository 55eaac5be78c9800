"""A task that exceeds its limit is told of once; what ended in time, or waits while the process is stopped, is not."""

from __future__ import annotations

import subprocess
import sys
import threading
import time

import pytest

from kimi_jax.pods import watchdog
from kimi_jax.pods.watchdog import StepLimit, Watchdog


@pytest.fixture
def told(monkeypatch):
    monkeypatch.setattr(watchdog, "TICK", 0.02)
    return []


def test_what_takes_too_long_is_told(told):
    guard = Watchdog(told.append)
    guard.expect("step 3", 0.1)
    time.sleep(0.5)
    assert told == ["step 3 has not ended within 0 s"]
    guard.close()


def test_what_ends_in_time_is_not(told):
    guard = Watchdog(told.append)
    for step in range(10):
        guard.expect(f"step {step}", 5.0)
        time.sleep(0.03)
    guard.rest()
    time.sleep(0.3)
    guard.close()
    assert told == []


def test_a_stopped_process_does_not_hang(told, monkeypatch):
    """The clock jumps by an hour, as when a laptop wakes: one tick has passed."""
    clock = [0.0]
    monkeypatch.setattr(watchdog.time, "monotonic", lambda: clock[0])
    guard = Watchdog(told.append)
    guard.expect("step 1", 100)
    clock[0] = 3600
    for _ in range(1000):
        if guard._task and guard._task.waited:
            break
        threading.Event().wait(0.01)
    guard.close()
    assert told == []


def test_the_limit_follows_the_longest_step(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(watchdog.time, "monotonic", lambda: clock[0])
    limit = StepLimit(0)
    assert limit.next() == 1800  # the first
    clock[0] += 1000
    assert limit.next() == 1800  # it does not count
    clock[0] += 3
    assert limit.next() == 600
    clock[0] += 40
    assert limit.next() == 20 * 40
    clock[0] += 1
    assert limit.next() == 20 * 40
    assert StepLimit(7).next() == 7


HANGS = """
import time
from kimi_jax.pods.config import PodsConfig
from kimi_jax.pods.session import Session

def stuck_here():
    time.sleep(60)

Session("train", PodsConfig(hang_seconds=1)).step(5)
stuck_here()
"""


def test_one_process_that_hangs_shows_its_stacks_and_ends():
    done = subprocess.run([sys.executable, "-c", HANGS], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "in stuck_here" in done.stderr
    assert done.stderr.strip().splitlines()[-1] == "train: step 5 has not ended within 1 s"
