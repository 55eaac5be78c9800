"""Completions: ids in and out, echo with prompt scores as evaluation harnesses use them."""

import json

import pytest

from kimi_jax.data import tokenizer as tk
from tests.server.fake import FakeEngine

BYTES = tk.load("bytes")
END = BYTES.special_ids["<|im_end|>"]


def score(token):
    return pytest.approx(-1 - token / 1000)


def test_text_and_usage(serve_text):
    with serve_text("é!<|tool_call_end|>[EOS]") as server:
        answer = server.openai().completions.create(model="kimi", prompt="<|im_end|>x", max_tokens=50)
        assert (answer.choices[0].text, answer.choices[0].finish_reason) == ("é!<|tool_call_end|>", "stop")
        assert server.engine.seen[0].prompt_ids == list(b"<|im_end|>x")  # text stays text
        assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (11, 5)
        assert server.openai().completions.create(model="kimi", prompt="x").choices[0].text == "é!<|tool_call_end|>"
        assert server.engine.seen[-1].max_tokens == 16


@pytest.mark.parametrize("stream", [False, True])
def test_several_prompts_in_every_form(stream, random_server):
    client = random_server.openai()
    for prompt, ids in [
        ("ab", [[97, 98]]),
        (["ab", "c"], [[97, 98], [99]]),
        ([97, 98], [[97, 98]]),
        ([[97, END], [99]], [[97, END], [99]]),
        ("", [[BYTES.bos]]),
    ]:
        before = len(random_server.engine.seen)
        answer = client.completions.create(
            model="kimi", prompt=prompt, n=2, max_tokens=3, seed=1, stream=stream, extra_body={"return_token_ids": True}
        )
        choices = [choice for chunk in answer for choice in chunk.choices] if stream else answer.choices
        assert sorted(job.prompt_ids for job in random_server.engine.seen[before:]) == sorted(ids)
        found = {i: [] for i in range(2 * len(ids))}
        for choice in choices:
            found[choice.index] += choice.token_ids
            assert choice.prompt_token_ids == ids[choice.index // 2]
        assert all(1 <= len(tokens) <= 3 for tokens in found.values())


@pytest.mark.parametrize("limit", [0, 1])
def test_echo_scores_the_prompt(limit, random_server):
    """As lm-eval asks: token_logprobs[context:-1] are the continuation's, greedy where the best of top_logprobs."""
    prompt = [97, 0xC3, 0xA9, END, 98]
    answer = random_server.openai().completions.create(
        model="kimi", prompt=prompt, max_tokens=limit, logprobs=2, echo=True, temperature=0, seed=1234
    )
    scores = answer.choices[0].logprobs
    assert scores.tokens[:5] == ["a", "bytes:\\xc3", "bytes:\\xa9", "<|im_end|>", "b"]
    assert scores.token_logprobs[0] is None and scores.top_logprobs[0] is None
    assert scores.token_logprobs[1:5] == [score(i) for i in prompt[1:]]
    assert all(
        max(top.values()) >= own for top, own in zip(scores.top_logprobs[1:], scores.token_logprobs[1:], strict=True)
    )
    assert scores.text_offset[:5] == [0, 1, 1, 2, 2]
    assert len(scores.tokens) == 5 + limit and answer.choices[0].text[:3] == "aéb"
    assert answer.usage.completion_tokens == limit


def test_log_probabilities_of_the_answer(serve_text):
    with serve_text("hé") as server:
        client = server.openai()
        answer = client.completions.create(model="kimi", prompt="x", logprobs=0).choices[0]
        assert answer.logprobs.tokens == ["h", "bytes:\\xc3", "bytes:\\xa9"]
        assert answer.logprobs.token_logprobs == [score(i) for i in (104, 0xC3, 0xA9)]
        assert answer.logprobs.top_logprobs[0] == {"h": score(104)}
        chunks = list(client.completions.create(model="kimi", prompt="x", logprobs=0, echo=True, stream=True))
        assert "".join(chunk.choices[0].text for chunk in chunks) == "xhé"
        tokens = [token for chunk in chunks for token in chunk.choices[0].logprobs.tokens]
        offsets = [offset for chunk in chunks for offset in chunk.choices[0].logprobs.text_offset]
        assert tokens == ["x", *answer.logprobs.tokens] and offsets == [0, 1, 2, 2]


def test_usage_at_the_end_of_a_stream(random_server):
    chunks = list(
        random_server.openai().completions.create(
            model="kimi", prompt=["a", "bc"], max_tokens=4, stream=True, stream_options={"include_usage": True}
        )
    )
    assert chunks[-1].choices == [] and chunks[-1].usage.prompt_tokens == 3
    assert chunks[-1].usage.total_tokens == 3 + chunks[-1].usage.completion_tokens


@pytest.mark.parametrize("stream", [False, True])
def test_answers_share_what_was_cached_of_their_prompt(stream, serve_text):
    """The engine of the tests has two tokens of every prompt."""
    ask = {"prompt": ["abc", "defg"], "n": 3, "stream": stream, "stream_options": {"include_usage": True}}
    with serve_text("ab") as server:
        text = server.post("/v1/completions", ask).text
    usage = json.loads(text.split("data: ")[-2] if stream else text)["usage"]
    assert (usage["prompt_tokens"], usage["prompt_tokens_details"]["cached_tokens"]) == (7, 4)


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"prompt": None}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": [3.5]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": [10**6]}, "prompt"),
        ({"suffix": "x"}, "suffix"),
        ({"best_of": 3}, "best_of"),
        ({"logprobs": 21}, "logprobs"),
        ({"max_tokens": -1}, "max_tokens"),
    ],
)
def test_wrong_requests_are_refused(changes, param, random_server):
    response = random_server.post("/v1/completions", {"prompt": "x"} | changes)
    assert response.status_code == 400
    assert response.json()["error"]["param"].startswith(param)


def test_no_token_is_asked_for(serve):
    with serve(FakeEngine()) as server:
        assert server.post("/v1/completions", {"prompt": "x", "max_tokens": 0}).json()["choices"][0]["text"] == ""
        assert server.engine.seen == []


def test_tokenize_and_detokenize(random_server):
    messages = [{"role": "user", "content": "<|im_end|>"}]
    found = random_server.post("/tokenize", {"messages": messages, "return_token_strs": True}).json()
    assert found["count"] == len(found["tokens"]) == len(found["token_strs"]) and found["max_model_len"] == 4096
    assert found["tokens"].count(END) == 2 and found["token_strs"][0] == "<|im_system|>"
    text = random_server.post("/detokenize", {"tokens": found["tokens"]}).json()["prompt"]
    assert text.endswith("<|im_middle|><|im_end|><|im_end|><|im_assistant|>assistant<|im_middle|>")
    assert random_server.post("/tokenize", {"prompt": "[EOS]é"}).json()["tokens"] == list("[EOS]é".encode())
    assert random_server.post("/detokenize", {"tokens": [0xC3]}).json()["prompt"] == "\ufffd"
    for path, body in [("/tokenize", {}), ("/tokenize", {"prompt": "x", "messages": messages}), ("/detokenize", {})]:
        assert random_server.post(path, body).status_code == 400
