"""The request fields that steer sampling, shared by OpenAI's endpoints. Fields that are not known are ignored."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from kimi_jax.server.engine import Sampling
from kimi_jax.server.errors import ApiError

MAX_STOPS = 16
MAX_TOP_LOGPROBS = 20

StopText = Annotated[str, Field(min_length=1)]
Stops = Annotated[list[StopText], Field(max_length=MAX_STOPS)]


def _as_list(value: object) -> object:
    return [] if value is None else [value] if isinstance(value, str) else value


class Request(BaseModel):
    """Numbers are numbers and texts are texts: nothing is converted, and null stands for a field left out."""

    model_config = ConfigDict(extra="ignore", strict=True, populate_by_name=True)

    model: str = ""


class SamplingFields(Request):
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
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

    def sampling(self, vocab_size: int, stop_ids: frozenset[int], default_temperature: float) -> Sampling:
        """Without a token limit, which depends on the prompt."""
        return Sampling(
            max_tokens=0,
            temperature=default_temperature if self.temperature is None else self.temperature,
            top_p=self.top_p or 1.0,
            top_k=max(self.top_k or 0, 0),
            min_p=self.min_p or 0.0,
            seed=self.seed,
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            repetition_penalty=self.repetition_penalty or 1.0,
            logit_bias=_bias(self.logit_bias or {}, vocab_size),
            stop_ids=frozenset() if self.ignore_eos else stop_ids,
        )


def _bias(given: dict[str, float], vocab_size: int) -> dict[int, float]:
    bias = {}
    for key, value in given.items():
        if not (key.isascii() and key.isdecimal() and len(key) < 10 and int(key) < vocab_size):
            raise ApiError(400, f"{key!r} is no token id below {vocab_size}", "logit_bias")
        bias[int(key)] = value
    return bias


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True)

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
