"""The golden examples of template and parser, over HTTP."""

import json
from pathlib import Path

import pytest

from kimi_jax.data import tokenizer as tk
from tests.server.fake import FakeEngine

HERE = Path(__file__).parent
RENDERED = json.loads((HERE / "rendered.json").read_text(encoding="utf-8"))
PARSED = json.loads((HERE / "parsed.json").read_text(encoding="utf-8"))
BYTES = tk.load("bytes")
END = BYTES.special_ids["<|im_end|>"]
TOOLS = [{"type": "function", "function": {"name": name}} for name in ("get_time", "calc")]


@pytest.mark.parametrize("case", RENDERED, ids=range(1, len(RENDERED) + 1))
def test_rendered(case, random_server):
    fields = ("messages", "tools", "add_generation_prompt")
    found = random_server.post("/tokenize", {key: case[key] for key in fields}).json()
    assert found["tokens"] == BYTES.encode(case["expected"], allow_special=True)
    body = {key: case[key] for key in fields} | {"max_tokens": 1, "return_token_ids": True}
    answer = random_server.post("/v1/chat/completions", body).json()
    assert answer["prompt_token_ids"] == found["tokens"] and answer["usage"]["prompt_tokens"] == found["count"]


@pytest.fixture(scope="module")
def lawless(serve):
    with serve(FakeEngine(lawful=False)) as running:
        yield running


@pytest.mark.parametrize("spelled", [False, True])
@pytest.mark.parametrize("case", PARSED, ids=range(1, len(PARSED) + 1))
def test_parsed(case, spelled, lawless):
    ids = BYTES.encode(case["text"], allow_special=not spelled)
    lawless.engine.script = lambda prompt: [*ids, END]
    limit = len(ids) + (case["finish_reason"] != "length")
    body = {"messages": [{"role": "user", "content": "x"}], "tools": TOOLS, "max_tokens": limit}
    choice = lawless.post("/v1/chat/completions", body).json()["choices"][0]
    message = choice["message"]
    calls = [{"id": c["id"], **c["function"]} for c in message.get("tool_calls") or []]
    wanted = case["content"] or ""
    assert (message["content"] or "").rstrip() == wanted.rstrip()
    assert (calls, choice["finish_reason"]) == (case["tool_calls"], case["finish_reason"])
    content, streamed, reason = "", [], None
    for line in lawless.post("/v1/chat/completions", body | {"stream": True}).text.split("\n\n"):
        if line.startswith("data: {"):
            choice = json.loads(line[6:])["choices"][0]
            content += choice["delta"].get("content") or ""
            for delta in choice["delta"].get("tool_calls") or []:
                if "id" in delta:
                    streamed.append({"id": delta["id"], "name": delta["function"]["name"], "arguments": ""})
                streamed[delta["index"]]["arguments"] += delta["function"]["arguments"]
            reason = choice["finish_reason"] or reason
    assert (content, streamed, reason) == (message["content"] or "", calls, case["finish_reason"])
