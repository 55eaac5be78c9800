"""How fast are we on this CPU, beside PyTorch and transformers, in one go?

    python benchmarks/speed.py                       # both sides at the mid shape, then the table of ratios
    python benchmarks/speed.py --ours                # our side alone, as JSON lines
    python benchmarks/speed.py --shape small_expert  # our side at a shape that MaxText's figures are known for

Both sides run the operations that ``reference.py`` describes, at the same shape, one after the other, each on one
core (per CPU-second nobody gains from a second one); medians over the repeats. "f32" compares f32 throughout; "best"
compares each side's fastest setting with f32 weights and any dtype of the products.

``decode_64`` is ours alone, beside transformers' batch 8: continuous batching of 192 requests with answers of 32 to 96
tokens on 64 rows, what comes after the first step, prompts included.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

BATCH, LENGTH, PROMPT, NEW = 4, 512, 32, 64
OPERATIONS = ("forward", "forward_backward", "adamw_step", "muon_step", "decode_1", "decode_8", "decode_64")
THEIRS = {"decode_64": "decode_8"}  # what stands beside an operation that the other side has not


def clock() -> tuple[float, float]:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime, time.perf_counter()


def measure(what: str, setting: str, tokens: int, run: Callable[[], None], repeats: int) -> None:
    run()
    rates = []
    for _ in range(repeats):
        before = clock()
        run()
        rates.append([tokens / (b - a) for a, b in zip(before, clock(), strict=True)])
    cpu, wall = (statistics.median(column) for column in zip(*rates, strict=True))
    record = {"what": what, "setting": setting, "tokens_per_cpu_s": round(cpu, 1), "tokens_per_s": round(wall, 1)}
    print(json.dumps(record), flush=True)


def model_of(shape: str):
    from kimi_jax import presets
    from kimi_jax.config import ModelConfig

    if shape == "mid":
        return presets.mid_196m(), BATCH, LENGTH
    small_expert = ModelConfig(
        vocab_size=2048,
        hidden_size=256,
        intermediate_size=1024,
        moe_intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        n_routed_experts=16,
        num_experts_per_tok=4,
        q_lora_rank=96,
        kv_lora_rank=64,
        qk_nope_head_dim=32,
        qk_rope_head_dim=16,
        v_head_dim=32,
        rope=presets.YARN_K2,
        max_position_embeddings=131_072,
        routed_scaling_factor=presets.gate_scale(16, 4),
    )
    return small_expert, 8, 256


def ours(shape: str, only: set[str], dtypes: list[str], repeats: int) -> None:
    import jax
    import numpy as np

    from kimi_jax.data.packing import Batch
    from kimi_jax.host_memory import keep_freed_memory
    from kimi_jax.inference import offline
    from kimi_jax.inference.engine import Engine
    from kimi_jax.inference.request import Request
    from kimi_jax.model import KimiK2, in_compute_dtype
    from kimi_jax.training.config import OptimizerConfig, ScheduleConfig, TrainConfig
    from kimi_jax.training.step import batch_sums, init_state, train_step

    keep_freed_memory()  # as train and generate do

    def finish(function, *arguments):
        jax.block_until_ready(function(*arguments))

    base, batch_size, length = model_of(shape)
    rng = np.random.default_rng(0)
    ids = rng.integers(0, base.vocab_size, (batch_size, length + 1)).astype(np.int32)
    ones = np.ones((batch_size, length), np.int32)
    places = np.broadcast_to(np.arange(length, dtype=np.int32), ones.shape)
    batch = jax.device_put(Batch(ids[:, :-1], ids[:, 1:], ones, places, ones.astype(np.float32)))
    tokens = batch_size * length
    for dtype in dtypes:
        cfg = base.replace(dtype=dtype)
        config = TrainConfig(model=cfg, batch_size=batch_size, seq_len=length, schedule=ScheduleConfig(warmup_steps=0))
        params = jax.jit(partial(init_state, config))().params
        label = {"bfloat16": "bf16 products", "float32": "f32"}[dtype]
        if "forward" in only:
            forward = jax.jit(lambda p, t, cfg=cfg: KimiK2(cfg).apply({"params": p}, t))
            measure("forward", label, tokens, partial(finish, forward, params, batch.tokens), repeats)
        if "forward_backward" in only:
            sums = jax.jit(partial(batch_sums, config))
            measure("forward_backward", label, tokens, partial(finish, sums, params, batch), repeats)
        for what, name in (("adamw_step", "adamw"), ("muon_step", "muon_clip")):
            if what not in only:
                continue
            optimizer = OptimizerConfig(name=name, ns_dtype=dtype)
            run = TrainConfig(
                model=cfg,
                batch_size=batch_size,
                seq_len=length,
                optimizer=optimizer,
                schedule=ScheduleConfig(warmup_steps=0),
            )
            state = [jax.jit(partial(init_state, run))()]
            step = jax.jit(partial(train_step, run), donate_argnums=0)

            def train(state=state, step=step):
                state[0], metrics = step(state[0], batch)
                jax.block_until_ready((state[0], metrics))

            measure(what, label, tokens, train, repeats)
            del state
        for size in (1, 8, 64):
            if f"decode_{size}" not in only:
                continue
            weights = jax.jit(partial(in_compute_dtype, cfg))(params)
            answers = [NEW + 1] * size if size < 64 else rng.integers(NEW // 2, 3 * NEW // 2, 3 * size).tolist()

            def requests(answers=answers):  # other prompts each time: the pages of the last ones are still there
                prompts = rng.integers(0, base.vocab_size, (len(answers), PROMPT)).tolist()
                return [Request(tuple(p), max_tokens=n) for p, n in zip(prompts, answers, strict=True)]

            engine = Engine(weights, cfg, offline.limits_for(requests(), cfg, max_rows=size))

            def steps(engine=engine, requests=requests):
                """Tokens, CPU-seconds and seconds after the first step, which ends the first prompts."""
                for request in requests():
                    engine.submit(request)
                while not engine.step():
                    pass
                before, count = clock(), 0
                while engine.wait(0):
                    count += sum(len(event.tokens) for event in engine.step())
                return count, *(b - a for a, b in zip(before, clock(), strict=True))

            steps()
            rates = ((count / cpu, count / wall) for count, cpu, wall in (steps() for _ in range(repeats)))
            cpu, wall = (round(statistics.median(column), 1) for column in zip(*rates, strict=True))
            record = {"what": f"decode_{size}", "setting": label, "tokens_per_cpu_s": cpu, "tokens_per_s": wall}
            print(json.dumps(record), flush=True)


def lines_of(command: list[str]) -> list[dict]:
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(Path(__file__).parents[1])}
    process = subprocess.run(command, env=env, check=True, stdout=subprocess.PIPE, text=True)
    return [json.loads(line) for line in process.stdout.splitlines() if line.startswith("{")]


def compare(only: set[str], repeats: int) -> None:
    one_core = ["taskset", "-c", "0"]
    here = Path(__file__)

    def measured(script: Path, only: set[str], *mode: str) -> list[dict]:
        options = ["--only", ",".join(sorted(only)), "--repeats", str(repeats)]
        return lines_of([*one_core, sys.executable, str(script), *mode, *options])

    theirs = measured(here.with_name("reference.py"), {THEIRS.get(what, what) for what in only})
    mine = measured(here, only, "--ours")
    print(f"{'operation':18}{'f32: ours':>12}{'theirs':>9}{'ratio':>7}   {'best: ours':>12}{'theirs':>9}{'ratio':>7}")
    for what in OPERATIONS:
        row = f"{what:18}"
        for chosen in (lambda s: s.startswith("f32"), lambda s: not s.startswith("bf16 ") or s == "bf16 products"):
            rates = [
                max((r["tokens_per_cpu_s"] for r in side if r["what"] == name and chosen(r["setting"])), default=0.0)
                for side, name in ((mine, what), (theirs, THEIRS.get(what, what)))
            ]
            if all(rates):
                row += f"{rates[0]:12.1f}{rates[1]:9.1f}{rates[0] / rates[1]:7.2f}   "
        if what in only:
            print(row)
    print("(tokens per CPU-second)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ours", action="store_true")
    parser.add_argument("--shape", choices=("mid", "small_expert"), default="mid")
    parser.add_argument("--only", default=",".join(OPERATIONS))
    parser.add_argument("--dtypes", default="bfloat16,float32")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    only = set(args.only.split(","))
    if args.ours or args.shape != "mid":
        ours(args.shape, only, args.dtypes.split(","), args.repeats)
    else:
        compare(only, args.repeats)


if __name__ == "__main__":
    main()
