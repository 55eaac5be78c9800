"""An engine that runs on one process or several: process 0 plans, and all run the same steps."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from kimi_jax.inference.engine import Engine, Runner
from kimi_jax.inference.limits import Limits
from kimi_jax.inference.start import Served
from kimi_jax.pods import session
from kimi_jax.pods.broadcast import Sender, received
from kimi_jax.pods.cluster import Told
from kimi_jax.pods.config import PodsConfig
from kimi_jax.pods.session import Session

ALIKE = ("checkpoint", "tokenizer", "dtype", "weights", "cache_dtype")  # flags that all processes have to be given


def joined(prog: str, args: Any) -> AbstractContextManager[Session]:
    """``session.joined`` for the command line of one that serves."""
    told = Told(args.coordinator, args.process, args.processes)
    return session.joined(prog, told, PodsConfig(), {name: getattr(args, name) for name in ALIKE})


@contextmanager
def leading(
    session: Session, model: Served, limits: Limits, cache_dtype: str | None = None, **how: Any
) -> Iterator[Engine]:
    """The engine, on process 0; ``how`` as ``Engine`` takes it. The other processes ``follow`` until it ends."""
    sender = Sender(session)
    sender.send((limits, cache_dtype))
    session.at("the steps")
    yield Engine(
        model.params, model.cfg, limits, cache_dtype=cache_dtype, mesh=model.mesh, tell=sender.send, **how
    )  # fmt: skip
    sender.close()


def follow(session: Session, model: Served) -> None:
    """On the other processes. A SIGTERM is left to process 0, whose requests this one still helps to answer."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    session.at("the steps of process 0")
    plans = received(session)
    limits, cache_dtype = next(plans)
    runner = Runner(model.params, model.cfg, limits, cache_dtype, model.mesh)
    for plan in plans:
        if plan is None:
            runner.reset()
        else:
            runner.start(plan)
