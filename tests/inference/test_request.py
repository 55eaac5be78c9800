"""What is wrong with a request is said in one line that names the parameter and its range."""

from __future__ import annotations

import numpy as np
import pytest

from kimi_jax.errors import UserError
from kimi_jax.inference.request import Request, Sampling

BAD = [
    (Sampling, "temperature", -0.1, "from 0 to 100"),
    (Sampling, "temperature", float("nan"), "from 0 to 100"),
    (Sampling, "temperature", True, "from 0 to 100"),
    (Sampling, "temperature", "1", "from 0 to 100"),
    (Sampling, "top_k", -1, "from 0 to 2147483647"),
    (Sampling, "top_k", 1.5, "from 0 to 2147483647"),
    (Sampling, "top_p", 0, "above 0 to 1"),
    (Sampling, "top_p", 1.1, "above 0 to 1"),
    (Sampling, "min_p", 2, "from 0 to 1"),
    (Sampling, "repetition_penalty", 0, "above 0 to 100"),
    (Sampling, "presence_penalty", 2.5, "from -2 to 2"),
    (Sampling, "frequency_penalty", -float("inf"), "from -2 to 2"),
    (Sampling, "logit_bias", {3: 101.0}, "from -100 to 100"),
    (Sampling, "logit_bias", {-1: 1.0}, "from 0 to 2147483647"),
    (Sampling, "logit_bias", [1], "map token ids to numbers"),
    (Sampling, "seed", 2**64, f"to {2**64 - 1}"),
    (Sampling, "logprobs", 21, "from 0 to 20"),
    (Sampling, "prompt_logprobs", -1, "from 0 to 20"),
    (Request, "prompt", (), "at least one token"),
    (Request, "prompt", (1, -1), "from 0 to 2147483647"),
    (Request, "prompt", 3, "a list of token ids"),
    (Request, "prompt", "text", "a whole number"),
    (Request, "max_tokens", 0, "from 1 to"),
    (Request, "n", 0, "from 1 to 128"),
    (Request, "priority", 101, "from -100 to 100"),
    (Request, "stop", "text", "a list of strings"),
    (Request, "stop", ("",), "not empty"),
    (Request, "stop_ids", (2.5,), "a whole number"),
]


@pytest.mark.parametrize("cls, name, value, said", BAD)
def test_a_bad_value_is_named_with_its_range(cls, name, value, said):
    values = {"prompt": (1,)} if cls is Request else {}
    with pytest.raises(UserError) as error:
        cls(**{**values, name: value})
    message = str(error.value)
    assert name in message and said in message and "\n" not in message


def test_what_clients_send_is_taken():
    sampling = Sampling(temperature=np.float32(0.5), top_k=np.int64(3), seed=-1, logit_bias={7: -100})
    request = Request(prompt=np.array([1, 2]), sampling=sampling, stop=["a", "a"], stop_ids=[3, 3])  # type: ignore
    assert request.prompt == (1, 2) and request.stop == ("a",) and request.stop_ids == {3}
    assert Request(prompt=(1,), sampling=Sampling(prompt_logprobs=0), max_tokens=0).max_tokens == 0
