"""What a request handler works with, and what it makes of a request."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import to_json

from kimi_jax.data.tokenizer import Tokenizer
from kimi_jax.server.answer import Part
from kimi_jax.server.engine import Engine, Job
from kimi_jax.server.errors import ApiError
from kimi_jax.server.grammar import Vocabulary

Parts = AsyncGenerator[tuple[int, Part], None]


@dataclass
class Service:
    engine: Engine
    tokenizer: Tokenizer
    names: Sequence[str]  # of the model, the first is its own
    created: int = field(default_factory=lambda: int(time.time()))
    vocabulary: Vocabulary = field(init=False)

    def __post_init__(self):
        self.vocabulary = Vocabulary(self.tokenizer, self.engine.vocab_size)

    def check_model(self, name: str) -> str:
        if not name:
            return self.names[0]
        if name not in self.names:
            raise ApiError(
                404, f"The model {name!r} does not exist; there is {self.names[0]!r}", "model", "model_not_found"
            )
        return name


class Call(Protocol):
    """A request that has been understood: what to generate, and how to say it."""

    @property
    def jobs(self) -> Sequence[Job]: ...

    @property
    def stream(self) -> bool: ...

    async def body(self, parts: Parts) -> dict[str, Any]:
        """The whole answer."""
        ...

    def events(self, parts: Parts) -> AsyncIterator[bytes]:
        """The answer as server-sent events."""
        ...


Model = TypeVar("Model", bound=BaseModel)
_UNION_TAGS = {"str", "int", "float", "bool", "dict", "constrained-str", "constrained-int", "none"}


def validate(model: type[Model], body: Any) -> Model:
    """``body`` as ``model``; what is wrong in it becomes a 400 that names the field."""
    if not isinstance(body, dict):
        raise ApiError(400, "the body must be a JSON object")
    try:
        return model.model_validate(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        raise ApiError(400, first["msg"], _path(first["loc"]) or None) from None


def _path(location: tuple[int | str, ...]) -> str:
    path = ""
    for step in location:
        if isinstance(step, int):
            path += f"[{step}]"
        elif step.isidentifier() and step not in _UNION_TAGS and not step[0].isupper():
            path += f".{step}" if path else step
    return path


def new_id(prefix: str) -> str:
    return f"{prefix}{uuid.uuid4().hex}"


def sse(data: Any, event: str | None = None) -> bytes:
    text = data.encode() if isinstance(data, str) else to_json(data)
    return b"event: %b\ndata: %b\n\n" % (event.encode(), text) if event else b"data: %b\n\n" % text
