"""Messages through the official Anthropic client."""

import json
import sys

import anthropic
import jsonschema
import pytest

from kimi_jax.data import tokenizer as tk
from kimi_jax.server import template

BYTES = tk.load("bytes")
ASK = [{"role": "user", "content": "Weather in Oslo?"}]
INPUT = {"type": "object", "properties": {"city": {"type": "string", "maxLength": 5}}, "required": ["city"]}
TOOLS = [
    {"name": "get_weather", "description": "now", "input_schema": INPUT},
    {"name": "ping", "input_schema": {"type": "object"}},
]
CALLS = (
    "Let me see.<|tool_calls_section_begin|><|tool_call_begin|>functions.get_weather:0<|tool_call_argument_begin|>"
    '{"city": "Oslo"}<|tool_call_end|><|tool_call_begin|>functions.ping:1<|tool_call_argument_begin|>{}'
    "<|tool_call_end|><|tool_calls_section_end|>"
)


def test_text_and_temperature(serve_text):
    with serve_text("Grüße") as server:
        client, warm = server.anthropic(), {"extra_body": {"temperature": 0.5}}
        answer = client.messages.create(model="kimi", max_tokens=100, messages=ASK, system="Be brief.", **warm)
        assert [block.to_dict() for block in answer.content] == [{"type": "text", "text": "Grüße"}]
        assert (answer.role, answer.type, answer.stop_reason, answer.stop_sequence) == (
            "assistant",
            "message",
            "end_turn",
            None,
        )
        job = server.engine.seen[0]
        assert job.sampling.temperature == pytest.approx(0.3) and job.max_tokens == 100
        prompt = BYTES.decode(job.prompt_ids)
        assert prompt.startswith("<|im_system|>system<|im_middle|>Be brief.<|im_end|><|im_user|>user")
        assert str(answer._request_id).startswith("req_")
        usage = answer.usage
        assert usage.input_tokens + usage.cache_read_input_tokens == len(job.prompt_ids)
        assert (usage.cache_read_input_tokens, usage.output_tokens) == (2, 8)
        client.messages.create(model="kimi", max_tokens=1, messages=ASK)
        assert server.engine.seen[1].sampling.temperature == pytest.approx(0.6)


def test_stop_reasons(serve_text):
    with serve_text("one two three") as server:
        client = server.anthropic()
        answer = client.messages.create(model="kimi", max_tokens=100, messages=ASK, stop_sequences=["three", " t"])
        assert (answer.stop_reason, answer.stop_sequence, answer.content[0].text) == ("stop_sequence", " t", "one")
        assert client.messages.create(model="kimi", max_tokens=3, messages=ASK).stop_reason == "max_tokens"


def test_calls_and_results(serve_text):
    with serve_text(CALLS) as server:
        client = server.anthropic()
        answer = client.messages.create(model="kimi", max_tokens=500, messages=ASK, tools=TOOLS)
        assert answer.stop_reason == "tool_use"
        text, first, second = answer.content
        assert text.text == "Let me see."
        assert (first.type, first.id, first.name, first.input) == (
            *("tool_use", "functions.get_weather:0", "get_weather"),
            {"city": "Oslo"},
        )
        assert (second.name, second.input) == ("ping", {})
        history = [
            *ASK,
            {"role": "assistant", "content": answer.content},
            {
                "role": "user",
                "content": [
                    {"type": "tool_result", "tool_use_id": second.id, "content": [{"type": "text", "text": "pong"}]},
                    {"type": "tool_result", "tool_use_id": first.id, "content": "12°", "is_error": False},
                    {"type": "text", "text": "Well?"},
                ],
            },
        ]
        server.engine.script = None
        client.messages.create(model="kimi", max_tokens=5, messages=history, tools=TOOLS)
        expected = template.render(
            [
                *ASK,
                {
                    "role": "assistant",
                    "content": "Let me see.",
                    "tool_calls": [
                        {"id": "functions.get_weather:0", "function": {"arguments": '{"city": "Oslo"}'}},
                        {"id": "functions.ping:1", "function": {"arguments": "{}"}},
                    ],
                },
                {"role": "tool", "tool_call_id": "functions.ping:1", "content": "pong"},
                {"role": "tool", "tool_call_id": "functions.get_weather:0", "content": "12°"},
                {"role": "user", "content": "Well?"},
            ],
            [
                {"type": "function", "function": {"name": "get_weather", "description": "now", "parameters": INPUT}},
                {"type": "function", "function": {"name": "ping", "parameters": {"type": "object"}}},
            ],
        )
        assert server.engine.seen[-1].prompt_ids == template.to_ids(expected, BYTES)


def test_a_stream(serve_text):
    with serve_text(CALLS) as server:
        client = server.anthropic()
        with client.messages.stream(model="kimi", max_tokens=500, messages=ASK, tools=TOOLS) as stream:
            kinds = [event.type for event in stream if event.type.startswith(("message", "content_block_st"))]
            message = stream.get_final_message()
        block = ["content_block_start", "content_block_stop"]
        assert kinds == ["message_start", *block * 3, "message_delta", "message_stop"]
        whole = client.messages.create(model="kimi", max_tokens=500, messages=ASK, tools=TOOLS)
        assert [b.to_dict() for b in message.content] == [b.to_dict() for b in whole.content]
        assert (message.stop_reason, message.usage) == ("tool_use", whole.usage)


@pytest.mark.parametrize("limit", range(20, 260, 30))
def test_a_call_that_is_cut_off(limit, serve_text):
    with serve_text(CALLS) as server:
        client = server.anthropic()
        answer = client.messages.create(model="kimi", max_tokens=limit, messages=ASK, tools=TOOLS)
        calls = [block for block in answer.content if block.type == "tool_use"]
        cut = limit < len(BYTES.encode(CALLS, allow_special=True)) + 1
        assert answer.stop_reason == ("tool_use" if calls else "max_tokens" if cut else "end_turn")


@pytest.mark.parametrize(
    ("choice", "names", "single"),
    [
        ({"type": "any"}, {"get_weather", "ping"}, False),
        ({"type": "any", "disable_parallel_tool_use": True}, {"get_weather", "ping"}, True),
        ({"type": "tool", "name": "get_weather"}, {"get_weather"}, True),
    ],
)
def test_forced_calls_validate(choice, names, single, random_server):
    answer = random_server.anthropic().messages.create(
        model="kimi", max_tokens=3000, messages=ASK, tools=TOOLS, tool_choice=choice
    )
    assert answer.stop_reason == "tool_use" and (len(answer.content) == 1 or not single)
    for block in answer.content:
        assert block.name in names
        if block.name == "get_weather":
            jsonschema.validate(block.input, INPUT)


def test_json_answers(random_server):
    schema = INPUT | {"additionalProperties": False}
    answer = random_server.anthropic().messages.create(
        model="kimi", max_tokens=3000, messages=ASK, output_config={"format": {"type": "json_schema", "schema": schema}}
    )
    jsonschema.validate(json.loads(answer.content[0].text), schema)


def test_prefill_and_blocks_without_a_channel(random_server):
    thought = {"type": "thinking", "thinking": "hm", "signature": "s"}
    messages = [
        *ASK,
        {"role": "assistant", "content": [thought, {"type": "text", "text": "In "}, {"type": "text", "text": "Oslo"}]},
    ]
    random_server.anthropic().messages.create(model="kimi", max_tokens=2, messages=messages)
    prompt = BYTES.decode(random_server.engine.seen[-1].prompt_ids)
    assert prompt.endswith("<|im_assistant|>assistant<|im_middle|>In Oslo")


def test_count_tokens(random_server):
    client = random_server.anthropic()
    request = {"model": "kimi", "messages": ASK, "tools": TOOLS, "system": [{"type": "text", "text": "s"}]}
    count = client.messages.count_tokens(**request).input_tokens
    client.messages.create(**request, max_tokens=1)
    assert count == len(random_server.engine.seen[-1].prompt_ids)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"max_tokens": None}, "max_tokens"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "system", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, "messages[0].content[0].type"),
        ({"messages": [{"role": "user", "content": [{"type": "tool_result", "content": "x"}]}]}, "tool_use_id"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text"),
        ({"temperature": 1.5}, "temperature"),
        ({"top_k": 2**31}, "top_k"),
        ({"output_config": {"format": {"type": "json_object"}}}, "output_config.format"),
        ({"output_config": {"format": {"type": "json_schema", "schema": {"not": {}}}}}, "not"),
        ({"tools": [{"type": "bash_20250124", "name": "bash"}]}, "tools[0]"),
        ({"tools": TOOLS, "tool_choice": {"type": "tool"}}, "tool_choice.name"),
        ({"tools": TOOLS, "tool_choice": {"type": "tool", "name": "nothing"}}, "tool_choice"),
        (
            {"tools": [{"name": "f", "input_schema": {"type": "object", "not": {}}}], "tool_choice": {"type": "any"}},
            "not",
        ),
    ],
)
def test_wrong_requests_are_refused(changes, said, random_server):
    body = {"model": "kimi", "max_tokens": 5, "messages": ASK} | changes
    response = random_server.post("/v1/messages", {key: value for key, value in body.items() if value is not None})
    assert response.status_code == 400
    found = response.json()
    assert found["type"] == "error" and found["error"]["type"] == "invalid_request_error"
    assert said in found["error"]["message"]


def test_unknown_models(random_server):
    with pytest.raises(anthropic.NotFoundError, match="claude"):
        random_server.anthropic().messages.create(model="claude", max_tokens=5, messages=ASK)


def test_arguments_that_are_no_object(serve_text):
    spelled = CALLS.replace('{"city": "Oslo"}', json.dumps([1]))
    with serve_text(spelled) as server:
        # without a schema to hold them to, only spelled markers could bring this about
        server.engine.script = lambda ids: [*spelled.encode(), BYTES.special_ids["<|im_end|>"]]
        answer = server.anthropic().messages.create(model="kimi", max_tokens=500, messages=ASK, tools=TOOLS)
        assert [block.input for block in answer.content[1:]] == [{}, {}]


@pytest.mark.parametrize("number", ["1e999", "-2.5e400", "NaN", "-Infinity"])
def test_numbers_that_json_cannot_hold(number, serve_text):
    """The grammar of numbers ends at no exponent; names for infinity need spelled markers."""
    spelled = CALLS.replace('{"city": "Oslo"}', f'{{"n": {number}, "m": 1.5}}')
    with serve_text(spelled) as server:
        server.engine.script = lambda ids: [*spelled.encode(), BYTES.special_ids["<|im_end|>"]]
        answer = server.anthropic().messages.create(model="kimi", max_tokens=500, messages=ASK, tools=TOOLS)
        largest = {"1e999": sys.float_info.max, "-2.5e400": -sys.float_info.max}
        assert answer.content[1].input == ({"n": largest[number], "m": 1.5} if number in largest else {})
