"""Keys, limits, disconnects, metrics, the log, and what a server says when something is wrong."""

import asyncio
import json
import logging
import re
import socket
import threading
import time

import httpx
import openai
import pytest

from tests.server.fake import FakeEngine

ASK = {"model": "kimi", "messages": [{"role": "user", "content": "a secret question"}]}
CHAT = "/v1/chat/completions"


def until(condition, seconds=5):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.01)


def test_models_health_and_unknown_paths(random_server):
    client = random_server.openai()
    assert [model.id for model in client.models.list()] == ["kimi", "kimi-k2"]
    assert client.models.retrieve("kimi-k2").max_model_len == 4096
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt")
    for path in ("/health", "/ready", "/metrics", "/v1/models", "/"):
        assert httpx.get(random_server.url + path).status_code == 200
    assert httpx.get(random_server.url + "/nothing").json()["error"]["message"] == "Not Found"
    wrong_method = httpx.get(random_server.url + CHAT)
    assert (wrong_method.status_code, wrong_method.headers["allow"]) == (405, "POST")
    assert (
        "access-control-allow-origin"
        not in httpx.get(random_server.url + "/health", headers={"origin": "http://x"}).headers
    )


def test_the_description_covers_every_endpoint(random_server):
    description = httpx.get(random_server.url + "/openapi.json").json()
    paths, schemas = description["paths"], description["components"]["schemas"]
    assert {CHAT, "/v1/completions", "/v1/responses", "/v1/messages", "/tokenize"} <= set(paths)
    body = paths[CHAT]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert "messages" in schemas[body["$ref"].rsplit("/", 1)[1]]["properties"]
    references = re.findall(r'"\$ref": "([^"]*)"', json.dumps(description))
    assert references and all(ref.removeprefix("#/components/schemas/") in schemas for ref in references)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b'"x"',
        b'{"model": "kimi", "messages": [{"role": "user", "content": "a\xed\xa0\x80b"}]}',
        json.dumps(ASK).encode("utf-16"),
        b'{"model": "kimi", "messages": [{"role": "user", "content": "a"}], "metadata": {"a": 1e400}}',
        b"\xff",
        b'{"messages": NaN}',
        b"[" * 100_000,
        b'{"model": "\\ud800"}',
        b'{"user": "\\uDC00x"}',
    ],
)
def test_bodies_that_are_no_request(body, random_server):
    for path in (CHAT, "/v1/messages", "/v1/completions", "/v1/responses", "/tokenize"):
        response = httpx.post(random_server.url + path, content=body)
        assert response.status_code == 400 and response.json()["error"]["message"]


def test_keys(serve):
    with serve(FakeEngine(), api_keys=("sk-one", "sk-two")) as server:

        def status(path=CHAT, **headers):
            return server.post(
                path, {**ASK, "max_tokens": 1}, headers={k.replace("_", "-"): v for k, v in headers.items()}
            )

        assert (
            status(authorization="Bearer sk-one").status_code
            == status(authorization="bearer sk-two").status_code
            == 200
        )
        assert status("/v1/messages", x_api_key="sk-two").status_code == 200
        for wrong in ({}, {"authorization": "Bearer sk"}, {"authorization": "sk-one"}, {"x_api_key": "sk-onesk-two"}):
            assert status(**wrong).status_code == 401
        assert status(authorization="Bearer é".encode()).status_code == 401
        assert status().json()["error"]["code"] == "invalid_api_key"
        assert status("/v1/messages").json()["error"]["type"] == "authentication_error"
        assert httpx.get(server.url + "/v1/models").status_code == 401
        assert httpx.get(server.url + "/health").status_code == 200


def test_browsers_ask_without_a_key(serve):
    """What they may do, in a request that never carries one."""
    with serve(FakeEngine(), api_keys=("k",), cors_origins=("http://x.com",)) as server:
        asks = {"origin": "http://x.com", "access-control-request-method": "POST"}
        answer = httpx.options(server.url + CHAT, headers=asks)
        assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (200, "http://x.com")
        refused = server.post(CHAT, ASK, headers={"origin": "http://x.com"})
        assert (refused.status_code, refused.headers["access-control-allow-origin"]) == (401, "http://x.com")


def test_an_empty_key_is_none(serve):
    with serve(FakeEngine(), api_keys=("",)) as server:
        assert server.post(CHAT, ASK).status_code == 401
        assert server.post(CHAT, ASK, headers={"x-api-key": ""}).status_code == 401


def test_large_bodies(serve):
    with serve(FakeEngine(), max_body_bytes=1000) as server:
        large = {**ASK, "user": "x" * 1000}
        assert server.post(CHAT, large).status_code == 413
        assert server.post("/v1/messages", large).json()["error"]["type"] == "request_too_large"
        chunks = (json.dumps(large)[i : i + 100].encode() for i in range(0, 1100, 100))
        assert httpx.post(server.url + CHAT, content=chunks).status_code == 413
        assert server.post(CHAT, {**ASK, "max_tokens": 1}).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_frees_the_engine(stream, serve):
    with serve(FakeEngine(delay=0.02)) as server:
        engine = server.engine
        body = json.dumps({**ASK, "stream": stream, "ignore_eos": True, "n": 2}).encode()
        head = f"POST {CHAT} HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n".encode()
        client = socket.create_connection(("127.0.0.1", int(server.url.rsplit(":", 1)[1])))
        client.sendall(head + body)
        until(lambda: engine.running == 2)
        client.close()
        until(lambda: engine.running == 0, seconds=2)
        assert engine.cancelled == 2
        until(lambda: server.app.state.server.running == 0)


def test_too_many_requests(serve):
    with serve(FakeEngine(delay=0.02), max_requests=1) as server:
        with httpx.stream("POST", server.url + CHAT, json={**ASK, "stream": True, "ignore_eos": True}) as first:
            lines = first.iter_lines()
            next(lines)
            refused = server.post(CHAT, ASK)
            assert refused.status_code == 429 and int(refused.headers["retry-after"]) >= 1
            assert server.post("/v1/messages", {**ASK, "max_tokens": 1}).json()["error"]["type"] == "rate_limit_error"
            with pytest.raises(openai.RateLimitError):
                server.openai().chat.completions.create(**ASK)
        until(lambda: server.app.state.server.running == 0)
        assert server.post(CHAT, {**ASK, "max_tokens": 1}).status_code == 200


def test_errors_of_the_engine(serve):
    class Broken(FakeEngine):
        async def generate(self, job):
            async for event in super().generate(job):
                yield event
                if len(self.seen) > 0 and self.running:
                    raise RuntimeError("inner secret")

    with serve(Broken()) as server:
        response = server.post(CHAT, ASK)
        assert response.status_code == 500 and "secret" not in response.text
        with pytest.raises(openai.APIError, match="error"):
            list(server.openai().chat.completions.create(**ASK, stream=True))
        lines = server.post("/v1/messages", {**ASK, "max_tokens": 9, "stream": True}).text
        assert "event: error" in lines and "secret" not in lines
        until(lambda: server.app.state.server.running == 0)


def test_draining(serve):
    with serve(FakeEngine()) as server:
        server.app.state.server.draining = True
        assert httpx.get(server.url + "/ready").status_code == 503
        refused = server.post(CHAT, ASK)
        assert refused.status_code == 503 and "retry-after" in refused.headers
        assert httpx.get(server.url + "/health").status_code == 200


def test_a_stopped_server_ends_what_it_has_begun(serve):
    server = serve(FakeEngine(delay=0.005))
    found = []
    with server:

        def ask():
            found.append(server.post(CHAT, {**ASK, "max_tokens": 100, "ignore_eos": True}))

        thread = threading.Thread(target=ask)
        thread.start()
        until(lambda: server.engine.running == 1)
    thread.join(10)
    assert found[0].status_code == 200 and found[0].json()["usage"]["completion_tokens"] == 100


def test_metrics(serve):
    with serve(FakeEngine()) as server:
        for stream in (False, True):
            server.post(CHAT, {**ASK, "max_tokens": 5, "ignore_eos": True, "stream": stream})
        server.post(CHAT, {})
        page = httpx.get(server.url + "/metrics").text
        lines = dict(line.rsplit(" ", 1) for line in page.splitlines() if not line.startswith("#"))
        assert float(lines["kimi_generation_tokens_total"]) == 10
        assert float(lines["kimi_prompt_tokens_total"]) == 2 * len(server.engine.seen[0].prompt_ids)
        assert float(lines["kimi_time_to_first_token_seconds_count"]) == 2
        assert float(lines["kimi_inter_token_seconds_count"]) == 8
        assert float(lines["kimi_kv_pages_total"]) == 300
        assert float(lines['kimi_http_requests_total{path="/v1/chat/completions",status="200"}']) == 2
        assert float(lines['kimi_http_requests_total{path="/v1/chat/completions",status="400"}']) == 1


def test_the_access_log_has_no_text_of_the_prompt(random_server, caplog):
    with caplog.at_level(logging.INFO, logger="kimi_jax.access"):
        response = random_server.post(CHAT + "?key=query", {**ASK, "max_tokens": 2})
        until(lambda: caplog.records)
    line = json.loads(caplog.records[-1].message)
    assert (line["method"], line["path"], line["status"]) == ("POST", CHAT, 200)
    assert line["prompt_tokens"] > 5 and line["ms"] > 0 and line["id"] == response.headers["x-request-id"]
    assert "secret" not in caplog.text and "query" not in caplog.text


def test_a_hundred_streams_at_once_equal_one_by_one(serve):
    with serve(FakeEngine()) as server:
        client = openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="x", timeout=60)

        async def ask(i):
            messages = [{"role": "user", "content": f"question {i}"}]
            request = {"model": "kimi", "messages": messages, "max_tokens": 20, "seed": i}
            stream = await client.chat.completions.create(**request, stream=True)
            return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

        async def both():
            together = await asyncio.gather(*(ask(i) for i in range(100)))
            return together, [await ask(i) for i in range(0, 100, 9)]

        together, alone = asyncio.run(both())
        assert together[::9] == alone and len(set(together)) > 90
        assert server.engine.running == 0 and server.engine.cancelled == 0
