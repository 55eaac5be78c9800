"""The examples as a user runs them, as processes of their own, against a server whose engine plays a script."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest

from kimi_jax.data import tokenizer as tk
from kimi_jax.server.template import DEFAULT_SYSTEM
from tests.server.conftest import Running
from tests.server.fake import FakeEngine, script_of

ROOT = Path(__file__).parents[2]
BYTES = tk.load("bytes")
CALL = (
    "Let me check.<|tool_calls_section_begin|><|tool_call_begin|>functions.get_weather:0<|tool_call_argument_begin|>"
    '{"city": "Beijing"}<|tool_call_end|><|tool_calls_section_end|>'
)
ANSWER = "It is sunny in Beijing ☀."


def run(name: str, *arguments: str) -> str:
    command = [sys.executable, str(ROOT / "examples" / f"{name}.py"), *arguments]
    return subprocess.run(command, env=os.environ, check=True, capture_output=True, text=True, timeout=100).stdout


def weather(ids):
    """A call; once its result is there, the answer."""
    text = ANSWER if "## Return of" in BYTES.decode(ids) else CALL
    return script_of(BYTES, text)(ids)


@pytest.mark.parametrize("stream", [[], ["--stream"]])
def test_chat(stream):
    with Running(FakeEngine(script=script_of(BYTES, "Ich heiße Kimi."))) as server:
        said = run("chat", "--base-url", server.url + "/v1", "--model", "kimi", "--prompt", "Wer bist du?", *stream)
        job = server.engine.seen[0]
    assert said == "Ich heiße Kimi.\n"
    assert BYTES.decode(job.prompt_ids) == (
        f"<|im_system|>system<|im_middle|>{DEFAULT_SYSTEM}<|im_end|><|im_user|>user<|im_middle|>Wer bist du?<|im_end|>"
        "<|im_assistant|>assistant<|im_middle|>"
    )
    assert (job.sampling.temperature, job.max_tokens) == (0.6, 256)


@pytest.mark.parametrize("stream", [[], ["--stream"]])
@pytest.mark.parametrize(("name", "path"), [("tools", "/v1"), ("tools_anthropic", "")])
def test_tools_to_the_end(name, path, stream):
    with Running(FakeEngine(script=weather), api_keys=("secret",)) as server:
        where = ("--base-url", server.url + path, "--model", "kimi", "--api-key", "secret")
        said = run(name, *where, *stream)
        _, job = server.engine.seen
    assert "get_weather({'city': 'Beijing'}) -> " in said and said.rstrip().endswith(ANSWER)
    turns = BYTES.decode(job.prompt_ids)
    assert '<|tool_call_begin|>functions.get_weather:0<|tool_call_argument_begin|>{"city": "Beijing"}' in turns
    assert '## Return of functions.get_weather:0\n{"city": "Beijing", "weather": "Sunny"}<|im_end|>' in turns


@pytest.mark.parametrize("stream", [[], ["--stream"]])
def test_a_forced_call_of_random_tokens_is_valid(stream):
    """Whatever the weights, the call is one that the example can carry out."""
    with Running(FakeEngine()) as server:
        where = ("--base-url", server.url + "/v1", "--model", "kimi")
        said = run("tools", *where, "--tool-choice", "required", "--rounds", "1", *stream)
    result = json.loads(said.rstrip("\n").split("\n")[-1])
    jsonschema.validate(result, {"required": ["city", "weather"], "properties": {"city": {"maxLength": 64}}})
    assert said.startswith("get_weather({'city': ")
