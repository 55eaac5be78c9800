"""The request fields that steer sampling, shared by OpenAI's endpoints. Fields that are not known are ignored."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from kimi_jax.inference.request import Sampling
from kimi_jax.server.errors import ApiError

MAX_STOPS = 16

StopText = Annotated[str, Field(min_length=1)]
Stops = Annotated[list[StopText], Field(max_length=MAX_STOPS)]
TopP = Annotated[float, Field(ge=0, le=1)]


def _as_list(value: object) -> object:
    return [] if value is None else [value] if isinstance(value, str) else value


class Strict(BaseModel):
    """Numbers are numbers and texts are texts: nothing is converted."""

    model_config = ConfigDict(extra="ignore", strict=True)


class Request(Strict):
    """Null stands for a field left out."""

    model: str = ""


class SamplingFields(Request):
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: TopP | None = None
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = None  # -1 and 0: all
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=2)] | None = None
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
    stop: Annotated[Stops, BeforeValidator(_as_list)] = []
    ignore_eos: bool | None = None
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    stream: bool | None = None
    return_token_ids: bool | None = None

    def sampling(
        self, vocab_size: int, default_temperature: float, logprobs: int | None, prompt_logprobs: int | None = None
    ) -> Sampling:
        return Sampling(
            temperature=default_temperature if self.temperature is None else self.temperature,
            top_p=nucleus(self.top_p),
            top_k=max(self.top_k or 0, 0),
            min_p=self.min_p or 0.0,
            seed=self.seed,
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            repetition_penalty=self.repetition_penalty or 1.0,
            logit_bias=_bias(self.logit_bias or {}, vocab_size),
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
        )

    def stop_ids(self, model: frozenset[int]) -> frozenset[int]:
        """Of the ``model``'s, those that end the answer."""
        return frozenset() if self.ignore_eos else model


def nucleus(top_p: float | None) -> float:
    """Of 0, the smallest there is: the most likely token."""
    return 1.0 if top_p is None else max(top_p, 1e-9)


def _bias(given: dict[str, float], vocab_size: int) -> dict[int, float]:
    bias = {}
    for key, value in given.items():
        if not (key.isascii() and key.isdecimal() and len(key) < 10 and int(key) < vocab_size):
            raise ApiError(400, f"{key!r} is no token id below {vocab_size}", "logit_bias")
        bias[int(key)] = value
    return bias


class StreamOptions(Strict):
    include_usage: bool | None = None


def token_limit(wanted: int | None, prompt_tokens: int, max_model_len: int) -> int:
    """At most ``wanted``, at most what the model has room for after the prompt."""
    room = max_model_len - prompt_tokens
    if room < 1:
        raise ApiError(
            400,
            f"This model's maximum context length is {max_model_len} tokens, but the prompt has {prompt_tokens}. "
            "Shorten it.",
            code="context_length_exceeded",
        )
    return room if wanted is None else min(wanted, room)
