"""History ids: the shape, consistency between calls and results, and nothing else changed."""

import re

from hypothesis import given, settings

from kimi_jax.server.call_ids import normalize
from tests.server.dialogues import dialogues


def assistant(*calls):
    return {
        "role": "assistant",
        "tool_calls": [{"id": id_, "function": {"name": name, "arguments": "{}"}} for id_, name in calls],
    }


def tool(id_, content="r"):
    return {"role": "tool", "tool_call_id": id_, "content": content}


def ids(messages):
    found = []
    for message in normalize(messages)[0]:
        found += [call["id"] for call in message.get("tool_calls", [])]
        found += [f"-> {message['tool_call_id']}"] if message["role"] == "tool" else []
    return found


def test_well_formed_ids_stay():
    messages = [assistant(("functions.a:0", "a"), ("functions.b:1", "b")), tool("functions.b:1"), tool("functions.a:0")]
    assert normalize(messages) == (messages, 2)
    assert normalize([assistant(("functions.a:4", "a"))])[1] == 5


def test_foreign_ids_are_renamed_with_their_results():
    messages = [
        assistant(("call_x", "a"), ("toolu_y", "b")),
        tool("toolu_y"),
        tool("call_x"),
        assistant(("search:0", "search")),
        tool("search:0"),
    ]
    assert ids(messages) == [
        *("functions.a:0", "functions.b:1", "-> functions.b:1", "-> functions.a:0"),
        *("functions.search:2", "-> functions.search:2"),
    ]
    assert normalize(messages)[1] == 3


def test_an_id_used_again_in_a_later_turn_means_the_later_call():
    messages = [assistant(("call_0", "a")), tool("call_0"), assistant(("call_0", "a")), tool("call_0")]
    assert ids(messages) == ["functions.a:0", "-> functions.a:0", "functions.a:1", "-> functions.a:1"]
    messages = [assistant(("functions.a:0", "a")), assistant(("functions.a:0", "a")), tool("functions.a:0")]
    assert ids(messages) == ["functions.a:0", "functions.a:1", "-> functions.a:1"]


def test_an_id_used_twice_in_a_turn_is_answered_in_order():
    messages = [assistant(("x", "a"), ("x", "b")), tool("x"), tool("x"), tool("x")]
    assert ids(messages)[2:] == ["-> functions.a:0", "-> functions.b:1", "-> functions.b:1"]


def test_shapes_that_do_not_count_as_well_formed():
    for bad in ("functions.b:0", "functions.a:00", "functions.a:-1", "functions.a", "a:0", "functions.a:0 ", "", None):
        assert ids([assistant((bad, "a"))]) == ["functions.a:0"]


def test_a_mixed_history_never_repeats_an_id():
    messages = [assistant(("functions.a:4", "a")), assistant(("x", "a")), assistant(("functions.a:5", "a"))]
    assert ids(messages) == ["functions.a:4", "functions.a:5", "functions.a:6"]


def test_a_result_without_a_call_keeps_its_id():
    messages = [{"role": "user", "content": "q"}, tool("lost")]
    assert normalize(messages) == (messages, 0)


@settings(max_examples=200, deadline=None)
@given(dialogues)
def test_every_id_has_the_shape_once_and_a_second_pass_changes_nothing(messages):
    renamed, index = normalize(messages)
    calls = [call for m in renamed if m["role"] == "assistant" for call in m.get("tool_calls", [])]
    assert all(re.fullmatch(r"(?s)functions\..+:\d+", call["id"]) for call in calls)
    assert all(call["id"].startswith(f"functions.{call['function']['name']}:") for call in calls)
    assert len({call["id"] for call in calls}) == len(calls) <= index
    again, same_index = normalize(renamed)
    assert (again[0:0], same_index) == ([], index)
    assert [m.get("tool_calls") for m in again] == [m.get("tool_calls") for m in renamed]
    untouched = [{k: v for k, v in m.items() if k not in ("tool_calls", "tool_call_id")} for m in messages]
    assert [{k: v for k, v in m.items() if k not in ("tool_calls", "tool_call_id")} for m in renamed] == untouched
