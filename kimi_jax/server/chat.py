"""POST /v1/chat/completions: the request."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from kimi_jax.inference.request import MAX_LOGPROBS
from kimi_jax.server.dialogue import Dialogue, Format, plan
from kimi_jax.server.engine import Job
from kimi_jax.server.errors import ApiError
from kimi_jax.server.parameters import SamplingFields, StreamOptions, Strict, token_limit
from kimi_jax.server.service import Service

DEFAULT_TEMPERATURE = 0.6


class Function(Strict):
    name: Annotated[str, Field(min_length=1)]
    arguments: str | dict[str, Any] = ""


class ToolCall(Strict):
    id: str | None = None
    function: Function


class Message(Strict):
    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[dict[str, Any]] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    partial: bool | None = None  # the last message is to be continued


class ChatRequest(SamplingFields):
    messages: Annotated[list[Message], Field(min_length=1)]
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    response_format: dict[str, Any] | None = None
    structured_outputs: dict[str, Any] | None = None  # {"json" | "regex" | "choice": ...}
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    stream_options: StreamOptions | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    functions: Any = None
    function_call: Any = None


def dialogue_of(request: ChatRequest) -> Dialogue:
    if request.functions or request.function_call:
        raise ApiError(400, "functions and function_call are no longer there: use tools and tool_choice", "functions")
    for i, message in enumerate(request.messages):
        if message.role == "tool" and not message.tool_call_id:
            raise ApiError(400, "a tool message needs the tool_call_id that it answers", f"messages[{i}].tool_call_id")
    mode, allowed, parallel = tool_choice(request.tool_choice, request.parallel_tool_calls)
    return Dialogue(
        messages=[message.model_dump(exclude_none=True) for message in request.messages],
        tools=request.tools or (),
        tool_choice=mode,
        allowed=allowed,
        parallel=parallel,
        format=response_format(request.response_format) or structured_outputs(request.structured_outputs),
        continue_final=bool(request.continue_final_message or request.messages[-1].partial),
        add_generation_prompt=request.add_generation_prompt is not False,
    )


def tool_choice(
    value: str | dict[str, Any] | None, parallel: bool | None
) -> tuple[Literal["auto", "none", "required"], frozenset[str] | None, bool]:
    """The mode, the names that may be called if only some may, and whether several calls may come.

    Both OpenAI endpoints' forms are understood.
    """
    parallel = parallel is not False
    match value:
        case None | "auto" | "none" | "required":
            return value or "auto", None, parallel
        case {"type": "function", "function": {"name": str(name)}} | {"type": "function", "name": str(name)}:
            return "required", frozenset({name}), False
        case {"type": "allowed_tools"}:
            inner = value.get("allowed_tools", value)
            match inner:
                case {"mode": "auto" | "required" as mode, "tools": list(tools)}:
                    return mode, frozenset(_tool_name(tool) for tool in tools), parallel
    raise ApiError(
        400, "tool_choice must be 'auto', 'none', 'required', or name a function or allowed tools", "tool_choice"
    )


def _tool_name(tool: Any) -> str:
    match tool:
        case {"function": {"name": str(name)}} | {"name": str(name)}:
            return name
    raise ApiError(400, "an allowed tool must name a function", "tool_choice")


def response_format(value: Any, param: str = "response_format") -> Format | None:
    match value:
        case None | {"type": "text"}:
            return None
        case {"type": "json_object"}:
            return Format(schema={"type": "object"})
        case {"type": "json_schema", "json_schema": {"schema": schema}}:
            return Format(schema=schema, param=f"{param}.json_schema.schema")
        case {"type": "json_schema", "json_schema": {}}:
            return Format(schema={})
        case {"type": "regex", "pattern": str(pattern)}:
            return Format(regex=pattern, param=f"{param}.pattern")
    raise ApiError(400, f"{param} must be of type text, json_object, json_schema or regex", param)


def structured_outputs(value: dict[str, Any] | None) -> Format | None:
    param = "structured_outputs"
    match value:
        case None:
            return None
        case {"json": dict(schema)}:
            return Format(schema=schema, param=param)
        case {"regex": str(pattern)}:
            return Format(regex=pattern, param=param)
        case {"choice": [*texts]} if texts and all(isinstance(text, str) and text for text in texts):
            return Format(choice=tuple(texts), param=param)
    raise ApiError(400, "structured_outputs must hold json (a schema), regex (a string) or choice (texts)", param)


def job_of(request: ChatRequest, service: Service) -> tuple[Job, bool]:
    """The job, and whether the answers may hold calls."""
    if request.top_logprobs is not None and not request.logprobs:
        raise ApiError(400, "top_logprobs needs logprobs: true", "top_logprobs")
    planned = plan(dialogue_of(request), service.tokenizer, service.vocabulary)
    wanted = request.max_completion_tokens or request.max_tokens
    scored = (request.top_logprobs or 0) if request.logprobs else None
    job = Job(
        planned.prompt_ids,
        token_limit(wanted, len(planned.prompt_ids), service.engine.max_model_len),
        request.sampling(service.engine.vocab_size, DEFAULT_TEMPERATURE, scored),
        request.stop_ids(service.tokenizer.stop_ids),
        planned.constraint,
        n=request.n or 1,
        stops=tuple(request.stop),
    )
    return job, planned.calls
