"""The server over the real engine and random weights."""

import asyncio
import json

import jsonschema
import openai
import pytest

from kimi_jax.data import tokenizer as tk
from kimi_jax.inference.engine import Engine
from kimi_jax.inference.limits import Limits
from kimi_jax.server.engine_thread import EngineThread
from tests.inference.tiny import CFG, parameters
from tests.server.schemas import SCHEMAS

PARAMETERS = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 5}, "n": {"type": "integer", "minimum": 0, "maximum": 9}},
    "required": ["city", "n"],
}
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": PARAMETERS}}]


@pytest.fixture(scope="module")
def server(serve):
    cfg = CFG.replace(vocab_size=512, max_position_embeddings=4096)
    limits = Limits(n_pages=300, page_size=32, max_len=1024, vocab_size=512, max_rows=8, step_tokens=256)
    with EngineThread(Engine(parameters(cfg), cfg, limits), 512, 1024) as engine:
        engine.tokenizer = tk.load("bytes")  # type: ignore[attr-defined]
        with serve(engine) as running:
            yield running
            assert (engine.load().running, engine.load().waiting, engine.load().pages_used) == (0, 0, 0)


def ask(text):
    return {"model": "kimi", "messages": [{"role": "user", "content": text}], "temperature": 0, "max_tokens": 20}


@pytest.mark.slow
def test_a_hundred_greedy_streams_equal_those_alone(server):
    """Of several lengths, twelve times as many as run at once: text and tokens, byte for byte."""
    client = openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="x", timeout=300)

    async def one(i):
        request = ask(f"question {i}" * (1 + i % 3)) | {"max_tokens": 5 + i % 16}
        stream = await client.chat.completions.create(**request, stream=True, extra_body={"return_token_ids": True})
        choices = [choice async for chunk in stream for choice in chunk.choices]
        text = "".join(choice.delta.content or "" for choice in choices)
        return text, [i for choice in choices for i in getattr(choice, "token_ids", None) or []]

    async def both():
        return await asyncio.gather(*map(one, range(100))), [await one(i) for i in range(100)]

    together, alone = asyncio.run(both())
    assert together == alone and len({tuple(ids) for _, ids in alone}) > 50


@pytest.mark.slow
def test_several_answers_to_one_prompt(server):
    """Greedy ones are all alike, drawn ones depend on the seed alone; the prompt is computed once for them."""
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="x", timeout=300)

    def texts(**options):
        answer = client.chat.completions.create(**ask("several") | {"n": 3, "max_tokens": 12, **options})
        assert [choice.index for choice in answer.choices] == [0, 1, 2]
        return [choice.message.content for choice in answer.choices]

    assert len(set(texts())) == 1
    drawn = texts(temperature=1, seed=5)
    assert len(set(drawn)) == 3 and texts(temperature=1, seed=5) == drawn
    stopped = texts(temperature=1, seed=5, stop=drawn[0][2:3])
    assert stopped[0] == drawn[0][: drawn[0].index(drawn[0][2:3])]


@pytest.mark.slow
def test_forced_calls_of_random_weights_validate(server):
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="x", timeout=300)
    for seed in range(2):
        forced = {"tools": TOOLS, "tool_choice": "required", "parallel_tool_calls": False}
        request = {**ask("hi"), **forced, "temperature": 1, "seed": seed, "max_tokens": 600}
        (call,) = client.chat.completions.create(**request).choices[0].message.tool_calls
        jsonschema.validate(json.loads(call.function.arguments), PARAMETERS)


@pytest.mark.slow
def test_what_is_asked_with_a_schema_validates(server):
    """Every schema as ``json_schema`` and as a forced tool's, streamed and not, unless the limit cuts it off."""
    client = openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="x", timeout=600)
    ends = {str(ord(c)): 6 for c in '"]}'}  # random weights else seldom end a string or a list
    at_once = asyncio.Semaphore(32)

    async def one(schema, forced, stream):
        part = {key: value for key, value in schema.items() if key in ("$defs", "definitions", "$id")}
        if forced:
            inner = {key: value for key, value in schema.items() if key not in part}
            schema = {"type": "object", "properties": {"value": inner}, "required": ["value"], **part}
            tools = [{"type": "function", "function": {"name": "f", "parameters": schema}}]
            what = {"tools": tools, "tool_choice": "required", "parallel_tool_calls": False}
        else:
            form = {"name": "x", "schema": schema, "strict": True}
            what = {"response_format": {"type": "json_schema", "json_schema": form}}
        request = {**ask("hi"), **what, "temperature": 1, "seed": 1, "max_tokens": 400, "logit_bias": ends}
        async with at_once:
            if stream:
                chunks = await client.chat.completions.create(**request, stream=True)
                choices = [choice async for chunk in chunks for choice in chunk.choices]
                calls = [call for choice in choices for call in choice.delta.tool_calls or []]
                text = "".join(choice.delta.content or "" for choice in choices)
                reason = choices[-1].finish_reason
            else:
                (choice,) = (await client.chat.completions.create(**request)).choices
                calls, text = choice.message.tool_calls or [], choice.message.content
                reason = choice.finish_reason
        if reason == "length":
            return False
        text = "".join(call.function.arguments or "" for call in calls) if forced else text
        jsonschema.Draft202012Validator(schema).validate(json.loads(text))
        return True

    async def run():
        roots = [s for s in SCHEMAS if s.get("$ref") == "#" or '{"$ref": "#"}' in json.dumps(s)]  # else the wrapper
        kinds = [(s, forced, stream) for s in SCHEMAS for forced in (False, True) for stream in (False, True)]
        asked = [one(*kind) for kind in kinds if not (kind[1] and kind[0] in roots)]
        return await asyncio.gather(*asked)

    found = asyncio.run(run())
    assert sum(found) > 0.9 * len(found), f"{sum(found)} of {len(found)} ended"


@pytest.mark.slow
def test_prompts_are_scored(server):
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="x", timeout=300)
    request = {"model": "kimi", "prompt": "hello world", "echo": True, "logprobs": 1, "temperature": 0}
    scores = [client.completions.create(**request, max_tokens=n).choices[0].logprobs for n in (0, 1)]
    assert scores[0].token_logprobs == scores[1].token_logprobs[:-1] and scores[0].token_logprobs[0] is None
    assert all(value < 0 for value in scores[0].token_logprobs[1:])
