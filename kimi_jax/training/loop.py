"""The training run: set up or resume, step, report, evaluate, save, and finish with curves and a sample.

What is on disk is the state after some step, and a batch is a function of (seed, step); so a run that was stopped at
any moment and started again gives the losses it would have given, bit for bit. On several processes each loads the
rows that its devices hold, process 0 reports, and all stop after the same step.
"""

from __future__ import annotations

import dataclasses
import math
import os
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental.multihost_utils import broadcast_one_to_all

from kimi_jax.checkpoint.emergency_exchange import forget as forget_copies
from kimi_jax.checkpoint.manager import Checkpoints, read_meta
from kimi_jax.data import tokenizer as tokenizers
from kimi_jax.data.ngram import First, order2_bits_per_byte
from kimi_jax.data.packing import Batch
from kimi_jax.data.pipeline import EvalData, TrainData, split_bytes
from kimi_jax.dims import Array, Params
from kimi_jax.errors import UserError, os_errors_as
from kimi_jax.flops import peak_flops, training_flops_per_token
from kimi_jax.host_memory import keep_freed_memory
from kimi_jax.inference import offline
from kimi_jax.inference.engine import Engine
from kimi_jax.inference.request import Request, Sampling
from kimi_jax.loading import load_params
from kimi_jax.model import in_compute_dtype
from kimi_jax.pods.rows import Rows
from kimi_jax.pods.session import Session
from kimi_jax.pods.signals import Signals
from kimi_jax.pods.total import Total
from kimi_jax.pods.trace import Tracer
from kimi_jax.training import metrics
from kimi_jax.training.changes import changes
from kimi_jax.training.config import TrainConfig
from kimi_jax.training.emergency import EmergencyCopies
from kimi_jax.training.placement import lowered_step, placement, shapes
from kimi_jax.training.step import Metrics, TrainState, eval_step, init_state
from kimi_jax.training.turns import process_0_first

BASELINE_BYTES = 2**30  # of each text, at most, that the model it is compared with has seen


class Unreported(NamedTuple):
    """A step under way: its number, and what is known of it when it has ended."""

    step: int
    found: Metrics
    counted: np.ndarray | Array  # weight and bytes of its batch, and how many processes were asked to stop


class Run:
    """One training run in ``workdir``, resumed if it was begun before."""

    def __init__(self, cfg: TrainConfig, workdir: Path, session: Session | None = None):
        self.cfg, self.workdir, self._session = cfg, workdir, session or Session("kimi_jax", cfg.pods)
        self._reports = jax.process_index() == 0
        self.tokenizer = tokenizers.load(cfg.data.tokenizer)
        _check_fit(cfg, self.tokenizer.vocab_size)
        self._place = placement(cfg, jax.devices())
        sizes = dict(batch_size=cfg.batch_size, seq_len=cfg.seq_len)
        self._rows = Rows(self._place.rows, (cfg.batch_size, cfg.seq_len))
        self._total = Total(self._place.mesh)
        with process_0_first(workdir, self._session) if cfg.data.cache else nullcontext():
            self._train_data = TrainData(cfg.data, self.tokenizer, seed=cfg.seed, **sizes)
            self._eval_data = EvalData(cfg.data, self.tokenizer, max_batches=cfg.eval_batches, **sizes)
        self._copies = self._open_copies()
        _make_writable(workdir)
        self._checkpoints = Checkpoints(workdir / "checkpoints", keep=cfg.checkpoints_kept)
        self.step = int(broadcast_one_to_all(self._checkpoints.latest() or 0))  # a folder may look older elsewhere
        self._agreed_to_stop = False
        self._signals = Signals()

    def train(self) -> None:
        """Trains up to ``cfg.steps``. SIGTERM to any process ends it on all after the same step, with the state saved.

        A single process stops after the step under way; several, which have to agree, one or two steps later.
        """
        with self._signals:
            self._train()
        if self.step == self.cfg.steps:
            self._finish()
        elif self.step:
            self._say(f"SIGTERM: saved after step {self.step}; the same command resumes there")
        else:
            self._say("SIGTERM: there was nothing to save before the first step; the same command begins anew")

    def _train(self) -> None:
        cfg, session, signals = self.cfg, self._session, self._signals
        saved = self.step  # as a checkpoint: a local copy may be newer
        step_fn = self._begin()
        session.meet("the first step")
        self._eval_fn = jax.jit(partial(eval_step, cfg, ops=self._place.ops))
        batches = self._train_data.iter_rows(self.step, self._rows.loaded)
        tracer = Tracer(cfg.pods, self.workdir / "traces", signals)
        self._peak = peak_flops() if self._reports else math.inf
        self._writer = self._open_writer() if self._reports else None
        self._clock = metrics.Clock()
        unreported: Unreported | None = None
        try:
            while self.step < cfg.steps and not self._must_stop:
                session.step(self.step + 1)
                tracer.before(self.step + 1)
                batch = next(batches)
                self.state, found = step_fn(self.state, self._to_devices(batch))
                self.step += 1
                if unreported:  # while this step runs, report the one before
                    self._report(unreported)
                unreported = Unreported(self.step, found, self._total(*self._count(batch), signals.stop))
                copying = self._copies is not None and self.step % cfg.emergency.every == 0
                if self._due(cfg.eval_every) or self._due(cfg.checkpoint_every) or copying or self._must_stop:
                    self._report(unreported)
                    unreported = None
                if self._due(cfg.eval_every):
                    self.evaluate()
                if self._due(cfg.checkpoint_every):
                    self._save()
                    saved = self.step
                elif self._copies and copying and not self._must_stop:
                    self._copies.save(self.step, self.state)
                if said := tracer.after(found):
                    self._say(said)
            if unreported:
                self._report(unreported)
            session.rest()
            if saved != self.step:
                self._save()
            self._checkpoints.wait()
            if self._copies:
                self._copies.clear()
        finally:
            with ExitStack() as at_last:  # each, whatever the others raise
                at_last.callback(self._checkpoints.close)
                if self._writer:
                    at_last.callback(self._writer.close)
                if self._copies:
                    at_last.callback(self._copies.close)
                tracer.close()

    def evaluate(self) -> dict[str, Any]:
        """Bits per byte and loss per token on the held-out split."""
        nats = 0.0
        count = np.zeros(2)
        for i in range(len(self._eval_data)):
            batch = self._eval_data.rows(i, self._rows.loaded)
            nats += float(self._eval_fn(self.state.params, self._to_devices(batch)))
            count += self._count(batch)
        weight, n_bytes = np.asarray(self._total(*count)).tolist()
        bits_per_byte = nats / math.log(2) / max(n_bytes, 1)  # text of empty documents has no bytes
        record = {"step": self.step, "loss": nats / weight, "bits_per_byte": bits_per_byte}
        if self._writer:
            self._writer.eval(record)
        self._clock.lap()
        return record

    @property
    def _must_stop(self) -> bool:
        """The same on all processes at the same step, if each asks once a step."""
        return self._signals.stop if jax.process_count() == 1 else self._agreed_to_stop

    def _due(self, every: int) -> bool:
        return self.step % every == 0 or self.step == self.cfg.steps

    def _begin(self) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
        """Restores the state, or draws it while the step is compiled; returns the compiled step."""
        if self.step:
            meta = read_meta(self.workdir / "checkpoints" / str(self.step))
            if changed := changes(meta, self.cfg, self.tokenizer.identity):
                self._say(f"going on with another config than before: {'; '.join(changed)}")
        resumed = self._resumed_from_copies()
        self._session.at("the compilation")
        if resumed:
            return lowered_step(self.cfg, self._place).compile()
        if self.step:
            state, _ = shapes(self.cfg, self._place)
            self.state, _ = self._checkpoints.restore(self.step, state)
            self._say(f"resuming {self.workdir} after step {self.step}")
            return lowered_step(self.cfg, self._place).compile()
        init = jax.jit(partial(init_state, self.cfg), out_shardings=self._place.state)
        weights = self._given_weights()
        with ThreadPoolExecutor(1) as beside:
            new = beside.submit(init, weights)
            step_fn = lowered_step(self.cfg, self._place).compile()
        self.state = new.result()
        return step_fn

    def _open_copies(self) -> EmergencyCopies | None:
        folder = self.cfg.emergency.folder
        return EmergencyCopies(Path(folder), self.workdir, self._session, self._total) if folder else None

    def _resumed_from_copies(self) -> bool:
        """Takes the state from the local copies, if they are newer than the last checkpoint and whole."""
        if self._copies is None:
            if self._reports:
                forget_copies(self.workdir)
            return False
        like, _ = shapes(self.cfg, self._place)
        found, why = self._copies.resume(self.step, self.cfg.steps, like)
        if found:
            self.step, self.state = found
            where = f"the local copies in {self.cfg.emergency.folder}"
            self._say(f"resuming {self.workdir} after step {self.step} from {where}")
        elif why:
            self._say(why)
        return found is not None

    def _given_weights(self) -> Params | None:
        path, model = self.cfg.init_from, self.cfg.model
        if path is None:
            return None
        self._say(f"starting from the weights of {path}")
        return load_params(path, model, self._place.state.params)

    def _save(self) -> None:
        if self._writer:
            self._writer.flush()
        data = {"next_step": self.step, "tokenizer": self.tokenizer.identity}
        self._checkpoints.save(self.step, self.state, {"config": dataclasses.asdict(self.cfg), "data": data})

    def _open_writer(self) -> metrics.Writer:
        metrics.keep_until(self.workdir / metrics.FILE, self.step)
        # Curves say that a run has ended: see launch/until_finished.sh.
        (self.workdir / metrics.CURVES).unlink(missing_ok=True)
        return metrics.Writer(self.workdir, self.cfg.steps, self.step, self.cfg.log_every)

    def _say(self, line: str) -> None:
        if self._reports:
            print(line, flush=True)

    def _report(self, ended: Unreported) -> None:
        """Waits for the end of a step, and writes what it found."""
        cfg, step, found = self.cfg, ended.step, Metrics(*jax.device_get(ended.found))
        weight, n_bytes, stopping = np.asarray(ended.counted).tolist()
        self._agreed_to_stop |= bool(stopping)
        if not found.finite:
            self._not_finite(step, found)
        if not self._writer:
            return
        seconds = self._clock.lap()
        tokens = cfg.tokens_per_step
        flops = training_flops_per_token(cfg.model, cfg.seq_len) * tokens / seconds
        tau = cfg.optimizer.tau or math.inf
        nats = float(found.loss) * weight
        self._writer.train(
            {
                "step": step,
                "tokens": step * tokens,
                "loss": float(found.loss),
                "bits_per_byte": nats / math.log(2) / max(n_bytes, 1),
                "balance_loss": float(found.balance_loss),
                "learning_rate": float(found.learning_rate),
                "grad_norm": float(found.grad_norm),
                "update_rms": float(found.update_rms),
                "max_logit": float(found.max_logits_LN.max()),
                "max_logit_per_layer": found.max_logits_LN.max(axis=1).tolist(),
                "heads_clipped": float((found.max_logits_LN > tau).mean()),
                "heads_ever_clipped": float(found.heads_ever_clipped),
                "load_imbalance": metrics.load_imbalance(np.asarray(found.load_LE)),
                "skipped_steps": int(found.skipped),
                "tokens_per_second": tokens / seconds,
                "flops_per_second": flops,
                "mfu": flops / self._peak,
            }
        )

    def _not_finite(self, step: int, found: Metrics) -> None:
        what = f"loss {float(found.loss)} and gradient norm {float(found.grad_norm)} at step {step}"
        if self.cfg.nonfinite == "skip":
            if self._writer:
                self._writer.say(f"{what}: step skipped")
            return
        good = self._checkpoints.latest()
        last = f"the last good checkpoint is step {good}" if good is not None else "no checkpoint was saved before it"
        raise UserError(
            f"{what} (batch {step - 1} of seed {self.cfg.seed}); {last} in {self.workdir / 'checkpoints'}; "
            "lower the learning rate, or set nonfinite=skip"
        )

    def _finish(self) -> None:
        if not self._reports:
            return
        print(f"curves: {metrics.plot(self.workdir, self.cfg.optimizer.tau)}")
        held_out = metrics.read(self.workdir / metrics.FILE, "eval")[-1]["bits_per_byte"]
        train, held = (First(split_bytes(self.cfg.data, which), BASELINE_BYTES) for which in ("train", "eval"))
        baseline = order2_bits_per_byte(train, held)
        text = f"the first {BASELINE_BYTES >> 20} MiB" if train.cut or held.cut else "the same text"
        print(f"held-out bits per byte: {held_out:.4f}; an order-2 byte model of {text}: {baseline:.4f}")
        if (
            self.cfg.sample_tokens > 0 and jax.process_count() == 1
        ):  # generates on one device, with all the weights there
            print(f"sample:\n{self._sample()}", flush=True)
        else:
            print(f"for a sample: python -m kimi_jax.generate --checkpoint {self.workdir} --prompt '...'", flush=True)

    def _sample(self) -> str:
        cfg = self.cfg
        params = jax.device_put(self.state.params, jax.devices()[0])
        params = jax.jit(partial(in_compute_dtype, cfg.model))(params)
        most = cfg.model.max_position_embeddings
        prompt = (self.tokenizer.encode(cfg.sample_prompt) or [self.tokenizer.bos])[: most - 1]
        sampling = Sampling(temperature=0.7, seed=cfg.seed)
        request = Request(tuple(prompt), sampling, min(cfg.sample_tokens, most - len(prompt)))
        engine = Engine(params, cfg.model, offline.limits_for([request], cfg.model))
        ids = [token for event in engine.generate([request]) for token in event.tokens]
        return self.tokenizer.decode(prompt + [i for i in ids if i < self.tokenizer.vocab_size])

    def _to_devices(self, local: Batch) -> Batch:
        return jax.tree.map(self._rows.place, local)

    def _count(self, local: Batch) -> tuple[float, float]:
        """Weight and bytes of text of the weighted targets, of the rows that count here."""
        weights, targets = local.weights[self._rows.owned], local.targets[self._rows.owned]
        return float(weights.sum()), float(self.tokenizer.token_bytes_V[targets[weights > 0]].sum())


def _check_fit(cfg: TrainConfig, vocab_size: int) -> None:
    if vocab_size > cfg.model.vocab_size:
        raise UserError(
            f"the tokenizer {cfg.data.tokenizer!r} has {vocab_size} ids but model.vocab_size is only "
            f"{cfg.model.vocab_size}: set model.vocab_size={vocab_size} or more"
        )


def _make_writable(workdir: Path) -> None:
    with os_errors_as(f"cannot write to the workdir {workdir}"):
        workdir.mkdir(parents=True, exist_ok=True)
        probe = workdir / f".writable-{jax.process_index()}"
        probe.touch()
        probe.unlink()


def train(cfg: TrainConfig, workdir: Path, session: Session | None = None) -> None:
    """Trains ``cfg`` in ``workdir``, or says that there is nothing left to do.

    Compiled programs are kept, so that the next start of the same run is quick: in the user's cache folder, and of
    several processes, of which process 0 alone keeps them, in the workdir.
    """
    if jax.config.jax_compilation_cache_dir is None:
        caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        folder = workdir / "compiled" if jax.process_count() > 1 else caches / "kimi_jax"
        jax.config.update("jax_compilation_cache_dir", str(folder))
    if jax.default_backend() == "cpu":
        keep_freed_memory()
    run = Run(cfg, workdir, session)
    if run.step >= cfg.steps:
        if jax.process_index() == 0:
            print(f"{workdir} is already at step {run.step} of {cfg.steps}; raise steps to train on", file=sys.stderr)
            if not (workdir / metrics.CURVES).exists():  # the run was killed while it finished
                metrics.plot(workdir, cfg.optimizer.tau)
        return
    run.train()
