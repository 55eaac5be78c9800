"""``python -m kimi_jax.generate`` against the full forward pass of the same checkpoint."""

from __future__ import annotations

import functools
import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kimi_jax
from kimi_jax import generate, presets
from kimi_jax.data.tokenizer import ByteTokenizer
from kimi_jax.errors import UserError
from tests.checkpoint.examples import random_tensors, save_hf

CFG = presets.tiny().replace(
    vocab_size=530, hidden_size=32, intermediate_size=48, moe_intermediate_size=16, num_hidden_layers=2,
    num_attention_heads=2, n_routed_experts=4, num_experts_per_tok=2, q_lora_rank=16, kv_lora_rank=16,
    qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8, max_position_embeddings=96,
)  # fmt: skip
TOKENIZER = ByteTokenizer()
JOBS = [
    {"prompt": "def main(", "id": "first"},
    {"prompt": [100, 101, 102], "max_tokens": 9, "id": 7},
    {"prompt": "", "max_tokens": 30, "temperature": None},
    {"prompt": "def main(self)", "temperature": 1.0, "seed": 3, "n": 3},
    *({"prompt": f"{i} {'x' * i}", "max_tokens": 1 + i % 7} for i in range(5)),
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """Random weights that write ASCII, control tokens, and ids that are no token at all."""
    tensors = {name: w * 0.2 for name, w in random_tensors(CFG).items()}
    chance_V = np.full(CFG.vocab_size, 0.1)
    chance_V[32:127], chance_V[[*TOKENIZER.stop_ids]], chance_V[512:] = 1, 0.6, 0.6
    tensors["lm_head.weight"] = (tensors["lm_head.weight"] * chance_V[:, None]).astype(np.float32)
    return save_hf(tmp_path_factory.mktemp("given") / "hf", tensors, CFG)


@functools.cache
def model(checkpoint: Path):
    model, params = kimi_jax.load(checkpoint)
    return jax.jit(lambda tokens_BT: model.apply({"params": params}, tokens_BT))


def greedy(checkpoint: Path, prompt: list[int], most: int) -> list[int]:
    """The most likely tokens of the full forward pass, up to the first that ends the text."""
    tokens_1T, n = np.zeros((1, 96), np.int32), len(prompt)
    tokens_1T[0, :n] = prompt
    for i in range(n, n + most):
        tokens_1T[0, i] = np.argmax(model(checkpoint)(jnp.asarray(tokens_1T))[0, i - 1])
        if tokens_1T[0, i] in TOKENIZER.stop_ids or tokens_1T[0, i] >= 512:
            break
    return tokens_1T[0, n : i + 1].tolist()


def run(monkeypatch, *arguments) -> None:
    monkeypatch.setattr(sys, "argv", ["generate", *map(str, arguments)])
    generate.main()


def write(path: Path, lines: list) -> Path:
    path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))
    return path


def text_of(tokens: list[int]) -> str:
    return TOKENIZER.decode([token for token in tokens if token < 256])


@pytest.mark.parametrize("prompt", ["def main(", "", "x y"])
def test_a_prompt_is_continued(checkpoint, monkeypatch, capsys, prompt):
    run(monkeypatch, "--checkpoint", checkpoint, "--prompt", prompt, "--tokenizer", "bytes", "--max-new-tokens", 20)
    tokens = greedy(checkpoint, TOKENIZER.encode(prompt) or [TOKENIZER.bos], 20)
    assert capsys.readouterr().out == prompt + text_of(tokens) + "\n" and len(tokens) > 3


def test_text_ends_before_a_stop_string(checkpoint, monkeypatch, capsys):
    text = text_of(greedy(checkpoint, TOKENIZER.encode("def main("), 20))
    given = ["--checkpoint", checkpoint, "--prompt", "def main(", "--tokenizer", "bytes", "--max-new-tokens", 20]
    run(monkeypatch, *given, "--stop", "never", "--stop", text[2:4])
    assert capsys.readouterr().out == "def main(" + text[: text.index(text[2:4])] + "\n"


def test_the_flags_reach_the_sampler(checkpoint, monkeypatch, capsys):
    """Of one token, or of the likeliest alone, the draw is the greedy one at any temperature; the seed decides else."""
    given = ["--checkpoint", checkpoint, "--prompt", "ab", "--tokenizer", "bytes", "--temperature", 3]

    def text(*flags) -> str:
        run(monkeypatch, *given, *flags)
        return capsys.readouterr().out

    likely = "ab" + text_of(greedy(checkpoint, TOKENIZER.encode("ab"), 80)) + "\n"
    for flags in (("--top-k", 1), ("--top-p", 1e-6), ("--min-p", 1)):
        assert text("--max-new-tokens", 80, *flags) == likely
    drawn = [text("--max-new-tokens", 80, "--seed", seed) for seed in (1, 2, 1)]
    assert drawn[0] == drawn[2] != drawn[1] and likely not in drawn


def test_a_batch_is_answered_line_by_line(checkpoint, monkeypatch, capsys, tmp_path):
    """Fewer rows and pages than answers; blank lines count, and the order is that of the lines."""
    path = write(tmp_path / "prompts.jsonl", [*JOBS[:3], "", *JOBS[3:]])
    given = ["--checkpoint", checkpoint, "--batch", path, "--tokenizer", "bytes", "--max-new-tokens", 12]
    given += ["--max-rows", 2, "--cache-tokens", 48]
    output = tmp_path / "answers.jsonl"
    output.write_text("of another run")
    run(monkeypatch, *given, "--output", output)
    found = [json.loads(line) for line in output.read_text().splitlines()]
    said = capsys.readouterr()
    assert not said.out and "9 of 9 prompts answered" in said.err and "tokens/s" in said.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["answers.jsonl", "prompts.jsonl"]
    assert [answer["line"] for answer in found] == [1, 2, 3, *range(5, 11)]
    assert [answer.get("id") for answer in found[:3]] == ["first", 7, None] and "id" not in found[2]
    for job, answer in zip(JOBS, found, strict=True):
        prompt = TOKENIZER.encode(job["prompt"]) if isinstance(job["prompt"], str) else job["prompt"]
        prompt = prompt or [TOKENIZER.bos]
        assert answer["prompt_tokens"] == len(prompt) and len(answer["outputs"]) == job.get("n", 1)
        for one in answer["outputs"]:
            full = len(one["tokens"]) == job.get("max_tokens", 12)
            ended = one["tokens"][-1] in TOKENIZER.stop_ids or one["tokens"][-1] >= 512
            assert one["finish_reason"] == ("stop" if ended else "length") and (ended or full)
            assert one["text"] == text_of(one["tokens"])
        if "seed" not in job:
            assert answer["outputs"][0]["tokens"] == greedy(checkpoint, prompt, job.get("max_tokens", 12))
    assert len({one["text"] for one in found[3]["outputs"]}) > 1

    run(monkeypatch, *given)
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == found


BAD = {
    "line 2: no JSON": '{"prompt": "a"',
    "line 2: not a JSON object": "3",
    "line 2: prompt must be a text or a list": {"max_tokens": 3},
    "line 2: prompt must hold at least one": {"prompt": []},
    "line 2: prompt: a token id must be": {"prompt": [1, -1]},
    "line 2: unknown field 'max_new_tokens'; there are prompt": {"prompt": "a", "max_new_tokens": 3},
    "line 2: max_tokens must be a whole number from 1": {"prompt": "a", "max_tokens": 0},
    "line 2: temperature must be a number": {"prompt": "a", "temperature": "warm"},
    "line 2: top_p must be": {"prompt": "a", "top_p": 0},
    "line 2: stop must be a list": {"prompt": "a", "stop": [""]},
    "line 2: logit_bias must map": {"prompt": "a", "logit_bias": {"x": 1}},
    "line 2: n must be": {"prompt": "a", "n": 0},
    "line 2: id holds NaN or infinity": '{"prompt": "a", "id": [1e999]}',
}


@pytest.mark.parametrize("message", BAD)
def test_a_bad_line_is_named_before_the_checkpoint_is_read(monkeypatch, tmp_path, message):
    path = write(tmp_path / "prompts.jsonl", [{"prompt": "good"}, BAD[message]])
    with pytest.raises(UserError, match=message):
        run(monkeypatch, "--checkpoint", tmp_path / "none", "--batch", path, "--output", tmp_path / "answers.jsonl")
    assert [path.name for path in tmp_path.iterdir()] == ["prompts.jsonl"]


@pytest.mark.parametrize(
    "line, flags, message",
    [
        ({"prompt": "a" * 90, "max_tokens": 7}, (), "line 2: prompt of 90 tokens and max_tokens 7 are more than .*96"),
        ({"prompt": [530]}, (), "line 2: prompt: token ids must be less than 530"),
        ({"prompt": "a" * 40, "max_tokens": 9}, ("--cache-tokens", 32), "line 2: .* the cache holds 32"),
    ],
)
def test_a_line_for_which_there_is_no_room_is_named_before_anything_runs(
    checkpoint, monkeypatch, tmp_path, line, flags, message
):
    path, output = write(tmp_path / "prompts.jsonl", [{"prompt": "good"}, line]), tmp_path / "answers.jsonl"
    given = ["--checkpoint", checkpoint, "--batch", path, "--output", output, "--tokenizer", "bytes", *flags]
    with pytest.raises(UserError, match=message):
        run(monkeypatch, *given, "--max-new-tokens", 5)
    assert not output.exists()


def test_answers_go_where_a_link_or_a_pipe_leads(checkpoint, monkeypatch, tmp_path):
    path, there = write(tmp_path / "prompts.jsonl", [{"prompt": "ab"}]), tmp_path / "there.jsonl"
    given = ["--checkpoint", checkpoint, "--batch", path, "--tokenizer", "bytes", "--max-new-tokens", 5]
    (tmp_path / "link").symlink_to(there)
    run(monkeypatch, *given, "--output", tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and json.loads(there.read_text())["line"] == 1
    os.mkfifo(tmp_path / "pipe")
    with ThreadPoolExecutor() as pool:
        read = pool.submit((tmp_path / "pipe").read_text)
        run(monkeypatch, *given, "--output", tmp_path / "pipe")
        assert read.result(60) == there.read_text()
    assert (tmp_path / "pipe").is_fifo()


def test_a_full_disk_is_said(checkpoint, monkeypatch, tmp_path):
    path = write(tmp_path / "prompts.jsonl", [{"prompt": "ab"}])
    given = ["--checkpoint", checkpoint, "--batch", path, "--tokenizer", "bytes", "--max-new-tokens", 5]
    with pytest.raises(UserError, match="^--output: cannot write /dev/full: No space left on device"):
        run(monkeypatch, *given, "--output", "/dev/full")


@pytest.mark.parametrize("name", ["prompts.part", "prompts"])
def test_answers_do_not_take_the_place_of_the_prompts(monkeypatch, capsys, tmp_path, name):
    path = write(tmp_path / "prompts.part", [{"prompt": "ab"}])
    (tmp_path / name).touch()
    with pytest.raises(SystemExit):
        run(monkeypatch, "--checkpoint", "none", "--batch", path, "--output", tmp_path / name)
    assert "--output would take the place" in capsys.readouterr().err and path.read_text()


def test_a_prompt_that_is_too_long_is_refused(checkpoint, monkeypatch):
    given = ["--checkpoint", checkpoint, "--prompt", "a" * 90, "--tokenizer", "bytes"]
    with pytest.raises(UserError, match="^prompt of 90 tokens and max_tokens 7 are more than max_len, 96"):
        run(monkeypatch, *given, "--max-new-tokens", 7)


@pytest.mark.parametrize(
    "flags",
    [
        (),
        ("--prompt", "a", "--batch", "b"),
        ("--prompt", "a", "--output", "b"),
        ("--prompt", "a", "--max-rows", 0),
        ("--prompt", os.fsdecode(b"a\xff")),
    ],
)
def test_flags_that_make_no_sense_together(monkeypatch, capsys, flags):
    with pytest.raises(SystemExit) as exit:
        run(monkeypatch, "--checkpoint", "none", *flags)
    assert exit.value.code == 2 and capsys.readouterr().err.count("\n") == 1
