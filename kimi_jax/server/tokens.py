"""POST /tokenize and /detokenize."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from kimi_jax.data.detokenizer import Detokenizer
from kimi_jax.server.chat import ChatRequest, Message, dialogue_of
from kimi_jax.server.dialogue import prompt_ids
from kimi_jax.server.errors import ApiError
from kimi_jax.server.logprobs import token_text
from kimi_jax.server.parameters import Request
from kimi_jax.server.service import Service, validate


class TokenizeRequest(Request):
    """A text, or messages as in a chat request."""

    prompt: str | None = None
    messages: list[Message] | None = None
    tools: list[dict[str, Any]] | None = None
    add_generation_prompt: bool | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(Request):
    tokens: list[Annotated[int, Field(ge=0)]]


def tokenize(body: Any, service: Service) -> dict[str, Any]:
    request = validate(TokenizeRequest, body)
    service.check_model(request.model)
    if (request.prompt is None) == (request.messages is None):
        raise ApiError(400, "give either a prompt or messages", "prompt")
    if request.prompt is not None:
        ids = service.tokenizer.encode(request.prompt)
    else:
        ids = prompt_ids(dialogue_of(validate(ChatRequest, body)), service.tokenizer)
    found: dict[str, Any] = {"count": len(ids), "max_model_len": service.engine.max_model_len, "tokens": ids}
    if request.return_token_strs:
        found["token_strs"] = [token_text(service.tokenizer, i)[0] for i in ids]
    return found


def detokenize(body: Any, service: Service) -> dict[str, str]:
    """Control tokens give their names."""
    request = validate(DetokenizeRequest, body)
    service.check_model(request.model)
    text = Detokenizer(service.tokenizer, keep=service.tokenizer.special_ids)
    return {"prompt": "".join(text.feed(i) for i in request.tokens) + text.finish()}
