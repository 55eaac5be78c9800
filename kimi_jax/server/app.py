"""The HTTP application: OpenAI's and Anthropic's endpoints over one engine, and what operating it needs."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import logging
import math
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect

from kimi_jax.errors import UserError
from kimi_jax.server import tokens
from kimi_jax.server.answer import as_api_error, generate_all
from kimi_jax.server.chat import ChatRequest
from kimi_jax.server.chat_answer import ChatCall
from kimi_jax.server.completions import CompletionCall, CompletionRequest
from kimi_jax.server.disconnect import EventStream, while_connected
from kimi_jax.server.errors import ApiError
from kimi_jax.server.gate import Gate, Record, error_body
from kimi_jax.server.messages import CountRequest, MessagesRequest
from kimi_jax.server.messages_answer import MessagesCall, count_tokens
from kimi_jax.server.metrics import Metrics
from kimi_jax.server.responses import Dialogues, ResponsesRequest
from kimi_jax.server.responses_answer import ResponsesCall
from kimi_jax.server.service import Call, Parts, Service, sse

log = logging.getLogger("kimi_jax.server")
BODIES = (ChatRequest, CompletionRequest, ResponsesRequest, MessagesRequest, CountRequest)
BODIES += (tokens.TokenizeRequest, tokens.DetokenizeRequest)
_REFERENCES, _SCHEMAS = models_json_schema(
    [(model, "validation") for model in BODIES], ref_template="#/components/schemas/{model}"
)
PAGE = Path(__file__).with_name("page.html")
PAGE_POLICY = "default-src 'none'; connect-src 'self'; script-src 'unsafe-inline'; style-src 'unsafe-inline'"


@dataclass(frozen=True)
class Settings:
    api_keys: tuple[str, ...] = ()  # none: everybody may ask
    max_requests: int = 256  # at once; more are answered 429
    max_body_bytes: int = 32 << 20
    cors_origins: tuple[str, ...] = ()  # none: CORS is off


class Server:
    """The state of one application: what is running, and whether it still takes requests."""

    def __init__(self, service: Service, settings: Settings):
        self.service, self.settings = service, settings
        self.metrics = Metrics(service.engine.load)
        self.dialogues = Dialogues()
        self.running = 0
        self.draining = False

    @contextlib.contextmanager
    def slot(self):
        if self.draining:
            raise ApiError(503, "The server is shutting down.")
        if self.running >= self.settings.max_requests:
            raise ApiError(
                429, f"There are {self.running} requests already; try again later.", code="too_many_requests"
            )
        self.running += 1
        try:
            yield
        finally:
            self.running -= 1

    async def answer(self, request: Request, make: Callable[[Any, Service], Call]) -> Response:
        body = await read_json(request)
        with contextlib.ExitStack() as stack:
            stack.enter_context(self.slot())
            call = await asyncio.to_thread(make, body, self.service)
            record: Record = request.state.record
            prompt_tokens = len(call.jobs[0].prompt_ids)
            record.fields |= {
                "prompt_tokens": prompt_tokens,
                "answers": sum(job.n for job in call.jobs),
                "stream": call.stream,
            }
            parts = generate_all(self.service.engine, self.service.tokenizer, call.jobs)
            parts = self.metrics.observe(parts, prompt_tokens, record.began)
            if call.stream:
                return EventStream(self._events(call, parts, request.url.path), stack.pop_all().close)
            async with contextlib.aclosing(parts):
                return JSONResponse(await while_connected(request.receive, call.body(parts)))

    async def _events(self, call: Call, parts: Parts, path: str) -> AsyncGenerator[bytes, None]:
        async with contextlib.aclosing(parts):
            try:
                async for event in call.events(parts):
                    yield event
            except Exception as error:
                if not isinstance(error, ApiError | UserError):
                    log.exception("an answer failed")
                named = "error" if path.startswith(("/v1/messages", "/v1/responses")) else None
                yield sse(error_body(path, as_api_error(error)), named)


async def read_json(request: Request) -> Any:
    body = await request.body()
    try:
        value = json.loads(body.decode("utf-8-sig"), parse_constant=_no_constant, parse_float=_finite)
        if b"\\u" in body:
            json.dumps(value, ensure_ascii=False).encode()  # fails for half a surrogate pair
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is not valid JSON: {error}") from None
    return value


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _finite(text: str) -> float:
    if math.isinf(value := float(text)):
        raise ValueError(f"{text} is too large")
    return value


def create_app(service: Service, settings: Settings | None = None) -> FastAPI:
    settings = settings or Settings()
    server = Server(service, settings)
    app = FastAPI(title="kimi_jax", docs_url=None, redoc_url=None)
    app.state.server = server
    _add_answers(app, server)
    _add_operations(app, server)
    _add_errors(app)
    _add_schemas(app)
    app.add_middleware(Gate, settings.api_keys, settings.max_body_bytes, server.metrics.answered)  # type: ignore[arg-type]
    if settings.cors_origins:  # before the gate: a browser's question whether it may ask carries no key
        app.add_middleware(
            CORSMiddleware, allow_origins=list(settings.cors_origins), allow_methods=["*"], allow_headers=["*"]
        )
    return app


def _described(model: type[BaseModel]) -> dict[str, Any]:
    """The request's schema, for the OpenAPI description."""
    content = {"application/json": {"schema": _REFERENCES[model, "validation"]}}
    return {"requestBody": {"required": True, "content": content}}


def _add_schemas(app: FastAPI) -> None:
    """Handlers read bodies themselves, so that FastAPI does not know the schemas that ``_described`` refers to."""
    describe = app.openapi

    def openapi() -> dict[str, Any]:
        found = describe()
        found.setdefault("components", {}).setdefault("schemas", {}).update(_SCHEMAS["$defs"])
        return found

    app.openapi = openapi  # type: ignore[method-assign]


def _add_answers(app: FastAPI, server: Server) -> None:
    @app.post("/v1/chat/completions", openapi_extra=_described(ChatRequest))
    async def chat_completions(request: Request) -> Response:
        return await server.answer(request, ChatCall)

    @app.post("/v1/completions", openapi_extra=_described(CompletionRequest))
    async def completions(request: Request) -> Response:
        return await server.answer(request, CompletionCall)

    @app.post("/v1/responses", openapi_extra=_described(ResponsesRequest))
    async def responses(request: Request) -> Response:
        return await server.answer(request, functools.partial(ResponsesCall, dialogues=server.dialogues))

    @app.post("/v1/messages", openapi_extra=_described(MessagesRequest))
    async def messages(request: Request) -> Response:
        return await server.answer(request, MessagesCall)

    def plain(path: str, model: Any, make: Callable[[Any, Service], Any]) -> None:
        @app.post(path, name=path, openapi_extra=_described(model))
        async def handler(request: Request) -> Any:
            with server.slot():
                return JSONResponse(await asyncio.to_thread(make, await read_json(request), server.service))

    plain("/v1/messages/count_tokens", CountRequest, count_tokens)
    plain("/tokenize", tokens.TokenizeRequest, tokens.tokenize)
    plain("/detokenize", tokens.DetokenizeRequest, tokens.detokenize)


def _add_operations(app: FastAPI, server: Server) -> None:
    service = server.service

    def model(name: str) -> dict[str, Any]:
        head = {"id": name, "object": "model", "created": service.created, "owned_by": "kimi_jax"}
        return {**head, "max_model_len": service.engine.max_model_len}

    @app.get("/v1/models")
    async def models() -> Any:
        return {"object": "list", "data": [model(name) for name in service.names]}

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str) -> Any:
        return model(service.check_model(name))

    @app.get("/health")
    async def health() -> Any:
        service.engine.load()
        return {"status": "ok"}

    @app.get("/ready")
    async def ready() -> Any:
        return JSONResponse({"ready": not server.draining}, 503 if server.draining else 200)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(server.metrics.page(), media_type="text/plain; version=0.0.4")

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        return HTMLResponse(PAGE.read_text(encoding="utf-8"), headers={"content-security-policy": PAGE_POLICY})


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(ApiError)
    async def api_error(request: Request, error: ApiError) -> Response:
        headers = {"retry-after": "1"} if error.status in (429, 503) else None
        return JSONResponse(error_body(request.url.path, error), error.status, headers)

    @app.exception_handler(UserError)
    async def user_error(request: Request, error: UserError) -> Response:
        return await api_error(request, ApiError(400, str(error)))

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        body = error_body(request.url.path, ApiError(error.status_code, str(error.detail)))
        return JSONResponse(body, error.status_code, error.headers)  # Allow, beside 405

    @app.exception_handler(ClientDisconnect)
    async def gone(request: Request, error: ClientDisconnect) -> Response:
        return Response(status_code=499)

    @app.exception_handler(Exception)
    async def unexpected(request: Request, error: Exception) -> Response:
        return await api_error(request, as_api_error(error))
