"""What the server asks of an inference engine, and nothing else of it."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

from kimi_jax.inference.request import Grammar, Sampling
from kimi_jax.inference.scheduler import Load

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class Job:
    """``n`` answers to generate. ``stops`` and ``parse`` are for what reads the tokens, the engine does not look."""

    prompt_ids: Sequence[int]
    max_tokens: int
    sampling: Sampling = Sampling()
    stop_ids: frozenset[int] = frozenset()  # end an answer; reported as the last Token
    constraint: Callable[[], Grammar] | None = None  # called once for each answer
    n: int = 1
    stops: tuple[str, ...] = ()
    parse: bool = True  # tool markers and calls out of the text; else the markers stay


class Token(NamedTuple):
    """One token and, where asked for, its log probability and the most likely ones', best first."""

    id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class PromptScores:
    """Once, before any token, if ``prompt_logprobs`` was asked for. The first token has no log probability."""

    tokens: tuple[Token, ...]


@dataclass(frozen=True)
class Finished:
    """Last. "stop" after a stop id (or an end that the engine's constraint forced), else "length"."""

    reason: FinishReason
    cached_tokens: int = 0  # of the prompt, found in the cache


Event = Token | PromptScores | Finished


class Engine(Protocol):
    vocab_size: int  # the model's; it may exceed the tokenizer's
    max_model_len: int  # prompt and answer together

    def generate(self, job: Job) -> AsyncGenerator[tuple[int, Event], None]:
        """Events of the answers, each with its number. ``PromptScores`` come once, with number 0, before all else.

        Closing the generator cancels what has not ended and frees what it holds.
        """
        ...

    def load(self) -> Load: ...
