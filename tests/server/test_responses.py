"""Responses through the official client."""

import json

import jsonschema
import openai
import pytest

from kimi_jax.data import tokenizer as tk
from kimi_jax.server import template
from kimi_jax.server.errors import ApiError
from kimi_jax.server.responses import Dialogues

BYTES = tk.load("bytes")
WEATHER = {
    "type": "function",
    "name": "get_weather",
    "description": "now",
    "strict": True,
    "parameters": {
        "type": "object",
        "properties": {"city": {"enum": ["Oslo", "Rome"]}},
        "required": ["city"],
        "additionalProperties": False,
    },
}
CALLS = (
    "Let me see.<|tool_calls_section_begin|><|tool_call_begin|>functions.get_weather:0<|tool_call_argument_begin|>"
    '{"city": "Oslo"}<|tool_call_end|><|tool_calls_section_end|>'
)


def prompt_text(server):
    return BYTES.decode(server.engine.seen[-1].prompt_ids)


def test_text(serve_text):
    with serve_text("Grüße") as server:
        answer = server.openai().responses.create(
            model="kimi", input="Hi", instructions="Be brief.", max_output_tokens=50
        )
        assert (answer.output_text, answer.status, answer.error) == ("Grüße", "completed", None)
        assert answer.usage.input_tokens == len(server.engine.seen[0].prompt_ids)
        assert (answer.usage.output_tokens, answer.usage.input_tokens_details.cached_tokens) == (8, 2)
        expected = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
        assert prompt_text(server) == template.to_text(template.render(expected))
        assert server.engine.seen[0].max_tokens == 50
        cut = server.openai().responses.create(model="kimi", input="Hi", max_output_tokens=3)
        assert (cut.status, cut.incomplete_details.reason) == ("incomplete", "max_output_tokens")


def test_calls_and_their_results(serve_text):
    with serve_text(CALLS) as server:
        client = server.openai()
        items = [
            {
                "role": "user",
                "content": [{"type": "input_text", "text": "Weather "}, {"type": "input_text", "text": "in Oslo?"}],
            }
        ]
        answer = client.responses.create(model="kimi", input=items, tools=[WEATHER])
        message, call = answer.output
        assert message.content[0].text == answer.output_text == "Let me see."
        assert (call.type, call.call_id, call.name, call.arguments, call.status) == (
            *("function_call", "functions.get_weather:0", "get_weather", '{"city": "Oslo"}'),
            "completed",
        )
        result = {"type": "function_call_output", "call_id": call.call_id, "output": "12°"}
        server.engine.script = None
        client.responses.create(
            model="kimi", input=[*items, message, call, result], tools=[WEATHER], max_output_tokens=2
        )
        whole = server.engine.seen[-1].prompt_ids
        expected = [
            {"role": "user", "content": "Weather in Oslo?"},
            {
                "role": "assistant",
                "content": "Let me see.",
                "tool_calls": [{"id": call.call_id, "function": {"arguments": '{"city": "Oslo"}'}}],
            },
            {"role": "tool", "tool_call_id": call.call_id, "content": "12°"},
        ]
        function = {key: WEATHER[key] for key in ("name", "description", "parameters", "strict")}
        tools = [{"type": "function", "function": function}]
        assert whole == template.to_ids(template.render(expected, tools), BYTES)
        client.responses.create(
            model="kimi", input=[result], tools=[WEATHER], previous_response_id=answer.id, max_output_tokens=2
        )
        assert server.engine.seen[-1].prompt_ids == whole


def test_a_stream(serve_text):
    with serve_text(CALLS) as server:
        client = server.openai()
        with client.responses.stream(model="kimi", input="Weather?", tools=[WEATHER]) as stream:
            events = list(stream)
            final = stream.get_final_response()
        assert [event.sequence_number for event in events if hasattr(event, "sequence_number")] == list(
            range(len(events))
        )
        kinds = [event.type for event in events if not event.type.endswith("delta")]
        item = ["response.output_item.added", "response.output_item.done"]
        assert kinds == [
            *("response.created", "response.in_progress", item[0], "response.content_part.added"),
            *("response.output_text.done", "response.content_part.done", item[1], item[0]),
            *("response.function_call_arguments.done", item[1], "response.completed"),
        ]
        whole = client.responses.create(model="kimi", input="Weather?", tools=[WEATHER])
        assert final.output_text == whole.output_text and final.usage == whole.usage
        assert [item.type for item in final.output] == ["message", "function_call"]
        assert final.output[1].arguments == whole.output[1].arguments


def test_forced_calls_and_json(random_server):
    client = random_server.openai()
    for choice in ("required", {"type": "function", "name": "get_weather"}):
        answer = client.responses.create(model="kimi", input="x", tools=[WEATHER], tool_choice=choice)
        for call in answer.output:
            jsonschema.validate(json.loads(call.arguments), WEATHER["parameters"])
    schema = {"type": "object", "properties": {"n": {"type": "integer", "maximum": 5}}, "required": ["n"]}
    form = {"format": {"type": "json_schema", "name": "n", "schema": schema}}
    jsonschema.validate(json.loads(client.responses.create(model="kimi", input="x", text=form).output_text), schema)


def test_log_probabilities(serve_text):
    with serve_text("ab") as server:
        answer = server.openai().responses.create(
            model="kimi", input="x", top_logprobs=1, include=["message.output_text.logprobs"]
        )
        assert [entry.token for entry in answer.output[0].content[0].logprobs] == ["a", "b"]


@pytest.mark.parametrize("stream", [False, True])
def test_tokens_whose_text_comes_later_keep_their_log_probabilities(stream, serve_text):
    with serve_text("a b é <x") as server:
        ask = dict(model="kimi", input="x", top_logprobs=1, include=["message.output_text.logprobs"])
        answer = server.openai().responses.create(**ask, stream=stream)
        entries = answer.output[0].content[0].logprobs if not stream else []
        for event in answer if stream else ():
            entries += event.logprobs if event.type == "response.output_text.delta" else []
    wanted = ["a", " ", "b", " ", "bytes:\\xc3", "bytes:\\xa9", " ", "<", "x"]
    assert [entry.token for entry in entries] == wanted


def test_dialogues_are_kept_for_a_while(random_server):
    dialogues = Dialogues(capacity=100)
    for name in "abc":
        dialogues.put(name, [{"role": "user", "content": name}])
    assert [dialogues.get(name)[0]["content"] for name in "bc"] == ["b", "c"]
    with pytest.raises(ApiError):
        dialogues.get("a")
    client = random_server.openai()
    first = client.responses.create(model="kimi", input="one", max_output_tokens=4)
    second = client.responses.create(model="kimi", input="two", max_output_tokens=4, previous_response_id=first.id)
    assert first.output_text in prompt_text(random_server)
    client.responses.create(model="kimi", input="three", max_output_tokens=4, previous_response_id=second.id)
    assert [prompt_text(random_server).count(word) for word in ("one", "two", "three")] == [1, 1, 1]
    hidden = client.responses.create(model="kimi", input="x", max_output_tokens=4, store=False)
    for lost in (hidden.id, "resp_unknown"):
        with pytest.raises(openai.NotFoundError, match="not found"):
            client.responses.create(model="kimi", input="x", previous_response_id=lost)


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"input": []}, "input"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].type"),
        ({"input": [{"role": "robot", "content": "x"}]}, "input[0].role"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content[0].type"),
        ({"input": [{"type": "function_call", "name": "f"}]}, "input[0]"),
        ({"input": [{"type": "function_call_output", "output": "x"}]}, "input[0].call_id"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "text": "x"}]}]}, "input[0].content[0].type"),
        (
            {"input": [{"type": "function_call", "name": "f", "call_id": "c", "arguments": 5}]},
            "input[0].arguments",
        ),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"text": {"format": 5}}, "text.format"),
        ({"background": True}, "background"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"text": {"format": {"type": "json_schema", "name": "x", "schema": {"not": {}}}}}, "text.format.schema"),
        ({"tool_choice": "perhaps"}, "tool_choice"),
    ],
)
def test_wrong_requests_are_refused(changes, param, random_server):
    response = random_server.post("/v1/responses", {"input": "x"} | changes)
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)
