"""Chat completions through the official client."""

import json

import jsonschema
import openai
import pytest

from kimi_jax.data import tokenizer as tk
from kimi_jax.server.chat import ChatRequest
from tests.server.fake import FakeEngine

BYTES = tk.load("bytes")
ASK = [{"role": "user", "content": "Weather in Oslo?"}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "enum": ["Oslo", "Rome"]},
                "days": {"type": "integer", "maximum": 9},
            },
            "required": ["city"],
        },
    },
}
CLOCK = {"type": "function", "function": {"name": "get_time", "description": "now"}}
CALLS = (
    "Let me see.<|tool_calls_section_begin|><|tool_call_begin|>functions.get_weather:0<|tool_call_argument_begin|>"
    '{"city": "Oslo"}<|tool_call_end|><|tool_call_begin|>functions.get_time:1<|tool_call_argument_begin|>{}'
    "<|tool_call_end|><|tool_calls_section_end|>"
)


def gather(stream):
    """The message that a stream adds up to, and its chunks."""
    message, calls, reasons, chunks = {"content": ""}, [], [], list(stream)
    for chunk in chunks:
        for choice in chunk.choices:
            message["content"] += choice.delta.content or ""
            for call in choice.delta.tool_calls or []:
                if call.id:
                    assert (call.index, call.type) == (len(calls), "function")
                    calls.append({"id": call.id, "name": call.function.name, "arguments": ""})
                calls[call.index]["arguments"] += call.function.arguments
            reasons += [choice.finish_reason] if choice.finish_reason else []
    (reason,) = reasons
    return message["content"], calls, reason, chunks


def test_text(serve_text):
    with serve_text("Grüße 😀") as server:
        client = server.openai()
        answer = client.chat.completions.create(model="kimi", messages=ASK)
        choice = answer.choices[0]
        assert (choice.message.content, choice.message.role, choice.finish_reason) == ("Grüße 😀", "assistant", "stop")
        assert choice.message.tool_calls is None and choice.logprobs is None
        job = server.engine.seen[0]
        assert BYTES.decode(job.prompt_ids).endswith("Weather in Oslo?<|im_end|><|im_assistant|>assistant<|im_middle|>")
        assert job.sampling.temperature == 0.6 and job.stop_ids == BYTES.stop_ids
        assert job.max_tokens == server.engine.max_model_len - len(job.prompt_ids)
        output = len("Grüße 😀".encode()) + 1
        usage = answer.usage
        assert (usage.prompt_tokens, usage.completion_tokens) == (len(job.prompt_ids), output)
        assert usage.prompt_tokens_details.cached_tokens == 2

        stream = client.chat.completions.create(
            model="kimi", messages=ASK, stream=True, stream_options={"include_usage": True}
        )
        content, calls, reason, chunks = gather(stream)
        assert (content, calls, reason) == ("Grüße 😀", [], "stop")
        assert all("\ufffd" not in (c.choices[0].delta.content or "") for c in chunks if c.choices)
        assert chunks[0].choices[0].delta.role == "assistant"
        assert chunks[-1].choices == [] and chunks[-1].usage == usage
        assert all(chunk.usage is None for chunk in chunks[:-1]) and len({chunk.id for chunk in chunks}) == 1


def test_calls(serve_text):
    with serve_text(CALLS) as server:
        client = server.openai()
        request = {"model": "kimi", "messages": ASK, "tools": [WEATHER, CLOCK]}
        message = client.chat.completions.create(**request).choices[0]
        assert (message.message.content, message.finish_reason) == ("Let me see.", "tool_calls")
        got = [(call.id, call.type, call.function.name, call.function.arguments) for call in message.message.tool_calls]
        assert got == [
            ("functions.get_weather:0", "function", "get_weather", '{"city": "Oslo"}'),
            ("functions.get_time:1", "function", "get_time", "{}"),
        ]
        content, calls, reason, chunks = gather(client.chat.completions.create(**request, stream=True))
        assert (content, reason) == ("Let me see.", "tool_calls")
        assert [(c["id"], "function", c["name"], c["arguments"]) for c in calls] == got
        assert sum(bool(c.choices[0].delta.tool_calls) for c in chunks) > 4  # arguments come piece by piece
        # the loop: results go back, ids that were rewritten by the client are put right, counting goes on
        history = [*ASK, json.loads(message.message.to_json())]
        history += [{"role": "tool", "tool_call_id": id_, "content": "12°"} for id_, *_ in got]
        history[1]["tool_calls"][0]["id"] = history[2]["tool_call_id"] = "call_abc"
        server.engine.script = None
        answer = client.chat.completions.create(
            model="kimi", messages=history, tools=[CLOCK], tool_choice="required", parallel_tool_calls=False
        )
        text = BYTES.decode(server.engine.seen[-1].prompt_ids)
        assert "## Return of functions.get_weather:0\n12°" in text and "call_abc" not in text
        assert [call.id for call in answer.choices[0].message.tool_calls] == ["functions.get_time:2"]


def test_calls_are_no_content_without_tools(serve_text):
    with serve_text(CALLS) as server:
        answer = server.openai().chat.completions.create(model="kimi", messages=ASK).choices[0]
        assert (answer.message.content, answer.message.tool_calls, answer.finish_reason) == (
            "Let me see.",
            None,
            "stop",
        )


@pytest.mark.parametrize("limit", [30, 60, 90, 120])
def test_a_call_that_is_cut_off(limit, serve_text):
    with serve_text(CALLS) as server:
        request = {"model": "kimi", "messages": ASK, "tools": [WEATHER, CLOCK], "max_tokens": limit}
        choice = server.openai().chat.completions.create(**request).choices[0]
        whole = choice.message.tool_calls or []
        assert all(json.loads(call.function.arguments) is not None for call in whole)
        assert choice.finish_reason == ("tool_calls" if whole else "length")
        _, calls, reason, _ = gather(server.openai().chat.completions.create(**request, stream=True))
        assert reason == ("tool_calls" if whole and len(calls) == len(whole) else "length")
        assert [call["id"] for call in calls][: len(whole)] == [call.id for call in whole]


@pytest.mark.parametrize(
    ("choice", "names"),
    [
        ("required", {"get_weather", "get_time"}),
        ({"type": "function", "function": {"name": "get_time"}}, {"get_time"}),
        (
            {
                "type": "allowed_tools",
                "allowed_tools": {
                    "mode": "required",
                    "tools": [{"type": "function", "function": {"name": "get_weather"}}],
                },
            },
            {"get_weather"},
        ),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_forced_calls_validate(choice, names, stream, random_server):
    client = random_server.openai()
    for seed in range(8):
        request = {"model": "kimi", "messages": ASK, "tools": [WEATHER, CLOCK], "tool_choice": choice, "seed": seed}
        answer = client.chat.completions.create(**request, stream=stream)
        if stream:
            content, calls, reason, _ = gather(answer)
        else:
            message, reason = answer.choices[0].message, answer.choices[0].finish_reason
            content = message.content or ""
            calls = [{"id": c.id, **c.function.model_dump()} for c in message.tool_calls]
        assert content == "" and reason == "tool_calls" and calls
        for i, call in enumerate(calls):
            assert call["name"] in names and call["id"] == f"functions.{call['name']}:{i}"
            parameters = WEATHER["function"]["parameters"] if call["name"] == "get_weather" else {"maxProperties": 0}
            jsonschema.validate(json.loads(call["arguments"]), parameters)


def test_tool_choice_none_rules_calls_out(random_server):
    random_server.openai().chat.completions.create(model="kimi", messages=ASK, tools=[CLOCK], tool_choice="none")
    job = random_server.engine.seen[-1]
    assert "get_time" in BYTES.decode(job.prompt_ids)
    mask = job.constraint().mask()
    for name, id_ in BYTES.special_ids.items():
        assert bool(mask[id_ // 32] >> (id_ % 32) & 1) == (not name.startswith("<|tool_call"))


SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("stream", [False, True])
def test_json_answers(stream, random_server):
    client = random_server.openai()

    def ask(response_format, **more):
        answer = client.chat.completions.create(
            model="kimi", messages=ASK, response_format=response_format, stream=stream, seed=3, **more
        )
        return gather(answer)[0] if stream else answer.choices[0].message.content

    format_ = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA, "strict": True}}
    jsonschema.validate(json.loads(ask(format_)), SCHEMA)
    assert isinstance(json.loads(ask({"type": "json_object"})), dict)
    assert ask({"type": "text"})
    assert ask(None, extra_body={"structured_outputs": {"choice": ["yes", "no"]}}) in ("yes", "no")
    assert ask(None, extra_body={"structured_outputs": {"regex": "[ab]{3}"}}).strip("ab") == ""


def test_several_choices_seeds_and_stops(random_server):
    client = random_server.openai()

    def texts(**options):
        answer = client.chat.completions.create(model="kimi", messages=ASK, max_tokens=20, **options)
        return [choice.message.content for choice in answer.choices]

    three = texts(n=3, seed=20)
    assert len(set(three)) == 3 and texts(seed=20) == three[:1] and texts(n=3, seed=20) == three
    cut = texts(seed=20, stop=[three[0][4:6], "never"])[0]
    assert three[0].startswith(cut) and three[0][4:6] not in cut
    stream = client.chat.completions.create(model="kimi", messages=ASK, max_tokens=20, n=3, seed=20, stream=True)
    streamed = ["", "", ""]
    for chunk in stream:
        for choice in chunk.choices:
            streamed[choice.index] += choice.delta.content or ""
    assert streamed == three


def test_sampling_parameters_reach_the_engine(random_server):
    random_server.openai().chat.completions.create(
        model="kimi",
        messages=ASK,
        max_completion_tokens=3,
        temperature=0,
        top_p=0.5,
        presence_penalty=1,
        frequency_penalty=-1,
        logit_bias={"65": 5, "66": -100},
        seed=7,
        extra_body={"top_k": 4, "min_p": 0.1, "repetition_penalty": 1.2, "ignore_eos": True, "unheard_of": 1},
    )
    job = random_server.engine.seen[-1]
    s = job.sampling
    assert (job.max_tokens, s.temperature, s.top_p, s.top_k, s.min_p, s.seed) == (3, 0, 0.5, 4, 0.1, 7)
    assert (s.presence_penalty, s.frequency_penalty, s.repetition_penalty) == (1, -1, 1.2)
    assert s.logit_bias == {65: 5, 66: -100} and job.stop_ids == frozenset()


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {"messages": ASK}),
        ("/v1/completions", {"prompt": "x"}),
        ("/v1/responses", {"input": "x"}),
        ("/v1/messages", {"messages": ASK, "max_tokens": 1}),
    ],
)
def test_top_p_of_zero_is_the_smallest_nucleus(path, body, random_server):
    response = random_server.post(path, {**body, "top_p": 0})
    assert response.status_code == 200 and response.json().get("top_p", 0) == 0
    assert random_server.engine.seen[-1].sampling.top_p == 1e-9


def test_a_refusal_in_the_history_is_its_text(random_server):
    parts = [{"type": "text", "text": "No. "}, {"type": "refusal", "refusal": "I cannot."}]
    messages = [*ASK, {"role": "assistant", "content": parts}, *ASK]
    random_server.openai().chat.completions.create(model="kimi", messages=messages, max_tokens=2)
    turn = "<|im_assistant|>assistant<|im_middle|>No. I cannot.<|im_end|>"
    assert turn in BYTES.decode(random_server.engine.seen[-1].prompt_ids)


@pytest.mark.parametrize("stream", [False, True])
def test_log_probabilities_and_token_ids(stream, serve_text):
    with serve_text("aé") as server:
        answer = server.openai().chat.completions.create(
            model="kimi",
            messages=ASK,
            logprobs=True,
            top_logprobs=2,
            stream=stream,
            extra_body={"return_token_ids": True},
        )
        prompt = server.engine.seen[0].prompt_ids
        if stream:
            chunks = list(answer)
            scores = [s for c in chunks for s in (c.choices[0].logprobs.content if c.choices[0].logprobs else [])]
            ids = [i for c in chunks for i in getattr(c.choices[0], "token_ids", [])]
            assert chunks[0].prompt_token_ids == prompt
        else:
            scores, ids = answer.choices[0].logprobs.content, answer.choices[0].token_ids
            assert answer.prompt_token_ids == prompt
        end = BYTES.special_ids["<|im_end|>"]
        assert ids == [97, 0xC3, 0xA9, end]
        assert [(s.token, s.bytes) for s in scores[:3]] == [
            ("a", [97]),
            ("bytes:\\xc3", [0xC3]),
            ("bytes:\\xa9", [0xA9]),
        ]
        assert [s.logprob for s in scores] == pytest.approx([-1 - i / 1000 for i in ids])
        assert [t.token for t in scores[0].top_logprobs] == ["a", "a"]
        without = server.openai().chat.completions.create(model="kimi", messages=ASK, logprobs=True)
        assert len(without.choices[0].logprobs.content) == 3


def test_a_message_can_be_continued(random_server):
    messages = [*ASK, {"role": "assistant", "content": "In Oslo", "partial": True}]
    random_server.openai().chat.completions.create(model="kimi", messages=messages, max_tokens=2)
    assert BYTES.decode(random_server.engine.seen[-1].prompt_ids).endswith("<|im_middle|>In Oslo")


def bad(random_server, **changes):
    body = {"model": "kimi", "messages": ASK} | changes
    response = random_server.post("/v1/chat/completions", {k: v for k, v in body.items() if v != "absent"})
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["message"]
    return response.status_code, error["param"]


TOOL = {"type": "function", "function": {"name": "f"}}


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"messages": "absent"}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "text": "x"}]}]}, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].tool_call_id"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"id": "x"}]}]}, "messages[0].tool_calls[0].function"),
        ({"temperature": 3}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": -0.1}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_k": 2**31}, "top_k"),
        ({"stream_options": {"include_usage": "yes"}}, "stream_options.include_usage"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"n": 0}, "n"),
        ({"stop": [""]}, "stop[0]"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"presence_penalty": 3}, "presence_penalty"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"999999": 1}}, "logit_bias"),
        ({"logit_bias": {"9" * 5000: 1}}, "logit_bias"),
        ({"logit_bias": {"1": 101}}, "logit_bias"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
        ({"tools": [TOOL, TOOL]}, "tools[1].function.name"),
        ({"tools": [{"type": "function", "function": {"name": "f", "strict": "no"}}]}, "tools[0].function.strict"),
        ({"tools": [TOOL], "tool_choice": "sometimes"}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "g"}}}, "tool_choice"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"response_format": {"type": "xml"}}, "response_format"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"not": {}}}}},
            "response_format.json_schema.schema",
        ),
        (
            {
                "tools": [{"type": "function", "function": {"name": "f", "parameters": {"not": {}}}}],
                "tool_choice": "required",
            },
            "tools[0].function.parameters",
        ),
        (
            {"tools": [{"type": "function", "function": {"name": "f", "strict": True, "parameters": {"not": {}}}}]},
            "tools[0].function.parameters",
        ),
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"structured_outputs": {"regex": "("}}, "structured_outputs"),
    ],
)
def test_wrong_requests_are_refused(changes, param, random_server):
    before = len(random_server.engine.seen)
    assert bad(random_server, **changes) == (400, param)
    assert len(random_server.engine.seen) == before


def test_null_stands_for_a_field_left_out(random_server):
    fields = {name: None for name in ChatRequest.model_fields if name not in ("messages", "model", "max_tokens")}
    assert random_server.post("/v1/chat/completions", {"messages": ASK, "max_tokens": 1, **fields}).status_code == 200


def test_a_loose_tool_with_an_unsupported_keyword_still_works(random_server):
    loose = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "not": {}}}}
    assert random_server.post("/v1/chat/completions", {"messages": ASK, "tools": [loose]}).status_code == 200


def test_unknown_models_and_long_prompts(serve):
    with serve(FakeEngine(max_model_len=200)) as server:
        with pytest.raises(openai.NotFoundError) as caught:
            server.openai().chat.completions.create(model="gpt", messages=ASK)
        assert caught.value.code == "model_not_found"
        long = [{"role": "user", "content": "x" * 300}]
        with pytest.raises(openai.BadRequestError) as caught:
            server.openai().chat.completions.create(model="kimi", messages=long)
        assert caught.value.code == "context_length_exceeded"
