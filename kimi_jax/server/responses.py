"""POST /v1/responses: the request. Items of text and function calls; dialogues are kept for a while to go on with."""

from __future__ import annotations

import dataclasses
import json
from collections import OrderedDict
from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import Field

from kimi_jax.inference.request import MAX_LOGPROBS, Sampling
from kimi_jax.server.chat import DEFAULT_TEMPERATURE, response_format, tool_choice
from kimi_jax.server.dialogue import Dialogue, Format, plan
from kimi_jax.server.engine import Job
from kimi_jax.server.errors import ApiError
from kimi_jax.server.parameters import Request, TopP, nucleus, token_limit
from kimi_jax.server.service import Service

Item = dict[str, Any]
_ROLES = {"user", "assistant", "system", "developer"}
_TEXTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}  # field of a part, by type


class ResponsesRequest(Request):
    input: str | list[Item] | None = None
    instructions: str | None = None
    previous_response_id: str | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    text: dict[str, Any] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: TopP | None = None
    max_output_tokens: Annotated[int, Field(ge=1)] | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    include: list[str] | None = None
    metadata: dict[str, Any] | None = None
    background: bool | None = None
    store: bool | None = None
    stream: bool | None = None
    user: str | None = None


class Dialogues:
    """The items of the latest responses, for ``previous_response_id``; the oldest are forgotten."""

    def __init__(self, capacity: int = 256 << 20):
        self._texts: OrderedDict[str, bytes] = OrderedDict()
        self._room = capacity  # bytes

    def put(self, id_: str, items: list[Item]) -> None:
        self._texts[id_] = json.dumps(items).encode()
        self._room -= len(self._texts[id_])
        while self._room < 0:
            self._room += len(self._texts.popitem(last=False)[1])

    def get(self, id_: str) -> list[Item]:
        if id_ not in self._texts:
            raise ApiError(404, f"Previous response {id_!r} not found.", "previous_response_id")
        return json.loads(self._texts[id_])


def items_of(request: ResponsesRequest, dialogues: Dialogues) -> list[Item]:
    """All items so far, the earlier responses' first."""
    text = request.input
    new = [{"role": "user", "content": text}] if isinstance(text, str) else text or []
    before = dialogues.get(request.previous_response_id) if request.previous_response_id else []
    if not before and not new:
        raise ApiError(400, "the input is empty", "input")
    return [*before, *new]


def dialogue_of(request: ResponsesRequest, items: Sequence[Item]) -> Dialogue:
    if request.background:
        raise ApiError(400, "responses cannot run in the background", "background")
    mode, allowed, parallel = tool_choice(request.tool_choice, request.parallel_tool_calls)
    system = [{"role": "system", "content": request.instructions}] if request.instructions else []
    return Dialogue(
        messages=system + _messages(items),
        tools=[_tool(tool, i) for i, tool in enumerate(request.tools or ())],
        tool_choice=mode,
        allowed=allowed,
        parallel=parallel,
        format=_format(request.text),
    )


def _messages(items: Sequence[Item]) -> list[dict[str, Any]]:
    """Calls join the assistant's turn that they follow."""
    found: list[dict[str, Any]] = []
    open_turn = False  # whether the last message may still get calls
    for i, item in enumerate(items):
        where = f"input[{i}]"
        kind = item.get("type", "message")
        if kind == "message":
            if str(item.get("role")) not in _ROLES:
                raise ApiError(400, f"a message's role must be one of {', '.join(sorted(_ROLES))}", f"{where}.role")
            found.append({"role": item["role"], "content": _text(item.get("content"), f"{where}.content")})
            open_turn = item["role"] == "assistant"
        elif kind == "function_call":
            name, call_id = item.get("name"), item.get("call_id")
            if not isinstance(name, str) or not name or not isinstance(call_id, str):
                raise ApiError(400, "a function_call needs a name and a call_id", where)
            arguments = item.get("arguments") or ""
            if not isinstance(arguments, str | dict):
                raise ApiError(400, "arguments must be a string of JSON, or an object", f"{where}.arguments")
            if not open_turn:
                found.append({"role": "assistant", "content": None})
            call = {"id": call_id, "function": {"name": name, "arguments": arguments}}
            found[-1].setdefault("tool_calls", []).append(call)
            open_turn = True
        elif kind == "function_call_output":
            if not isinstance(item.get("call_id"), str):
                raise ApiError(400, "a function_call_output needs the call_id that it answers", f"{where}.call_id")
            text = _text(item.get("output"), f"{where}.output")
            found.append({"role": "tool", "tool_call_id": item["call_id"], "content": text})
            open_turn = False
        elif kind != "reasoning":
            raise ApiError(400, f"items of type {kind!r} are not supported", f"{where}.type")
    return found


def _text(content: Any, where: str) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, list):
        raise ApiError(400, "content must be a string or a list of parts", where)
    texts = []
    for j, part in enumerate(content):
        field = _TEXTS.get(str(part.get("type", "text"))) if isinstance(part, dict) else None
        text = part.get(field) if field else None
        if not isinstance(text, str):
            raise ApiError(400, "this model reads text only", f"{where}[{j}].type")
        texts.append(text)
    return "".join(texts)


def _tool(tool: dict[str, Any], i: int) -> dict[str, Any]:
    if tool.get("type") != "function":
        raise ApiError(400, "only tools of type 'function' are supported", f"tools[{i}].type")
    fields = ("name", "description", "parameters", "strict")
    return {"type": "function", "function": {key: tool[key] for key in fields if tool.get(key) is not None}}


def _format(text: dict[str, Any] | None) -> Format | None:
    """The fields of a json_schema stand beside its type here."""
    given = (text or {}).get("format")
    if isinstance(given, dict) and given.get("type") == "json_schema":
        given = {"type": "json_schema", "json_schema": {key: given[key] for key in given.keys() - {"type"}}}
    found = response_format(given, "text.format")
    return dataclasses.replace(found, param="text.format.schema") if found else None


def job_of(request: ResponsesRequest, items: Sequence[Item], service: Service) -> tuple[Job, bool]:
    """The job, and whether the answer may hold calls."""
    planned = plan(dialogue_of(request, items), service.tokenizer, service.vocabulary)
    scored = request.top_logprobs or "message.output_text.logprobs" in (request.include or ())
    sampling = Sampling(
        temperature=DEFAULT_TEMPERATURE if request.temperature is None else request.temperature,
        top_p=nucleus(request.top_p),
        logprobs=(request.top_logprobs or 0) if scored else None,
    )
    limit = token_limit(request.max_output_tokens, len(planned.prompt_ids), service.engine.max_model_len)
    job = Job(planned.prompt_ids, limit, sampling, service.tokenizer.stop_ids, planned.constraint)
    return job, planned.calls
