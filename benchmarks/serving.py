"""What the HTTP server costs beside the engine under it, and how long the first token takes at load.

    python benchmarks/serving.py                    # the mid shape
    python benchmarks/serving.py --shape tiny       # a model so small that the server is most of the work
    python benchmarks/serving.py --json FILE        # the figures, too

Three processes: the engine alone; the engine behind the server; the clients, which read bare sockets, so that they take
little from the others. Weights are random, but the head gives ASCII alone: each token is a text, and a streamed chunk.
``cpu`` is the time of the process that has the engine, all threads (``process_cpu_seconds_total`` of /metrics, and
``getrusage`` for the engine alone). Where all cores are the model's, it is what counts: the clients run elsewhere in
earnest; here they slow the wall clock, but not this one.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

ROWS = 80  # 64 streams that run, and room for those that come
MAX_LEN = 128  # a prompt has 32 tokens
BODY = {"model": "kimi_jax", "temperature": 0, "ignore_eos": True, "stream": True}


def messages(i: int) -> list[dict]:
    return [{"role": "system", "content": ""}, {"role": "user", "content": f"{i:05}"}]


def make_engine(shape: str):
    """The engine, over random weights of which only the ASCII characters can come out."""
    import jax

    from kimi_jax import presets
    from kimi_jax.dims import is_spec
    from kimi_jax.inference.engine import Engine
    from kimi_jax.inference.limits import Limits
    from kimi_jax.model import in_compute_dtype, specs

    cfg = {"mid": presets.mid_196m, "tiny": presets.tiny}[shape]()
    declared, tree = jax.tree.flatten(specs(cfg), is_leaf=is_spec)
    keys = jax.random.split(jax.random.key(0), len(declared))
    params = jax.tree.unflatten(tree, [spec.init(key) for spec, key in zip(declared, keys, strict=True)])
    ids_V = jax.numpy.arange(cfg.vocab_size)
    params["lm_head"] = params["lm_head"] * ((ids_V >= 32) & (ids_V < 127))
    params = jax.jit(partial(in_compute_dtype, cfg))(params)
    limits = Limits(1 + ROWS * MAX_LEN // 16, 16, MAX_LEN, cfg.vocab_size, max_rows=ROWS)
    return Engine(params, cfg, limits), cfg.vocab_size, limits.max_len


def alone(args: argparse.Namespace) -> None:
    """The engine without a server, on the same prompts."""
    from kimi_jax.data import tokenizer as tokenizers
    from kimi_jax.inference.request import Request
    from kimi_jax.server.dialogue import Dialogue, prompt_ids

    engine, _, _ = make_engine(args.shape)
    tokenizer = tokenizers.load("bytes")
    for turn in range(args.rounds):
        before, used, count = time.perf_counter(), cpu_seconds(), 0
        prompts = [prompt_ids(Dialogue(messages(turn * args.clients + i)), tokenizer) for i in range(args.clients)]
        for event in engine.generate([Request(tuple(ids), max_tokens=args.tokens) for ids in prompts]):
            count += len(event.tokens)
        record = {"tokens": count, "wall": time.perf_counter() - before, "cpu": cpu_seconds() - used}
        print(json.dumps(record), flush=True)


def cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def serve(args: argparse.Namespace) -> None:
    import logging

    from kimi_jax.data import tokenizer as tokenizers
    from kimi_jax.server import run
    from kimi_jax.server.app import create_app
    from kimi_jax.server.engine_thread import EngineThread
    from kimi_jax.server.service import Service

    logging.disable(logging.INFO)
    with EngineThread(*make_engine(args.shape)) as engine:
        run.serve(create_app(Service(engine, tokenizers.load("bytes"), ["kimi_jax"])), port=args.port)


async def one_stream(port: int, i: int, tokens: int) -> tuple[int, float]:
    """How many characters came, one a token, and the seconds to the first."""
    body = json.dumps({**BODY, "messages": messages(i), "max_tokens": tokens}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: {len(body)}\r\n\r\n"
    began, first, count = time.perf_counter(), 0.0, 0
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(head.encode() + body)
    while line := await reader.readline():
        if line.startswith(b"data: {") and b'"content":"' in line and b'"content":""' not in line:
            first = first or time.perf_counter() - began
            count += len(json.loads(line[6:])["choices"][0]["delta"]["content"])
    writer.close()
    assert count == tokens, f"stream {i}: {count} of {tokens} tokens"
    return count, first


async def full(port: int, args: argparse.Namespace) -> None:
    """Rounds of as many streams as rows run, all at once."""
    for turn in range(args.rounds):
        before, used = time.perf_counter(), await server_cpu(port)
        streams = [one_stream(port, turn * args.clients + i, args.tokens) for i in range(args.clients)]
        found = await asyncio.gather(*streams)
        record = {"tokens": sum(count for count, _ in found), "wall": time.perf_counter() - before}
        print(json.dumps({**record, "cpu": await server_cpu(port) - used}), flush=True)


async def at_load(port: int, args: argparse.Namespace) -> None:
    """Time to first token of requests that come at random (Poisson), while as many streams as ever run."""
    rng, number = random.Random(0), iter(range(50_000, 10**6))

    async def keep_running() -> None:
        while True:
            await one_stream(port, next(number), args.tokens)

    await asyncio.gather(*(one_stream(port, next(number), 2) for _ in range(2)))
    idle = [(await one_stream(port, next(number), 2))[1] for _ in range(10)]
    running = [asyncio.create_task(keep_running()) for _ in range(args.clients)]

    async def arrive(seconds: float) -> list[float]:
        arrivals, end = [], time.perf_counter() + seconds
        while time.perf_counter() < end:
            await asyncio.sleep(rng.expovariate(args.arrivals))
            arrivals.append(asyncio.create_task(one_stream(port, next(number), 8)))
        return [first for _, first in await asyncio.gather(*arrivals)]

    await arrive(args.seconds / 2)  # compiles
    times = await arrive(args.seconds)
    for task in running:
        task.cancel()
    await asyncio.gather(*running, return_exceptions=True)
    cuts = statistics.quantiles(times, n=20)
    record = {"arrivals": len(times), "ttft_p50": cuts[9], "ttft_p95": cuts[18]}
    print(json.dumps({**record, "ttft_idle_p50": statistics.median(idle)}), flush=True)


async def server_cpu(port: int) -> float:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"GET /metrics HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
    page = (await reader.read()).decode()
    writer.close()
    return float(next(line.split()[1] for line in page.splitlines() if line.startswith("process_cpu_seconds_total")))


async def wait_until_ready(port: int) -> None:
    for _ in range(400):
        try:
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            return writer.close()
        except OSError:
            await asyncio.sleep(0.1)
    raise SystemExit("the server did not come up")


def drive(args: argparse.Namespace) -> None:
    async def run() -> None:
        await wait_until_ready(args.port)
        await full(args.port, args)
        await at_load(args.port, args)

    asyncio.run(run())


def child(args: argparse.Namespace, role: str) -> subprocess.Popen:
    root = Path(__file__).parents[1]
    env = {"JAX_PLATFORMS": "cpu", **os.environ, "PYTHONPATH": str(root)}
    env |= {
        "JAX_COMPILATION_CACHE_DIR": str(root / ".cache" / "jax"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    given = [f"--{name}={getattr(args, name)}" for name in ("shape", "clients", "tokens", "rounds", "seconds", "port")]
    command = [sys.executable, __file__, "--role", role, f"--arrivals={args.arrivals}", *given]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True)


def records(process: subprocess.Popen) -> list[dict]:
    lines = process.communicate()[0].splitlines()
    if process.returncode:
        raise SystemExit(process.returncode)
    return [json.loads(line) for line in lines if line.startswith("{")]


def rates(rounds: list[dict]) -> tuple[float, float]:
    """Tokens per second and per CPU-second, each of the best round: requests come in groups of many
    sizes, each of them a program that is compiled when it is met first."""
    wall, cpu = (max(one["tokens"] / one[unit] for one in rounds) for unit in ("wall", "cpu"))
    return wall, cpu


def compare(args: argparse.Namespace) -> None:
    engine = rates(records(child(args, "alone")))
    server = child(args, "serve")
    try:
        *rounds, load = records(child(args, "drive"))
    finally:
        server.terminate()
        server.wait()
    served = rates(rounds)
    print(f"{args.shape}, {args.clients} streams of {args.tokens} tokens; the best of {args.rounds} rounds\n")
    print(f"{'tokens per':12}{'engine':>10}{'server':>10}{'overhead':>10}")
    for i, unit in enumerate(("second", "CPU-second")):
        print(f"{unit:12}{engine[i]:10.0f}{served[i]:10.0f}{engine[i] / served[i] - 1:10.1%}")
    each = 1e6 / served[1] - 1e6 / engine[1]
    print(f"\na streamed token takes the server {each:.0f} us of CPU time, the engine {1e6 / engine[1]:.0f}")
    print(
        f"time to first token: {load['ttft_idle_p50'] * 1e3:.0f} ms idle; with {args.clients} streams running, "
        f"p50 {load['ttft_p50'] * 1e3:.0f} ms, p95 {load['ttft_p95'] * 1e3:.0f} ms ({load['arrivals']} arrivals)"
    )
    if args.json:
        found = {"engine": engine, "server": served, "us_per_token": each, **load, "arguments": vars(args)}
        Path(args.json).write_text(json.dumps(found, indent=1, default=str) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=("mid", "tiny"), default="mid")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=64, help="of each answer")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--seconds", type=float, default=60, help="of arrivals at load")
    parser.add_argument("--arrivals", type=float, default=1.0, help="a second")
    parser.add_argument("--json", help="also write the figures to this file")
    parser.add_argument("--port", type=int, default=8731)
    parser.add_argument(
        "--role", choices=("compare", "alone", "serve", "drive"), default="compare", help=argparse.SUPPRESS
    )
    args = parser.parse_args()
    {"compare": compare, "alone": alone, "serve": serve, "drive": drive}[args.role](args)


if __name__ == "__main__":
    main()
