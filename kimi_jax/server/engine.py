"""What the server asks of an inference engine, and nothing else of it."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Protocol

import numpy as np

FinishReason = Literal["stop", "length"]


class Constraint(Protocol):
    """Which tokens may come next. One object serves one answer, step by step."""

    def mask(self) -> np.ndarray | None:
        """uint32 [ceil(V / 32)]; bit ``i % 32`` of word ``i // 32`` says whether token i may come. None: any."""
        ...

    def accept(self, token: int) -> None:
        """``token`` was sampled; the next mask is for the one after it."""
        ...


@dataclass(frozen=True)
class Sampling:
    max_tokens: int
    temperature: float = 1.0  # 0: the most likely token
    top_p: float = 1.0
    top_k: int = 0  # 0: all
    min_p: float = 0.0
    seed: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    stop_ids: frozenset[int] = frozenset()  # end the answer; reported as the last Token
    logprobs: int | None = None  # also report so many of the most likely tokens; 0: only the sampled one's
    prompt_logprobs: int | None = None
    constraint: Callable[[], Constraint] | None = None  # called once for each answer


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


@dataclass(frozen=True)
class Load:
    """For /metrics."""

    running: int = 0
    waiting: int = 0
    pages_used: int = 0
    pages_total: int = 0


class Engine(Protocol):
    vocab_size: int  # the model's; it may exceed the tokenizer's
    max_model_len: int  # prompt and answer together

    def generate(
        self, prompt_ids: Sequence[int], sampling: Sampling, n: int = 1
    ) -> AsyncGenerator[tuple[int, Event], None]:
        """Events of ``n`` answers, each with its number. ``PromptScores`` come once, with number 0, before all else.

        Closing the generator cancels what has not ended and frees what it holds.
        """
        ...

    def load(self) -> Load: ...
