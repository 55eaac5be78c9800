"""Prompts from a file of JSON lines, and a line for each of them with what it was answered.

    {"prompt": TEXT or [token ids], "id": anything, "max_tokens": 64, "temperature": 0.7, "n": 2, "stop": ["\\n\\n"]}
    {"line": 1, "id": ..., "prompt_tokens": 5, "cached_tokens": 0,
     "outputs": [{"text": TEXT, "tokens": [...], "finish_reason": "stop" or "length"}, ...]}

Only the prompt is needed; what else is left out, or null, has the default of the command. Answers come in the order of
the lines. The whole file is checked before anything runs.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from kimi_jax.config import ModelConfig
from kimi_jax.data.tokenizer import Tokenizer
from kimi_jax.errors import UserError
from kimi_jax.inference.cache import PAGE_SIZE
from kimi_jax.inference.limits import Limits
from kimi_jax.inference.request import Event, Request

SAMPLING = (
    "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty",
    "logit_bias", "seed",
)  # fmt: skip
FIELDS = ("prompt", "id", "max_tokens", "stop", "n", "priority", *SAMPLING)
CACHE_TOKENS = 65536  # unless a request, or the command, asks for more


class Job(NamedTuple):
    """``request`` has a placeholder for the prompt if that is a ``text`` which nobody has encoded yet."""

    line: int  # 0: none
    id: Any
    text: str | None
    request: Request


def read(path: Path, default: Request) -> list[Job]:
    """The jobs of a file; what a line leaves out is as in ``default``."""
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}") from error
    jobs = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                jobs.append(_job(number, json.loads(line), default))
            except json.JSONDecodeError as error:
                raise UserError(f"{path}, line {number}: no JSON ({error.msg} at column {error.colno})") from error
            except (ValueError, RecursionError) as error:  # a UserError; a number of 5,000 digits; 100,000 brackets
                raise UserError(f"{path}, line {number}: {error}") from error
    if not jobs:
        raise UserError(f"{path} has no lines: give one JSON object with a prompt on each")
    return jobs


def _job(number: int, line: Any, default: Request) -> Job:
    if not isinstance(line, dict):
        raise UserError('not a JSON object such as {"prompt": "The sky"}')
    if unknown := [name for name in line if name not in FIELDS]:
        raise UserError(f"unknown field {unknown[0]!r}; there are {', '.join(FIELDS)}")
    given = {name: value for name, value in line.items() if value is not None}
    prompt = given.get("prompt")
    if not isinstance(prompt, str | list):
        raise UserError("prompt must be a text or a list of token ids")
    if isinstance(given.get("stop"), str):
        given["stop"] = [given["stop"]]
    if "logit_bias" in given:
        given["logit_bias"] = _bias(given["logit_bias"])
    sampling = {name: given.pop(name) for name in SAMPLING if name in given}
    text = prompt if isinstance(prompt, str) else None
    given["prompt"] = (0,) if text is not None else prompt
    given["sampling"] = dataclasses.replace(default.sampling, **sampling)
    id = given.pop("id", None)
    try:
        json.dumps(id, allow_nan=False)
    except ValueError:  # what Python reads as JSON, but others would not read in the answer
        raise UserError("id holds NaN or infinity, which is no JSON") from None
    return Job(number, id, text, dataclasses.replace(default, **given))


def _bias(given: Any) -> dict[int, float]:
    if not isinstance(given, dict) or not all(key.isascii() and key.isdecimal() for key in given):
        raise UserError(f"logit_bias must map token ids to numbers, not be {given!r}")
    return {int(key): value for key, value in given.items()}


def encode(jobs: Iterable[Job], tokenizer: Tokenizer, cfg: ModelConfig) -> list[Job]:
    """The jobs with prompts of ids; an empty text becomes [BOS]. Answers end at the tokenizer's own stop tokens."""
    no_text = range(tokenizer.vocab_size, cfg.vocab_size)  # the model's vocabulary may be padded
    stop_ids = frozenset([*tokenizer.stop_ids, *no_text])
    found = []
    for job in jobs:
        ids = job.request.prompt if job.text is None else tokenizer.encode(job.text) or [tokenizer.bos]
        found.append(job._replace(request=dataclasses.replace(job.request, prompt=tuple(ids), stop_ids=stop_ids)))
    return found


def check(jobs: Iterable[Job], limits: Limits) -> None:
    """Refuses a job that could never be served."""
    for job in jobs:
        try:
            limits.check(job.request)
        except UserError as error:
            raise UserError(f"line {job.line}: {error}" if job.line else str(error)) from error


def limits_for(
    requests: Sequence[Request], cfg: ModelConfig, max_rows: int = Limits.max_rows, cache_tokens: int | None = None,
    shards: int = 1,
) -> Limits:  # fmt: skip
    """Room for all rows at once, or for ``CACHE_TOKENS`` if that is less and the longest fits into a shard."""
    lengths = [len(request.prompt) + (request.max_tokens or 0) for request in requests]
    pages = [-(-length // PAGE_SIZE) for length in lengths]
    pages = sorted(n_pages for n_pages, request in zip(pages, requests, strict=True) for _ in range(request.n))
    rows = min(max_rows, len(pages))
    in_a_shard = sum(sorted(pages, reverse=True)[: -(-rows // shards)])
    tokens = cache_tokens or shards * max(pages[-1] * PAGE_SIZE, min(in_a_shard * PAGE_SIZE, CACHE_TOKENS // shards))
    return Limits(
        n_pages=1 + -(-tokens // (shards * PAGE_SIZE)), page_size=PAGE_SIZE, vocab_size=cfg.vocab_size, max_rows=rows,
        shards=shards,
        max_len=min(max(lengths), cfg.max_position_embeddings), step_tokens=max(rows, Limits.step_tokens),
    )  # fmt: skip


def answers(jobs: Sequence[Job], events: Iterable[Event]) -> Iterator[dict[str, Any]]:
    """The line for every job, in their order, as soon as it and those before are there; events number the jobs."""
    open_ = {i: [_Output([], []) for _ in range(job.request.n)] for i, job in enumerate(jobs)}
    first = 0
    for event in events:
        output = open_[event.request][event.sample]
        output.text.append(event.text)
        output.tokens.extend(event.tokens)
        if event.finish:
            open_[event.request][event.sample] = output._replace(last=event)
        while first in open_ and all(output.last for output in open_[first]):
            yield _line(jobs[first], open_.pop(first))
            first += 1
    assert not open_


class _Output(NamedTuple):
    text: list[str]
    tokens: list[int]
    last: Event | None = None


def _line(job: Job, outputs: list[_Output]) -> dict[str, Any]:
    found = []
    for text, tokens, last in outputs:
        assert last is not None
        message = {"message": last.message} if last.message else {}
        found.append({"text": "".join(text), "tokens": tokens, "finish_reason": last.finish, **message})
    cached = outputs[0].last.cached_tokens if outputs[0].last else 0
    id = {} if job.id is None else {"id": job.id}
    return {"line": job.line, **id, "prompt_tokens": len(job.request.prompt), "cached_tokens": cached, "outputs": found}
