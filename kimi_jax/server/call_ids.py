"""Tool-call ids in a history: ``functions.NAME:IDX``, IDX counting the calls of the dialogue from 0.

The format prints whatever ids it is given, and the model imitates them. So ids of another shape are renamed, in the
calls and in the results that answer them; those that have the shape stay, because the model wrote them.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Sequence
from typing import Any

from kimi_jax.server.template import Message

_ID = re.compile(r"functions\.(.*):(0|[1-9][0-9]*)", re.DOTALL)


def normalize(messages: Sequence[Message]) -> tuple[list[Message], int]:
    """The messages with well-formed ids, each used once, and the index of the next call.

    A result answers the latest turn that used its id; where one turn used it twice, the results come in call order.
    A result that answers no call keeps its id.
    """
    renamed: list[Message] = []
    used: set[str] = set()
    answers: dict[str, deque[str]] = {}
    index = 0
    for message in messages:
        calls = message.get("tool_calls") if message["role"] == "assistant" else None
        if calls:
            turn: dict[str, deque[str]] = {}
            new_calls: list[dict[str, Any]] = []
            for call in calls:
                new, index = _next_id(call, index, used)
                used.add(new)
                turn.setdefault(call.get("id") or "", deque()).append(new)
                new_calls.append({**call, "id": new})
            answers |= turn
            message = {**message, "tool_calls": new_calls}
        elif message["role"] == "tool":
            ids = answers.get(message.get("tool_call_id") or "")
            if ids:
                new = ids.popleft() if len(ids) > 1 else ids[0]
                message = {**message, "tool_call_id": new}
        renamed.append(message)
    return renamed, index


def _next_id(call: dict[str, Any], index: int, used: set[str]) -> tuple[str, int]:
    """The id of ``call``, its own if it may stay, and the index after it."""
    name, old = call["function"]["name"], call.get("id") or ""
    match = _ID.fullmatch(old)
    if match and match[1] == name and old not in used and len(match[2]) <= 9:
        return old, max(index, int(match[2])) + 1
    return f"functions.{name}:{index}", index + 1
