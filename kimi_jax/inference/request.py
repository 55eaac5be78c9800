"""What a client asks of the engine, and what it gets back, piece by piece."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np

from kimi_jax.errors import UserError

MAX_LOGPROBS = 20
MAX_SAMPLES = 128
GREEDY_BELOW = 1e-5  # a temperature under this would overflow f32 and means the most likely token


def _number(name: str, value: Any, low: float, high: float, above: bool = False) -> None:
    exact: Any = value  # no float: it may be too large
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    if not is_number or not low <= exact <= high or (above and exact == low):
        raise UserError(f"{name} must be a number {'above' if above else 'from'} {low} to {high}, not {value!r}")


def _whole(name: str, value: Any, low: int, high: int) -> None:
    if not isinstance(value, Integral) or isinstance(value, bool) or not low <= int(value) <= high:
        raise UserError(f"{name} must be a whole number from {low} to {high}, not {value!r}")


def _ids(name: str, values: Any) -> tuple[int, ...]:
    try:
        ids = tuple(values)
    except TypeError:
        raise UserError(f"{name} must be a list of token ids, not {values!r}") from None
    for value in ids:
        _whole(f"{name}: a token id", value, 0, 2**31 - 1)
    return tuple(map(int, ids))


class Grammar(Protocol):
    """The state of one constrained text."""

    def mask(self) -> np.ndarray | None:
        """Which tokens may come next, 32 a word, the lowest bit first; None: any. No bit ends the text."""
        ...

    def accept(self, token: int) -> None: ...


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn; the defaults take the most likely one. ``inference.sampling`` has the mathematics.

    ``seed`` fixes the draws: the same request gives the same tokens in any batch. Without one, the engine chooses.
    ``logprobs`` asks for the log probability of every token and of so many of the most likely ones, ``prompt_logprobs``
    for the same of the prompt's tokens.
    """

    temperature: float = 0.0
    top_k: int = 0  # 0: all
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = dataclasses.field(default_factory=dict, hash=False)
    seed: int | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None

    def __post_init__(self):
        _number("temperature", self.temperature, 0, 100)
        _whole("top_k", self.top_k, 0, 2**31 - 1)
        _number("top_p", self.top_p, 0, 1, above=True)
        _number("min_p", self.min_p, 0, 1)
        _number("repetition_penalty", self.repetition_penalty, 0, 100, above=True)
        _number("presence_penalty", self.presence_penalty, -2, 2)
        _number("frequency_penalty", self.frequency_penalty, -2, 2)
        if not isinstance(self.logit_bias, Mapping):
            raise UserError(f"logit_bias must map token ids to numbers, not be {self.logit_bias!r}")
        for token, bias in self.logit_bias.items():
            _whole("logit_bias: a token id", token, 0, 2**31 - 1)
            _number(f"logit_bias[{token}]", bias, -100, 100)
        if self.seed is not None:
            _whole("seed", self.seed, -(2**63), 2**64 - 1)
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                _whole(name, getattr(self, name), 0, MAX_LOGPROBS)

    @property
    def penalised(self) -> bool:
        """Whether a token's chance depends on the tokens that came before, beside what the model makes of them."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0


@dataclass(frozen=True)
class Request:
    """``n`` continuations of ``prompt``.

    Each ends at a token of ``stop_ids`` (reported, but not part of the text), before a string of ``stop``, or after
    ``max_tokens``: None stands for all there is room for, and 0 may be asked with ``prompt_logprobs``. ``grammar`` is
    called once per continuation and gives the state that constrains it. A request of priority p is served as if it had
    come p * ``Limits.age_s`` seconds earlier.
    """

    prompt: tuple[int, ...]
    sampling: Sampling = Sampling()
    max_tokens: int | None = None
    stop_ids: frozenset[int] = frozenset()
    stop: tuple[str, ...] = ()
    n: int = 1
    priority: int = 0
    grammar: Callable[[], Grammar] | None = dataclasses.field(default=None, compare=False)

    def __post_init__(self):
        object.__setattr__(self, "prompt", _ids("prompt", self.prompt))
        object.__setattr__(self, "stop_ids", frozenset(_ids("stop_ids", self.stop_ids)))
        if not self.prompt:
            raise UserError("prompt must hold at least one token")
        if self.max_tokens is not None:
            _whole("max_tokens", self.max_tokens, 0 if self.sampling.prompt_logprobs is not None else 1, 2**31 - 1)
        _whole("n", self.n, 1, MAX_SAMPLES)
        _whole("priority", self.priority, -100, 100)
        listed = isinstance(self.stop, list | tuple)
        if not listed or not all(isinstance(stop, str) and stop for stop in self.stop):
            raise UserError(f"stop must be a list of strings that are not empty, not {self.stop!r}")
        object.__setattr__(self, "stop", tuple(dict.fromkeys(self.stop)))


Finish = Literal["stop", "length", "cancelled", "error"]


class Logprob(NamedTuple):
    """Natural logarithms of the model's own probabilities, whatever the sampling parameters."""

    logprob: float
    top: tuple[tuple[int, float], ...]  # (token, log probability) of the most likely, best first


class Event(NamedTuple):
    """What is new of one continuation. ``tokens`` come at once; ``text`` waits while it may be part of a stop string.

    The last event of a continuation, and no other, has ``finish``.
    """

    request: int
    sample: int  # which of the n
    tokens: tuple[int, ...] = ()
    text: str = ""
    logprobs: tuple[Logprob, ...] = ()  # of ``tokens``, if asked for
    prompt_logprobs: tuple[Logprob | None, ...] = ()  # once, of sample 0; the first token has none
    finish: Finish | None = None
    stopped_by: int | str | None = None  # the stop token or string
    message: str | None = None  # what went wrong
    cached_tokens: int = 0  # of the prompt, those found in the prefix cache when it was first computed
