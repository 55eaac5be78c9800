"""A server process and signals."""

import signal
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from tests.multiprocess.processes import free_port, wait_until_ready

SCRIPT = """
import sys
from tests.server.fake import FakeEngine
from kimi_jax.server.app import create_app
from kimi_jax.server.run import serve
from kimi_jax.server.service import Service
engine = FakeEngine(delay=0.01)
serve(create_app(Service(engine, engine.tokenizer, ["kimi"])), port=int(sys.argv[1]))
"""


@pytest.fixture
def process():
    root, port = Path(__file__).parents[2], free_port()
    command = [sys.executable, "-c", SCRIPT, str(port)]
    with subprocess.Popen(command, cwd=root, stderr=subprocess.PIPE, text=True) as process:
        url = f"http://127.0.0.1:{port}"
        wait_until_ready(url, process)
        yield process, url
        process.kill()


def test_sigterm_drains(process):
    process, url = process
    body = {
        "messages": [{"role": "user", "content": "a secret"}],
        "max_tokens": 100,
        "ignore_eos": True,
        "stream": True,
    }
    with httpx.stream("POST", url + "/v1/chat/completions", json=body) as response:
        lines = response.iter_lines()
        next(lines)
        process.send_signal(signal.SIGTERM)
        rest = [line for line in lines if line]
    assert rest[-1] == "data: [DONE]" and '"finish_reason":"length"' in rest[-2]
    assert process.wait(10) in (0, -signal.SIGTERM)
    with pytest.raises(httpx.TransportError):
        httpx.get(url + "/ready")
    errors = process.stderr.read()
    assert '"path": "/v1/chat/completions", "status": 200' in errors and "secret" not in errors


def test_the_server_knows_no_jax():
    code = (
        "import sys, kimi_jax.server.app, kimi_jax.server.run; print([m for m in ('jax', 'flax') if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert run.stdout.strip() == "[]", run.stderr
