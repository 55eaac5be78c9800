"""Everything that clients do to a server, for minutes on end: python -m tests.server.soak --minutes 10

Valid, invalid, slow, aborted and oversized requests at once, and schemathesis on the OpenAPI description, against
``python -m kimi_jax.serve`` with a tiny random checkpoint. It fails if the server crashes or answers 5xx, if a valid
request stays without its whole answer, if pages or requests are left over, or if memory grows: the median of the
resident set in the last quarter may exceed that of the quarter before by 5 % at most. (The first minutes compile.)
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import httpx

from kimi_jax import presets
from tests.checkpoint.examples import random_tensors, save_hf
from tests.multiprocess.processes import free_port, wait_until_ready
from tests.server.test_fuzz import requests

ROOT = Path(__file__).parents[2]
LIMIT = 1.05
ASK = [{"role": "user", "content": "Weather in Oslo?"}]
SCHEMA = {"type": "object", "properties": {"n": {"type": "integer", "maximum": 9}}, "required": ["n"]}
TOOL = {"type": "function", "function": {"name": "f", "parameters": SCHEMA}}


class Soak:
    def __init__(self, port: int, seconds: float):
        self.port, self.url = port, f"http://127.0.0.1:{port}"
        self.end = time.monotonic() + seconds
        self.rng = random.Random(0)
        self.counts: collections.Counter[str] = collections.Counter()
        self.memory: list[float] = []  # MB, over time
        self.client = httpx.AsyncClient(base_url=self.url, timeout=300, limits=httpx.Limits(max_connections=64))

    async def run(self) -> None:
        kinds = (
            [self.valid] * 4 + [self.invalid] * 2 + [self.slow, self.slow, self.aborted, self.aborted, self.oversized]
        )
        await asyncio.gather(self.watch(), *(self.repeat(kind) for kind in kinds))
        await self.client.aclose()

    async def repeat(self, kind) -> None:
        while time.monotonic() < self.end:
            await kind()
            self.counts[kind.__name__] += 1
            await asyncio.sleep(0.05 * self.rng.random())

    def ask(self) -> tuple[str, dict]:
        """A valid request and its path."""
        some = {"max_tokens": self.rng.randint(1, 40), "stream": self.rng.random() < 0.5}
        forced = {"tools": [TOOL], "tool_choice": "required"}
        form = {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}}
        chat, plain = "/v1/chat/completions", {"seed": self.rng.randint(0, 9), "n": self.rng.choice([1, 1, 3])}
        return self.rng.choice(
            [
                (chat, {"messages": ASK, **plain, **some}),
                (chat, {"messages": ASK, **forced, **some}),
                (chat, {"messages": ASK, **form, **some, "logprobs": True, "top_logprobs": 2}),
                ("/v1/completions", {"prompt": ["ab", "c" * self.rng.randint(1, 99)], **plain, **some}),
                ("/v1/messages", {"messages": ASK, **some, "stop_sequences": ["e"]}),
                ("/v1/responses", {"input": "hello", "max_output_tokens": 9, "stream": some["stream"]}),
            ]
        )

    def check(self, path: str, body: dict, status: int, text: str) -> None:
        assert status == 200, (path, body, status, text[:300])
        if not body["stream"]:
            assert "error" not in (found := json.loads(text)) or found["error"] is None, (path, body, text[:300])
            return
        ends = {"/v1/messages": "message_stop", "/v1/responses": '"usage":{'}.get(path, "data: [DONE]")
        assert ends in text and '"error":{' not in text, (path, body, text[-500:])

    async def valid(self) -> None:
        path, body = self.ask()
        response = await self.client.post(path, json=body)
        self.check(path, body, response.status_code, response.text)

    async def invalid(self) -> None:
        ((path, body),) = requests(self.rng, 1)
        response = await self.client.post(path, json=body)
        assert response.status_code in (200, 400, 404), (path, body, response.text[:300])

    async def slow(self) -> None:
        """Sends in pieces, then reads in pieces."""
        path, body = self.ask()
        reader, writer = await self.open(path, body, pieces=self.rng.choice([1, 8]))
        received = b""
        while piece := await reader.read(self.rng.choice([256, 2048])):
            received += piece
            await asyncio.sleep(0.02)
        writer.close()
        head, _, rest = received.partition(b"\r\n\r\n")
        if b"transfer-encoding: chunked" in head.lower():
            rest = b"".join(line for line in rest.split(b"\r\n")[1::2])
        self.check(path, body, int(head.split()[1]), rest.decode())

    async def aborted(self) -> None:
        """Goes away in the middle of its request, or of the answer."""
        path, body = self.ask()
        body |= {"max_tokens": 300, "max_output_tokens": 300}
        _, writer = await self.open(path, body, part=self.rng.choice([0.5, 1, 1, 1]))
        await asyncio.sleep(self.rng.random())
        writer.transport.abort() if self.rng.random() < 0.5 else writer.close()

    async def oversized(self) -> None:
        await asyncio.sleep(1)
        too_long = await self.client.post("/v1/completions", json={"prompt": "x" * 5000})
        assert too_long.status_code == 400 and "context length" in too_long.text
        head = "POST /v1/messages HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: 99999999999\r\n\r\n"
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        writer.write(head.encode() + b"{")
        assert b" 413 " in await reader.readline()
        writer.close()
        if self.rng.random() < 0.1:

            async def chunks():
                for _ in range(34):
                    yield b" " * (1 << 20)

            try:
                assert (await self.client.post("/v1/messages", content=chunks())).status_code == 413
            except httpx.TransportError:  # the server closed before all was sent
                pass

    async def open(self, path: str, body: dict, pieces: int = 1, part: float = 1.0):
        content = json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: {len(content)}\r\n\r\n"
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        whole = head.encode() + content
        whole = whole[: int(part * len(whole))]
        size = -(-len(whole) // pieces)
        for i in range(0, len(whole), size):
            writer.write(whole[i : i + size])
            await writer.drain()
            await asyncio.sleep(0.2 if pieces > 1 else 0)
        return reader, writer

    async def watch(self) -> None:
        while time.monotonic() < self.end:
            assert (await self.client.get("/health")).status_code == 200
            self.memory.append((await self.metrics())["process_resident_memory_bytes"] / 1e6)
            await asyncio.sleep(2)

    async def metrics(self) -> dict[str, float]:
        page = (await self.client.get("/metrics")).text
        return {name: float(value) for name, value in (x.rsplit(" ", 1) for x in page.splitlines() if x[0] != "#")}


async def settled(url: str, seconds: float = 60) -> dict[str, float]:
    """The metrics, once nothing runs or waits and no page is in use."""
    soak = Soak(int(url.rsplit(":", 1)[1]), 0)
    for _ in range(int(seconds)):
        found = await soak.metrics()
        left = {name: found[f"kimi_{name}"] for name in ("requests_running", "requests_waiting", "kv_pages_used")}
        if not any(left.values()):
            await soak.client.aclose()
            return found
        await asyncio.sleep(1)
    raise AssertionError(f"left over: {left}")


def start(folder: Path, port: int) -> subprocess.Popen:
    model = presets.tiny().replace(vocab_size=512, num_hidden_layers=2)
    save_hf(folder / "hf", {name: w * 0.1 for name, w in random_tensors(model).items()}, model)
    arguments = ("--checkpoint", str(folder / "hf"), "--tokenizer", "bytes", "--port", str(port))
    arguments += ("--max-model-len", "512", "--cache-tokens", "4096", "--max-rows", "8")
    env = {"JAX_PLATFORMS": "cpu", **os.environ, "PYTHONPATH": str(ROOT)}
    log = (folder / "server.log").open("w")
    return subprocess.Popen([sys.executable, "-m", "kimi_jax.serve", *arguments], env=env, stderr=log)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10)
    args = parser.parse_args()
    folder, port = Path(tempfile.mkdtemp()), free_port()
    url = f"http://127.0.0.1:{port}"
    print(f"the server's log: {folder / 'server.log'}", flush=True)
    server = start(folder, port)
    try:
        wait_until_ready(url, server)
        command = [
            "schemathesis",
            "run",
            url + "/openapi.json",
            "--checks",
            "not_a_server_error",
            "--request-timeout",
            "300",
        ]
        command += ["--max-time", str(int(60 * args.minutes))]
        with (folder / "schemathesis.log").open("w") as log:
            outside = subprocess.Popen([str(Path(sys.executable).with_name(command[0])), *command[1:]], stdout=log)
        soak = Soak(port, 60 * args.minutes)
        asyncio.run(soak.run())
        assert outside.wait(300) == 0, f"schemathesis: see {folder / 'schemathesis.log'}"
        found = asyncio.run(settled(url))
        server.send_signal(signal.SIGTERM)
        assert server.wait(90) == 0, "the server did not end well"
    finally:
        server.kill()
    statuses: collections.Counter[str] = collections.Counter()
    for name, value in found.items():
        if name.startswith("kimi_http_requests_total"):
            statuses[name.split('status="')[1][:3]] += int(value)
    n = len(soak.memory)
    before, after = (statistics.median(soak.memory[a : a + n // 4]) for a in (n // 2, n - n // 4))
    course = [round(soak.memory[i * (n - 1) // 10]) for i in range(11)]
    print(json.dumps({"requests": dict(soak.counts), "statuses": dict(statuses), "memory_mb": course}))
    assert not any(status.startswith("5") for status in statuses), "5xx"
    assert after <= LIMIT * before, f"memory grew from {before:.0f} to {after:.0f} MB"
    print("nothing crashed, leaked or went unanswered")


if __name__ == "__main__":
    main()
