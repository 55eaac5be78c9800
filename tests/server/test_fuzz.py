"""Requests of every kind of wrong: each is answered, none with a server error, and nothing stays behind."""

import asyncio
import json
import random

import httpx

from kimi_jax.server.app import create_app
from kimi_jax.server.service import Service
from tests.server.fake import FakeEngine

PARAMETERS = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
FUNCTION = {"name": "f", "description": "d", "parameters": PARAMETERS, "strict": True}
CALL = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
PART = [{"type": "text", "text": "x"}]
BODIES = {
    "/v1/chat/completions": {
        "messages": [
            {"role": "system", "content": "s"},
            {"role": "user", "content": PART, "name": "n"},
            {"role": "assistant", "content": None, "tool_calls": [CALL, CALL]},
            {"role": "tool", "tool_call_id": "call_1", "content": "r"},
        ],
        "tools": [{"type": "function", "function": FUNCTION}],
        "tool_choice": {"type": "function", "function": {"name": "f"}},
        "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": PARAMETERS}},
        "structured_outputs": {"regex": "a+"},
        "stop": ["a", "b"],
        "logit_bias": {"5": 1.5},
        "stream_options": {"include_usage": True},
        **{"n": 2, "logprobs": True, "top_logprobs": 2, "seed": 1, "temperature": 0.5, "top_p": 0.9, "top_k": 3},
        **{"min_p": 0.1, "presence_penalty": 1.0, "repetition_penalty": 1.1, "parallel_tool_calls": False},
        **{"return_token_ids": True, "stream": True, "max_completion_tokens": 9},
    },
    "/v1/completions": {
        **{"prompt": ["a", "b"], "echo": True, "logprobs": 2, "n": 1, "best_of": 1, "stop": "x", "stream": False},
        **{"return_token_ids": True, "structured_outputs": {"choice": ["a"]}, "seed": 3, "suffix": ""},
    },
    "/v1/responses": {
        "input": [
            {"role": "user", "content": [{"type": "input_text", "text": "x"}]},
            {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "c", "output": PART},
            {"type": "reasoning", "summary": []},
        ],
        "tools": [{"type": "function", **FUNCTION}],
        "tool_choice": {"type": "function", "name": "f"},
        "text": {"format": {"type": "json_schema", "name": "x", "schema": PARAMETERS}},
        **{"instructions": "i", "metadata": {"a": "b"}, "top_logprobs": 1, "include": ["x"], "stream": True},
    },
    "/v1/messages": {
        "messages": [
            {"role": "user", "content": PART},
            {"role": "assistant", "content": [*PART, {"type": "tool_use", "id": "t", "name": "f", "input": {"a": 1}}]},
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t", "content": PART}]},
        ],
        "system": PART,
        "tools": [{"name": "f", "description": "d", "input_schema": PARAMETERS}],
        "tool_choice": {"type": "tool", "name": "f", "disable_parallel_tool_use": True},
        **{"stop_sequences": ["x"], "stream": True, "temperature": 0.5, "top_k": 2, "thinking": {"type": "disabled"}},
    },
    "/v1/messages/count_tokens": {"messages": [{"role": "user", "content": "x"}], "system": "s"},
    "/tokenize": {"messages": [{"role": "user", "content": "x"}], "return_token_strs": True},
    "/detokenize": {"tokens": [1, 200, 511, 519, 10**9]},
}
ODD = [
    None,
    True,
    0,
    -1,
    1.5,
    1e308,
    2**70,
    "",
    "x",
    "\x00\ud7ff<|im_end|>",
    [],
    [[]],
    {},
    {"a": None},
    [None],
    [{}],
    "auto",
]
ODD += [
    {"type": "object"},
    {"type": ["object"]},
    {"type": 3},
    {"$ref": "#"},
    {"properties": 3},
    {"enum": []},
    {"type": "text"},
]


def places(value, path=()):
    """Where something can be replaced, every depth."""
    found = [path] if path else []
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        found += places(inner, (*path, key))
    return found


def changed(body, path, value):
    body = json.loads(json.dumps(body))
    inner = body
    for key in path[:-1]:
        inner = inner[key]
    if value is places:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    return body


def requests(rng, count):
    for _ in range(count):
        path = rng.choice(list(BODIES))
        body = {"max_tokens": rng.choice([1, 5, 30]), **BODIES[path]}
        for _ in range(rng.choice([0, 1, 1, 1, 2, 3])):
            if found := places(body):  # a short body can be left without any
                body = changed(body, rng.choice(found), rng.choice([*ODD, places]))
        yield path, body


def test_every_request_is_answered():
    engine = FakeEngine(max_model_len=3000)
    app = create_app(Service(engine, engine.tokenizer, ["kimi"]))
    seen = {}

    async def run():
        transport = httpx.ASGITransport(app, raise_app_exceptions=True)
        async with httpx.AsyncClient(transport=transport, base_url="http://x", timeout=60) as client:
            for path, body in requests(random.Random(0), 600):
                response = await client.post(path, json=body)
                seen.setdefault(path, set()).add(response.status_code)
                assert response.status_code in (200, 400, 404), (path, body, response.text)
                if response.status_code != 200:
                    assert response.json()["error"]["message"]
                elif response.headers["content-type"].startswith("text/event-stream"):
                    assert "The server had an error" not in response.text, (path, body)

    asyncio.run(run())
    assert all(200 in statuses and 400 in statuses for statuses in seen.values())
    assert engine.running == 0 and app.state.server.running == 0
