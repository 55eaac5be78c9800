"""Signals are noted while they are listened to, and steps are traced by range and on request."""

from __future__ import annotations

import os
import signal

import jax
import pytest

from kimi_jax.errors import UserError
from kimi_jax.pods.config import PodsConfig
from kimi_jax.pods.signals import Signals
from kimi_jax.pods.trace import Tracer


def test_signals_are_noted_and_given_back():
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGUSR1)
    with Signals() as signals:
        assert not signals.stop and not signals.trace
        os.kill(os.getpid(), signal.SIGUSR1)
        assert signals.trace and not signals.stop
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.stop
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGUSR1)) == before


@pytest.fixture
def calls(monkeypatch):
    calls = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: calls.append("start"))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: calls.append("stop"))
    return calls


def run(tracer: Tracer, calls: list, steps: range, signals: Signals, ask_before: int = 0) -> None:
    for step in steps:
        signals.trace |= step == ask_before
        tracer.before(step)
        calls.append(step)
        tracer.after(None)
    tracer.close()


def test_by_range(calls, tmp_path):
    signals = Signals()
    run(Tracer(PodsConfig(trace_from=2, trace_steps=2), tmp_path, signals), calls, range(1, 6), signals)
    assert calls == [1, "start", 2, 3, "stop", 4, 5]


def test_on_request_and_at_the_end(calls, tmp_path):
    signals = Signals()
    run(Tracer(PodsConfig(trace_steps=3), tmp_path, signals), calls, range(1, 5), signals, ask_before=3)
    assert calls == [1, 2, "start", 3, 4, "stop"]


def test_a_real_trace_is_written(tmp_path):
    signals = Signals()
    signals.trace = True
    tracer = Tracer(PodsConfig(trace_steps=1), tmp_path, signals)
    tracer.before(1)
    assert tracer.after(jax.numpy.ones(3) + 1) == f"trace: {tmp_path}"
    assert list(tmp_path.rglob("*.xplane.pb"))


@pytest.mark.parametrize("wrong", [{"start_seconds": 0}, {"hang_seconds": -1}, {"trace_steps": 0}, {"trace_from": -1}])
def test_limits_that_make_no_sense(wrong):
    with pytest.raises(UserError, match=f"pods.{next(iter(wrong))} must be at least"):
        PodsConfig(**wrong)
