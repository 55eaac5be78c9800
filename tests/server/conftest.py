"""The released vocabulary where it is at hand, else the bytes: masks are tested over real tokens if possible."""

import contextlib
import os
import threading
import time
from pathlib import Path

import anthropic
import httpx
import openai
import pytest
import uvicorn

from kimi_jax.data import tokenizer as tk
from kimi_jax.server.app import Settings, create_app
from kimi_jax.server.grammar import Vocabulary
from kimi_jax.server.service import Service
from tests.server.fake import FakeEngine, script_of

DATA = Path(os.environ.get("KIMI_JAX_DATA", Path(__file__).parents[3] / "shared" / "data")) / "kimi_k2_tokenizer"


@pytest.fixture(scope="session")
def tokenizer():
    return tk.load(str(DATA) if DATA.is_dir() else "bytes")


@pytest.fixture(scope="session")
def vocabulary(tokenizer):
    return Vocabulary(tokenizer, tokenizer.vocab_size + 70)


class Running:
    """A server over a fake engine, on a port of its own."""

    def __init__(self, engine, **settings):
        self.engine = engine
        self.app = create_app(Service(engine, engine.tokenizer, ["kimi", "kimi-k2"]), Settings(**settings))
        config = uvicorn.Config(self.app, port=0, log_level="warning", timeout_graceful_shutdown=5)
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, daemon=True)

    def __enter__(self):
        self._thread.start()
        while not self._server.started:
            assert self._thread.is_alive()
            time.sleep(0.01)
        port = self._server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        return self

    def __exit__(self, *_):
        self._server.should_exit = True
        self._thread.join(10)

    def openai(self, key="none", **options):
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=20, **options)

    def anthropic(self, key="none"):
        return anthropic.Anthropic(base_url=self.url, api_key=key, max_retries=0, timeout=20)

    def post(self, path, body, **options):
        return httpx.post(self.url + path, json=body, timeout=20, **options)


@pytest.fixture(scope="module")
def random_server():
    """Answers at random, under whatever constraint there is."""
    with Running(FakeEngine()) as running:
        yield running


@contextlib.contextmanager
def scripted(text, **options):
    """A server whose every answer is ``text``."""
    tokenizer = tk.load("bytes")
    with Running(FakeEngine(script=script_of(tokenizer, text), **options)) as running:
        yield running


@pytest.fixture(scope="session")
def serve():
    return Running


@pytest.fixture(scope="session")
def serve_text():
    return scripted
