"""POST /v1/messages, Anthropic's form: the request. Its temperature is scaled by 0.6, as Moonshot's endpoint does."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

from kimi_jax.inference.request import Sampling
from kimi_jax.server.dialogue import Dialogue, Format, plan
from kimi_jax.server.engine import Job
from kimi_jax.server.errors import ApiError
from kimi_jax.server.parameters import Request, StopText, Strict, TopP, nucleus, token_limit
from kimi_jax.server.service import Service

TEMPERATURE_SCALE = 0.6
_IGNORED = {"thinking", "redacted_thinking"}  # there is no thinking channel


class Block(Strict):
    type: str
    text: str | None = None
    id: str | None = None
    name: str | None = None
    input: dict[str, Any] | None = None
    tool_use_id: str | None = None
    content: str | list[dict[str, Any]] | None = None


class Message(Strict):
    role: Literal["user", "assistant"]
    content: str | list[Block]


class Tool(Strict):
    name: str
    description: str | None = None
    input_schema: dict[str, Any] | None = None
    type: str | None = None
    strict: bool | None = None


class ToolChoice(Strict):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class TextBlock(Strict):
    type: Literal["text"]
    text: str


class OutputConfig(Strict):
    format: dict[str, Any] | None = None


class CountRequest(Request):
    messages: Annotated[list[Message], Field(min_length=1)]
    system: str | list[TextBlock] | None = None
    tools: list[Tool] | None = None
    tool_choice: ToolChoice | None = None
    output_config: OutputConfig | None = None


class MessagesRequest(CountRequest):
    max_tokens: Annotated[int, Field(ge=1)]
    temperature: Annotated[float, Field(ge=0, le=1)] | None = None
    top_p: TopP | None = None
    top_k: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    stop_sequences: Annotated[list[StopText], Field(max_length=64)] | None = None
    stream: bool | None = None


def dialogue_of(request: CountRequest) -> Dialogue:
    """A last message of the assistant is the beginning of the answer."""
    system = request.system
    messages: list[dict[str, Any]] = []
    if system:
        text = system if isinstance(system, str) else "".join(block.text for block in system)
        messages.append({"role": "system", "content": text})
    for i, message in enumerate(request.messages):
        blocks = message.content
        if isinstance(blocks, str):
            messages.append({"role": message.role, "content": blocks})
        elif message.role == "assistant":
            messages.append(_assistant(blocks, f"messages[{i}].content"))
        else:
            messages += _user(blocks, f"messages[{i}].content")
    choice = request.tool_choice or ToolChoice(type="auto")
    if choice.type == "tool" and not choice.name:
        raise ApiError(400, "a tool_choice of type tool needs a name", "tool_choice.name")
    return Dialogue(
        messages=messages,
        tools=[_tool(tool, i) for i, tool in enumerate(request.tools or ())],
        tool_choice={"auto": "auto", "none": "none"}.get(choice.type, "required"),  # type: ignore[arg-type]
        allowed=frozenset({choice.name}) if choice.type == "tool" and choice.name else None,
        parallel=choice.type != "tool" and not choice.disable_parallel_tool_use,
        format=_format(request.output_config and request.output_config.format),
        continue_final=messages[-1]["role"] == "assistant" and "tool_calls" not in messages[-1],
    )


def _format(value: dict[str, Any] | None) -> Format | None:
    match value:
        case None:
            return None
        case {"type": "json_schema", "schema": schema}:
            return Format(schema=schema, param="output_config.format.schema")
    raise ApiError(400, "a format must be of type json_schema, with a schema", "output_config.format")


def _tool(tool: Tool, i: int) -> dict[str, Any]:
    if tool.type not in (None, "custom") or tool.input_schema is None:
        raise ApiError(400, "only tools with an input_schema of their own can be used", f"tools[{i}]")
    function: dict[str, Any] = {"name": tool.name, "parameters": tool.input_schema}
    if tool.description is not None:
        function["description"] = tool.description
    if tool.strict is not None:
        function["strict"] = tool.strict
    return {"type": "function", "function": function}


def _said(block: Block, where: str) -> str:
    if block.text is None:
        raise ApiError(400, "a text block needs its text", f"{where}.text")
    return block.text


def _assistant(blocks: Sequence[Block], where: str) -> dict[str, Any]:
    texts, calls = [], []
    for j, block in enumerate(blocks):
        if block.type == "text":
            texts.append(_said(block, f"{where}[{j}]"))
        elif block.type == "tool_use":
            if not block.name:
                raise ApiError(400, "a tool_use block needs a name", f"{where}[{j}].name")
            calls.append({"id": block.id or "", "function": {"name": block.name, "arguments": block.input or {}}})
        elif block.type not in _IGNORED:
            raise ApiError(400, f"the assistant cannot have said a block of type {block.type!r}", f"{where}[{j}].type")
    return {"role": "assistant", "content": "".join(texts), **({"tool_calls": calls} if calls else {})}


def _user(blocks: Sequence[Block], where: str) -> Iterator[dict[str, Any]]:
    """Results and the texts between them, each its own turn, in order."""
    texts: list[str] = []
    for j, block in enumerate(blocks):
        if block.type == "text":
            texts.append(_said(block, f"{where}[{j}]"))
        elif block.type == "tool_result":
            if texts:
                yield {"role": "user", "content": "".join(texts)}
                texts = []
            if not block.tool_use_id:
                raise ApiError(400, "a tool_result needs a tool_use_id", f"{where}[{j}].tool_use_id")
            yield {"role": "tool", "tool_call_id": block.tool_use_id, "content": block.content}
        else:
            raise ApiError(400, f"this model reads text only, no {block.type!r}", f"{where}[{j}].type")
    if texts or not blocks:
        yield {"role": "user", "content": "".join(texts)}


def job_of(request: MessagesRequest, service: Service) -> tuple[Job, bool]:
    """The job, and whether the answer may hold calls."""
    planned = plan(dialogue_of(request), service.tokenizer, service.vocabulary)
    sampling = Sampling(
        temperature=TEMPERATURE_SCALE * (1.0 if request.temperature is None else request.temperature),
        top_k=request.top_k or 0,
        top_p=nucleus(request.top_p),
    )
    job = Job(
        planned.prompt_ids,
        token_limit(request.max_tokens, len(planned.prompt_ids), service.engine.max_model_len),
        sampling,
        service.tokenizer.stop_ids,
        planned.constraint,
        stops=tuple(request.stop_sequences or ()),
    )
    return job, planned.calls
