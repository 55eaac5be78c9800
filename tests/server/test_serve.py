"""python -m kimi_jax.serve: from weights on disk to the official client, and out with a signal."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import openai
import pytest

from kimi_jax import presets, serve
from tests import command_line
from tests.checkpoint.examples import random_tensors, save_hf
from tests.multiprocess.processes import free_port, wait_until_ready

ROOT = Path(__file__).parents[2]
ENV = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "kimi_jax.serve", *arguments]


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (("--checkpoint", "nowhere"), 1, "nowhere"),
        ((), 2, "--checkpoint"),
        (("--checkpoint", "nowhere", "--port", "many"), 2, "--port"),
        (("--checkpoint", "nowhere", "--port", "99999"), 1, "cannot listen on 127.0.0.1:99999"),
        (("--checkpoint", "nowhere", "--host", "192.0.2.1"), 1, "--host"),
        (("--checkpoint", "nowhere", "--api-key", ""), 1, "--api-key is empty"),
    ],
)
def test_bad_requests(arguments, code, says):
    run = command_line.run(serve, *arguments)
    assert run.returncode == code, run.stderr
    assert says in run.stderr.splitlines()[-1]


@pytest.mark.slow
def test_a_checkpoint_answers(tmp_path):
    model = presets.tiny().replace(vocab_size=512)
    save_hf(tmp_path / "hf", {name: w * 0.1 for name, w in random_tensors(model).items()}, model)
    port = free_port()
    arguments = ("--checkpoint", str(tmp_path / "hf"), "--tokenizer", "bytes", "--port", str(port), "--api-key", "k")
    arguments += ("--max-model-len", "4096", "--cache-tokens", "1024", "--max-rows", "4")
    with subprocess.Popen(command(*arguments), cwd=ROOT, env=ENV, stderr=subprocess.PIPE, text=True) as process:
        url = f"http://127.0.0.1:{port}"
        wait_until_ready(url, process)
        client = openai.OpenAI(base_url=url + "/v1", api_key="k", max_retries=0)
        ask = dict(model="kimi_jax", prompt="ab", max_tokens=5, temperature=0)
        first, again = (client.completions.create(**ask) for _ in range(2))  # type: ignore[call-overload]
        assert first.choices[0].text == again.choices[0].text and first.usage.prompt_tokens == 2
        streamed = client.completions.create(**ask, stream=True)  # type: ignore[call-overload]
        assert "".join(chunk.choices[0].text for chunk in streamed if chunk.choices) == first.choices[0].text
        assert client.models.retrieve("kimi_jax").max_model_len == 1025  # the last token is in no cache
        message = {"role": "user", "content": "a" * 900}
        assert client.chat.completions.create(model="kimi_jax", messages=[message]).usage.completion_tokens > 0
        with pytest.raises(openai.AuthenticationError):
            openai.OpenAI(base_url=url + "/v1", api_key="wrong", max_retries=0).models.list()
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
