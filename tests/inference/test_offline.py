"""Lines in, requests out, and answers in the order of the lines."""

from __future__ import annotations

import json

import numpy as np
import pytest

from kimi_jax import presets
from kimi_jax.data.tokenizer import ByteTokenizer
from kimi_jax.errors import UserError
from kimi_jax.inference.offline import FIELDS, Job, answers, check, encode, limits_for, read
from kimi_jax.inference.request import Event, Request, Sampling

CFG = presets.tiny().replace(vocab_size=515, max_position_embeddings=100_000)
DEFAULT = Request((0,), Sampling(temperature=0.5, top_p=0.9), 20, stop=("x",))


def test_every_field_is_read_and_the_rest_is_the_default(tmp_path):
    sampling = {
        "temperature": 1, "top_k": 3, "top_p": 0.5, "min_p": 0.1, "repetition_penalty": 1.5, "presence_penalty": 0.25,
        "frequency_penalty": -0.5, "logit_bias": {"65": 2.5}, "seed": 7,
    }  # fmt: skip
    every = {"prompt": [3, 4], "id": {"any": 1}, "max_tokens": 5, "stop": "end", "n": 2, "priority": -1, **sampling}
    assert set(every) == set(FIELDS)
    lines = ["", json.dumps(every), json.dumps({"prompt": "caf\u00e9", **dict.fromkeys(FIELDS[1:])}), "  "]
    (tmp_path / "lines").write_text("\ufeff" + "\r\n".join(lines), encoding="utf-8")
    first, second = read(tmp_path / "lines", DEFAULT)
    expected = Sampling(**{**sampling, "logit_bias": {65: 2.5}})
    assert first == Job(2, {"any": 1}, None, Request((3, 4), expected, 5, stop=("end",), n=2, priority=-1))
    assert second == Job(3, None, "caf\u00e9", DEFAULT)
    found = encode([first, second], ByteTokenizer(), CFG)
    assert [job.request.prompt for job in found] == [(3, 4), tuple("caf\u00e9".encode())]
    assert all(job.request.stop_ids == {*ByteTokenizer().stop_ids, 512, 513, 514} for job in found)


def test_a_file_without_lines_or_without_text_is_refused(tmp_path):
    for content, message in ((b"\n \n", "has no lines"), (b"\xff\xfe", "cannot read")):
        (tmp_path / "lines").write_bytes(content)
        with pytest.raises(UserError, match=message):
            read(tmp_path / "lines", DEFAULT)
    with pytest.raises(UserError, match="cannot read"):
        read(tmp_path / "none", DEFAULT)


@pytest.mark.parametrize(
    "line",
    [
        '{"prompt": "a", "id": ' + "[" * 100_000,
        '{"prompt": "a", "max_tokens": ' + "9" * 5000 + "}",
        '{"prompt": "a", "temperature": ' + "9" * 400 + "}",
        '{"prompt": "a", "logit_bias": {"1": ' + "9" * 400 + "}}",
    ],
    ids=["deep", "long", "large", "biased"],
)
def test_what_python_cannot_hold_is_named_with_its_line(tmp_path, line):
    (tmp_path / "lines").write_text('{"prompt": "good"}\n' + line)
    with pytest.raises(UserError, match="line 2"):
        read(tmp_path / "lines", DEFAULT)


@pytest.mark.parametrize(
    "sizes, max_rows, rows, pages",
    [
        ([(10, 6, 1)], 64, 1, 1),  # prompt, new tokens, n
        ([(10, 7, 1), (1, 1, 3)], 64, 4, 5),
        ([(10, 7, 1), (1, 1, 3), (33, 20, 1)], 2, 2, 6),  # the two longest
        ([(900, 100, 99)], 64, 64, 4032),
        ([(9000, 1000, 99)], 64, 64, 4096),  # 65,536 tokens
        ([(90_000, 1000, 2), (5, 5, 1)], 64, 3, 5688),  # but never less than the longest
    ],
)
def test_the_cache_holds_what_runs_at_once(sizes, max_rows, rows, pages):
    requests = [Request((1,) * prompt, max_tokens=new, n=n) for prompt, new, n in sizes]
    limits = limits_for(requests, CFG, max_rows)
    assert (limits.max_rows, limits.n_pages - 1, limits.page_size) == (rows, pages, 16)
    check([Job(i, None, None, request) for i, request in enumerate(requests)], limits)
    assert limits.max_len == max(prompt + new for prompt, new, _ in sizes)
    assert limits_for(requests, CFG, 2000, 40).n_pages == 4


def test_the_cache_is_split_over_shards():
    """Each has room for its share of the longest rows, or of the whole, and always for the longest."""
    for sizes, pages in (([16] * 5 + [64], 5), ([9000] * 64, 1024), ([90_000, 5, 5, 5, 5], 5625)):
        limits = limits_for([Request((1,) * (size - 1), max_tokens=1) for size in sizes], CFG, shards=4)
        assert (limits.shards, limits.max_rows, limits.n_pages - 1) == (4, len(sizes), pages)


def test_answers_come_in_order_whatever_ends_first():
    rng, jobs = np.random.default_rng(0), [Job(i + 1, i, None, Request((1,) * (i + 1), n=1 + i % 3)) for i in range(20)]
    left = {(i, k): rng.integers(1, 9) for i, job in enumerate(jobs) for k in range(job.request.n)}
    expected: dict[tuple[int, int], list[int]] = {key: [] for key in left}

    def events():
        while left:
            i, k = key = list(left)[rng.integers(len(left))]
            left[key] -= 1
            expected[key].append(int(rng.integers(99)))
            new, last = tuple(expected[key][-1:]), left[key] == 0
            if last:
                del left[key]
            yield Event(i, k, new, f"{k}", finish="error" if last else None, message="no" if last else None)

    seen = 0
    for i, line in enumerate(answers(jobs, events())):
        assert not any(key[0] <= i for key in left)
        outputs = [
            {"text": f"{k}" * len(expected[i, k]), "tokens": expected[i, k], "finish_reason": "error", "message": "no"}
            for k in range(1 + i % 3)
        ]
        assert line == {"line": i + 1, "id": i, "prompt_tokens": i + 1, "cached_tokens": 0, "outputs": outputs}
        seen += 1
    assert seen == 20
