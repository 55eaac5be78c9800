"""The training run: set up or resume, step, report, evaluate, save, and finish with curves and a sample.

What is on disk is the state after some step, and a batch is a function of (seed, step); so a run that was stopped at
any moment and started again gives the losses it would have given, bit for bit.
"""

from __future__ import annotations

import dataclasses
import math
import os
import signal
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from kimi_jax.checkpoint.manager import Checkpoints
from kimi_jax.data import tokenizer as tokenizers
from kimi_jax.data.ngram import order2_bits_per_byte
from kimi_jax.data.packing import Batch
from kimi_jax.data.pipeline import EvalData, TrainData, split_bytes
from kimi_jax.dims import Params
from kimi_jax.errors import UserError
from kimi_jax.flops import peak_flops, training_flops_per_token
from kimi_jax.host_memory import keep_freed_memory
from kimi_jax.inference.decode import generate
from kimi_jax.loading import load_params
from kimi_jax.model import in_compute_dtype
from kimi_jax.training import metrics
from kimi_jax.training.config import TrainConfig
from kimi_jax.training.placement import lowered_step, placement, shapes
from kimi_jax.training.step import Metrics, TrainState, eval_step, init_state


class Run:
    """One training run in ``workdir``, resumed if it was begun before."""

    def __init__(self, cfg: TrainConfig, workdir: Path):
        self.cfg, self.workdir = cfg, workdir
        self.tokenizer = tokenizers.load(cfg.data.tokenizer)
        _check_fit(cfg, self.tokenizer.vocab_size)
        self._place = placement(cfg, jax.devices())
        sizes = dict(batch_size=cfg.batch_size, seq_len=cfg.seq_len)
        self._train_data = TrainData(cfg.data, self.tokenizer, seed=cfg.seed, **sizes)
        self._eval_data = EvalData(cfg.data, self.tokenizer, max_batches=cfg.eval_batches, **sizes)
        _make_writable(workdir)
        self._checkpoints = Checkpoints(workdir / "checkpoints", keep=cfg.checkpoints_kept)
        self.step = self._checkpoints.latest() or 0
        self._terminated = False
        self._skipped = 0

    def train(self) -> None:
        """Trains up to ``cfg.steps``. SIGTERM ends it after the step under way, with the state saved."""
        cfg = self.cfg
        step_fn = self._begin()
        metrics.keep_until(self.workdir / metrics.FILE, self.step)
        self._writer = metrics.Writer(self.workdir, cfg.steps, self.step, cfg.log_every)
        self._clock = metrics.Clock()
        self._peak: float | None = None
        self._eval_fn = jax.jit(partial(eval_step, cfg, ops=self._place.ops))
        batches = self._train_data.iter(self.step, jax.process_index(), jax.process_count())
        before = signal.signal(signal.SIGTERM, self._on_sigterm)
        unreported: tuple[int, Batch, Metrics] | None = None
        saved = self.step
        try:
            while self.step < cfg.steps and not self._terminated:
                batch = next(batches)
                self.state, found = step_fn(self.state, self._to_devices(batch))
                self.step += 1
                if unreported:  # while this step runs, report the one before
                    self._report(*unreported)
                unreported = (self.step, batch, found)
                if self._due(cfg.eval_every) or self._due(cfg.checkpoint_every) or self._terminated:
                    self._report(*unreported)
                    unreported = None
                if self._due(cfg.eval_every):
                    self.evaluate()
                if self._due(cfg.checkpoint_every):
                    self._save()
                    saved = self.step
            if unreported:
                self._report(*unreported)
            if saved != self.step:
                self._save()
            self._checkpoints.wait()
        finally:
            signal.signal(signal.SIGTERM, before)
            self._writer.close()
            self._checkpoints.close()
        if self._terminated:
            print(f"SIGTERM: saved after step {self.step}; the same command resumes there", flush=True)
        else:
            self._finish()

    def evaluate(self) -> dict[str, Any]:
        """Bits per byte and loss per token on the held-out split."""
        nats = weight = n_bytes = 0.0
        for batch in self._eval_data.iter(jax.process_index(), jax.process_count()):
            nats += float(self._eval_fn(self.state.params, self._to_devices(batch)))
            weight += float(batch.weights.sum())
            n_bytes += self._bytes(batch)
        record = {"step": self.step, "loss": nats / weight, "bits_per_byte": nats / math.log(2) / n_bytes}
        self._writer.eval(record)
        self._clock.lap()
        return record

    def _due(self, every: int) -> bool:
        return self.step % every == 0 or self.step == self.cfg.steps

    def _begin(self) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
        """Restores the state, or draws it while the step is compiled; returns the compiled step."""
        if self.step:
            state, _ = shapes(self.cfg, self._place)
            self.state, _ = self._checkpoints.restore(self.step, state)
            print(f"resuming {self.workdir} after step {self.step}", flush=True)
            return lowered_step(self.cfg, self._place).compile()
        init = jax.jit(partial(init_state, self.cfg), out_shardings=self._place.state)
        weights = self._given_weights()
        with ThreadPoolExecutor(1) as beside:
            new = beside.submit(init, weights)
            step_fn = lowered_step(self.cfg, self._place).compile()
        self.state = new.result()
        return step_fn

    def _given_weights(self) -> Params | None:
        path, model = self.cfg.init_from, self.cfg.model
        if path is None:
            return None
        print(f"starting from the weights of {path}", flush=True)
        return load_params(path, model, self._place.state.params)

    def _save(self) -> None:
        config = dataclasses.asdict(self.cfg)
        self._checkpoints.save(self.step, self.state, {"config": config, "data": {"next_step": self.step}})

    def _report(self, step: int, batch: Batch, found: Metrics) -> None:
        cfg, found = self.cfg, Metrics(*jax.device_get(found))
        if not found.finite:
            self._not_finite(step, found)
        if self._peak is None:
            self._peak = peak_flops()
        seconds = self._clock.lap()
        tokens = cfg.tokens_per_step
        flops = training_flops_per_token(cfg.model, cfg.seq_len) * tokens / seconds
        tau = cfg.optimizer.tau or math.inf
        nats = float(found.loss) * float(batch.weights.sum())
        self._writer.train(
            {
                "step": step,
                "tokens": step * tokens,
                "loss": float(found.loss),
                "bits_per_byte": nats / math.log(2) / max(self._bytes(batch), 1),
                "balance_loss": float(found.balance_loss),
                "learning_rate": float(found.learning_rate),
                "grad_norm": float(found.grad_norm),
                "update_rms": float(found.update_rms),
                "max_logit": float(found.max_logits_LN.max()),
                "max_logit_per_layer": found.max_logits_LN.max(axis=1).tolist(),
                "heads_clipped": float((found.max_logits_LN > tau).mean()),
                "heads_ever_clipped": float(found.heads_ever_clipped),
                "load_imbalance": metrics.load_imbalance(np.asarray(found.load_LE)),
                "skipped_steps": self._skipped,
                "tokens_per_second": tokens / seconds,
                "flops_per_second": flops,
                "mfu": flops / self._peak,
            }
        )

    def _not_finite(self, step: int, found: Metrics) -> None:
        self._skipped += 1
        what = f"loss {float(found.loss)} and gradient norm {float(found.grad_norm)} at step {step}"
        if self.cfg.nonfinite == "skip":
            self._writer.say(f"{what}: step skipped")
            return
        good = self._checkpoints.latest()
        last = f"the last good checkpoint is step {good}" if good is not None else "no checkpoint was saved before it"
        raise UserError(
            f"{what} (batch {step - 1} of seed {self.cfg.seed}); {last} in {self.workdir / 'checkpoints'}; "
            "lower the learning rate, or set nonfinite=skip"
        )

    def _finish(self) -> None:
        print(f"curves: {metrics.plot(self.workdir, self.cfg.optimizer.tau)}")
        held_out = metrics.read(self.workdir / metrics.FILE, "eval")[-1]["bits_per_byte"]
        train, held = (split_bytes(self.cfg.data, which) for which in ("train", "eval"))
        baseline = order2_bits_per_byte(train, held)
        print(f"held-out bits per byte: {held_out:.4f}; an order-2 byte model of the same text: {baseline:.4f}")
        if jax.process_count() == 1:  # generates on one device, with all the weights there
            print(f"sample:\n{self._sample()}", flush=True)

    def _sample(self) -> str:
        cfg = self.cfg
        params = jax.device_put(self.state.params, jax.devices()[0])
        params = jax.jit(partial(in_compute_dtype, cfg.model))(params)
        prompt = self.tokenizer.encode(cfg.sample_prompt) or [self.tokenizer.bos]
        tokens = generate(params, cfg.model, [prompt], new_tokens=cfg.sample_tokens, temperature=0.7, seed=cfg.seed)
        ids = [int(token_B[0]) for token_B in tokens]
        return self.tokenizer.decode(prompt + [i for i in ids if i < self.tokenizer.vocab_size])

    def _to_devices(self, batch: Batch) -> Batch:
        return jax.tree.map(partial(jax.make_array_from_process_local_data, self._place.rows), batch)

    def _bytes(self, batch: Batch) -> float:
        """Bytes of text that the weighted targets stand for."""
        return float(self.tokenizer.token_bytes_V[batch.targets[batch.weights > 0]].sum())

    def _on_sigterm(self, *_) -> None:
        self._terminated = True


def _check_fit(cfg: TrainConfig, vocab_size: int) -> None:
    if vocab_size > cfg.model.vocab_size:
        raise UserError(
            f"the tokenizer {cfg.data.tokenizer!r} has {vocab_size} ids but model.vocab_size is only "
            f"{cfg.model.vocab_size}: set model.vocab_size={vocab_size} or more"
        )


def _make_writable(workdir: Path) -> None:
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        probe = workdir / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"cannot write to the workdir {workdir}: {error.strerror}") from error


def train(cfg: TrainConfig, workdir: Path) -> None:
    """Trains ``cfg`` in ``workdir``, or says that there is nothing left to do.

    Compiled programs are kept in the user's cache folder, so that the next start of the same run is quick.
    """
    if jax.config.jax_compilation_cache_dir is None:
        caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        jax.config.update("jax_compilation_cache_dir", str(caches / "kimi_jax"))
    if jax.default_backend() == "cpu":
        keep_freed_memory()
    run = Run(cfg, workdir)
    if run.step >= cfg.steps:
        print(f"{workdir} is already at step {run.step} of {cfg.steps}; raise steps to train on", file=sys.stderr)
        return
    run.train()
