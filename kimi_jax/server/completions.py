"""POST /v1/completions: text or ids in, text and ids out, with echo and prompt scores for evaluation harnesses."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Sequence
from typing import Annotated, Any

from pydantic import Field

from kimi_jax.inference.request import MAX_LOGPROBS
from kimi_jax.server.answer import End, Step
from kimi_jax.server.chat import structured_outputs
from kimi_jax.server.dialogue import compiled
from kimi_jax.server.engine import Job, PromptScores, Token
from kimi_jax.server.errors import ApiError
from kimi_jax.server.logprobs import CompletionLogprobs
from kimi_jax.server.parameters import SamplingFields, StreamOptions, token_limit
from kimi_jax.server.service import Parts, Service, new_id, sse, validate
from kimi_jax.server.tool_parser import MARKERS, Text

DEFAULT_TEMPERATURE = 1.0
DEFAULT_MAX_TOKENS = 16
Ids = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]


class CompletionRequest(SamplingFields):
    prompt: str | Ids | Annotated[list[str], Field(min_length=1)] | Annotated[list[Ids], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=0)] | None = DEFAULT_MAX_TOKENS
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    best_of: int | None = None
    suffix: str | None = None
    structured_outputs: dict[str, Any] | None = None
    stream_options: StreamOptions | None = None


class CompletionCall:
    def __init__(self, body: Any, service: Service):
        self.request = request = validate(CompletionRequest, body)
        self.model = service.check_model(request.model)
        self.stream = bool(request.stream)
        self._tokenizer = service.tokenizer
        if request.suffix:
            raise ApiError(400, "this model does not fill in before a suffix", "suffix")
        if request.best_of not in (None, request.n or 1):
            raise ApiError(400, "best_of must equal n", "best_of")
        self.jobs = [self._job(prompt, service) for prompt in self._prompts(service)]
        self._answers = [job for job in self.jobs for _ in range(job.n)]  # the job of each
        self._head = {"id": new_id("cmpl-"), "object": "text_completion", "created": int(time.time())}
        self._head |= {"model": self.model, "system_fingerprint": None}

    def _prompts(self, service: Service) -> list[list[int]]:
        prompt = self.request.prompt
        single = isinstance(prompt, str) or isinstance(prompt[0], int)
        prompts: Any = [prompt] if single else prompt
        found = []
        for one in prompts:
            ids = service.tokenizer.encode(one) if isinstance(one, str) else list(one)
            if too_high := [i for i in ids if i >= service.engine.vocab_size]:
                raise ApiError(400, f"token id {too_high[0]} is not below {service.engine.vocab_size}", "prompt")
            found.append(ids or [service.tokenizer.bos])
        return found

    def _job(self, ids: list[int], service: Service) -> Job:
        request = self.request
        wanted = DEFAULT_MAX_TOKENS if request.max_tokens is None else request.max_tokens
        full = wanted == 0 and len(ids) == service.engine.max_model_len
        limit = 0 if full else token_limit(wanted, len(ids), service.engine.max_model_len)
        scored = request.logprobs if request.echo else None
        form = structured_outputs(request.structured_outputs)
        grammar = form and compiled(service.vocabulary, form.grammar, form.param)
        return Job(
            ids,
            limit,
            request.sampling(service.engine.vocab_size, DEFAULT_TEMPERATURE, request.logprobs, scored),
            request.stop_ids(service.tokenizer.stop_ids),
            (lambda: service.vocabulary.matcher(grammar)) if grammar else None,
            n=request.n or 1,
            stops=tuple(request.stop),
            parse=False,
        )

    def _usage(self, ends: Sequence[tuple[int, End]]) -> dict[str, Any]:
        """Of all answers, by number. Those of one prompt read it once."""
        prompt = sum(len(job.prompt_ids) for job in self.jobs)
        output = sum(end.output_tokens for _, end in ends)
        cached = [0] * len(self.jobs)
        for index, end in ends:
            job = index // self.jobs[0].n
            cached[job] = max(cached[job], end.cached_tokens)
        found = {"prompt_tokens": prompt, "completion_tokens": output, "total_tokens": prompt + output}
        return {**found, "prompt_tokens_details": {"cached_tokens": sum(cached)}}

    async def body(self, parts: Parts) -> dict[str, Any]:
        texts = [self._echoed(job) for job in self._answers]
        tokens: list[list[Token]] = [self._unscored(job) for job in self._answers]
        ids: list[list[int]] = [[] for _ in self._answers]
        ends: list[End | None] = [None] * len(self._answers)
        async for index, part in parts:
            if isinstance(part, PromptScores):
                tokens[index] = list(part.tokens)
            elif isinstance(part, Step):
                texts[index] += "".join(event.text for event in part.events if isinstance(event, Text))
                ids[index] += [token.id for token in part.tokens]
                tokens[index] += self._shown(part.tokens)
            else:
                ends[index] = part
        choices = []
        for i, end in enumerate(ends):
            assert end is not None
            choice = {"index": i, "text": texts[i], "finish_reason": end.reason, "logprobs": None}
            if self.request.logprobs is not None:
                choice["logprobs"] = self._logprobs().take(tokens[i])
            if self.request.return_token_ids:
                choice |= {"token_ids": ids[i], "prompt_token_ids": list(self._answers[i].prompt_ids)}
            choices.append(choice)
        return {**self._head, "choices": choices, "usage": self._usage([(i, end) for i, end in enumerate(ends) if end])}

    async def events(self, parts: Parts) -> AsyncIterator[bytes]:
        options = self.request.stream_options
        count = bool(options and options.include_usage)
        scores = [self._logprobs() for _ in self._answers]
        pending = [self._unscored(job) for job in self._answers]
        texts = [self._echoed(job) for job in self._answers]
        ends = []
        async for index, part in parts:
            ids: list[int] = []
            reason = None
            if isinstance(part, PromptScores):
                pending[index] = list(part.tokens)
                continue
            if isinstance(part, Step):
                texts[index] += "".join(event.text for event in part.events if isinstance(event, Text))
                ids = [token.id for token in part.tokens]
                pending[index] += self._shown(part.tokens)
                if not texts[index] and not (ids and self.request.return_token_ids):
                    continue
            else:
                ends.append((index, part))
                reason = part.reason
            choice = {"index": index, "text": texts[index], "finish_reason": reason, "logprobs": None}
            if self.request.logprobs is not None:
                choice["logprobs"] = scores[index].take(pending[index])
            if self.request.return_token_ids:
                choice |= {"token_ids": ids, "prompt_token_ids": list(self._answers[index].prompt_ids)}
            texts[index], pending[index] = "", []
            yield sse({**self._head, "choices": [choice], **({"usage": None} if count else {})})
        if count:
            yield sse({**self._head, "choices": [], "usage": self._usage(ends)})
        yield sse("[DONE]")

    def _echoed(self, job: Job) -> str:
        if not self.request.echo:
            return ""
        scores = self._logprobs()
        return "".join(scores.text(i) for i in job.prompt_ids)

    def _unscored(self, job: Job) -> list[Token]:
        """The prompt's tokens if they are to be shown, until their scores come."""
        return [Token(i) for i in job.prompt_ids] if self.request.echo else []

    def _shown(self, tokens: Sequence[Token]) -> list[Token]:
        stops = self.jobs[0].stop_ids
        return [token for token in tokens if token.id not in stops or self.request.return_token_ids]

    def _logprobs(self) -> CompletionLogprobs:
        return CompletionLogprobs(self._tokenizer, MARKERS)
