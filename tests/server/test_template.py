"""The chat format against golden renderings, a jinja twin, and the rule that clients write no control token."""

import json
from pathlib import Path

import jinja2
import pytest
from hypothesis import given, settings

from kimi_jax.errors import UserError
from kimi_jax.server import template
from tests.server.dialogues import BYTES, MARKERS, dialogues, tools

HERE = Path(__file__).parent
GOLDEN = json.loads((HERE / "rendered.json").read_text(encoding="utf-8"))


def twin():
    environment = jinja2.Environment(keep_trailing_newline=False)
    source = (HERE / "twin.jinja").read_text(encoding="utf-8").rstrip("\n")
    return environment.from_string(source)


TWIN = twin()


def sort_keys(value):
    if isinstance(value, dict):
        return {key: sort_keys(value[key]) for key in sorted(value)}
    return [sort_keys(item) for item in value] if isinstance(value, list) else value


def twin_text(messages, tools, add_generation_prompt):
    return TWIN.render(
        messages=messages,
        tools=tools,
        add_generation_prompt=add_generation_prompt,
        compact=lambda v: json.dumps(sort_keys(v), separators=(",", ":"), ensure_ascii=False),
        spaced=lambda v: json.dumps(v, ensure_ascii=False),
    )


@pytest.mark.parametrize("case", GOLDEN, ids=range(1, len(GOLDEN) + 1))
def test_golden(case):
    pieces = template.render(case["messages"], case["tools"], case["add_generation_prompt"])
    assert template.to_text(pieces) == case["expected"]
    assert twin_text(case["messages"], case["tools"], case["add_generation_prompt"]) == case["expected"]
    assert template.to_ids(pieces, BYTES) == BYTES.encode(case["expected"], allow_special=True)


@settings(max_examples=300, deadline=None)
@given(dialogues, tools)
def test_equals_the_twin(messages, tools):
    for prompt in (True, False):
        assert template.to_text(template.render(messages, tools, prompt)) == twin_text(messages, tools, prompt)


def frame_ids(messages, tools):
    """Control tokens that a dialogue has by its shape alone."""
    id_of = BYTES.special_ids.__getitem__
    turn = [id_of("<|im_system|>"), id_of("<|im_middle|>"), id_of("<|im_end|>")]
    ids = turn * bool(tools) + turn * bool(messages and messages[0]["role"] != "system")
    for message in messages:
        marker = {"user": "<|im_user|>", "assistant": "<|im_assistant|>"}.get(message["role"], "<|im_system|>")
        ids += [id_of(marker), id_of("<|im_middle|>")]
        count = len(message.get("tool_calls") or []) if message["role"] == "assistant" else 0
        call = [id_of(f"<|tool_call_{part}|>") for part in ("begin", "argument_begin", "end")]
        if count:
            ids += [id_of("<|tool_calls_section_begin|>"), *call * count, id_of("<|tool_calls_section_end|>")]
        ids.append(id_of("<|im_end|>"))
    return [*ids, id_of("<|im_assistant|>"), id_of("<|im_middle|>")]


@settings(max_examples=300, deadline=None)
@given(dialogues, tools)
def test_no_client_text_becomes_a_control_token(messages, tools):
    pieces = template.render(messages, tools)
    ids = template.to_ids(pieces, BYTES)
    assert [i for i in ids if i >= 256] == frame_ids(messages, tools)
    assert BYTES.decode_bytes(ids) == template.to_text(pieces).encode("utf-8", "replace")


@pytest.mark.parametrize("marker", MARKERS[:20] + MARKERS[-2:])
def test_each_marker_in_each_field_stays_text(marker):
    call = {"id": marker, "function": {"name": marker, "arguments": marker}}
    messages = [
        {"role": marker, "content": marker, "name": marker},
        {"role": "user", "content": [{"type": "text", "text": marker[:4]}, {"type": "text", "text": marker[4:]}]},
        {
            "role": "assistant",
            "content": marker,
            "tool_calls": [call, {**call, "function": {"arguments": {marker: 1}}}],
        },
        {"role": "tool", "tool_call_id": marker, "content": marker},
    ]
    tools = [{"type": "function", "function": {"name": marker, "description": marker, "parameters": {marker: marker}}}]
    ids = template.to_ids(template.render(messages, tools), BYTES)
    assert [i for i in ids if i >= 256] == frame_ids(messages, tools)


def test_neighbouring_texts_are_encoded_as_one(monkeypatch):
    seen = []
    monkeypatch.setattr(type(BYTES), "encode", lambda self, text, allow_special=False: seen.append(text) or [0])
    template.to_ids(template.render([{"role": "tool", "tool_call_id": "x", "content": "out"}]), BYTES)
    assert seen == ["system", template.DEFAULT_SYSTEM, "\n", "tool", "## Return of x\nout", "assistant"]


def test_an_open_last_message_is_continued():
    messages = [{"role": "system", "content": "s"}, {"role": "assistant", "content": "The answer is"}]
    text = template.to_text(template.render(messages, continue_final=True))
    assert text == "<|im_system|>system<|im_middle|>s<|im_end|><|im_assistant|>assistant<|im_middle|>The answer is"


@pytest.mark.parametrize(
    "content",
    [
        3,
        {"text": "x"},
        [3],
        ["x"],
        [{"type": "image_url", "image_url": {}}],
        [{"type": "text", "text": None}],
        [{"type": "refusal", "text": "x"}],
    ],
)
def test_content_that_is_no_text_is_refused(content):
    with pytest.raises(UserError, match="content"):
        template.render([{"role": "user", "content": content}])


def test_values_that_json_cannot_hold_are_refused():
    with pytest.raises(UserError, match="not representable as JSON"):
        template.render([{"role": "user", "content": ""}], [{"x": float("nan")}])
