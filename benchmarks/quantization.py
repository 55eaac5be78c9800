"""What do eight-bit weights and an eight-bit latent cache cost in quality?

    python benchmarks/quantization.py --checkpoint runs/demo [--json FILE]
    python benchmarks/quantization.py                         # a random small model, for the mechanics alone

The model reads held-out source text of Python's standard library (or --text FILE) through the engine's forward pass:
in f32 throughout, and as it would be served, with bf16 products. "KL" is the mean over tokens of KL(f32 || served) in
nats, "top-1" how often the most likely token is the same, "loss" the mean -log p of the text.
"""

from __future__ import annotations

import argparse
import itertools
import json
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kimi_jax import cli, presets
from kimi_jax.checkpoint import fp8
from kimi_jax.checkpoint.weights import open_weights
from kimi_jax.config import ModelConfig
from kimi_jax.data import tokenizer as tokenizers
from kimi_jax.data.sources import STDLIB, SourceConfig, documents, split
from kimi_jax.errors import UserError
from kimi_jax.inference import cache
from kimi_jax.inference.forward import forward
from kimi_jax.inference.weights import Block, Read, abstract, held, serving_params
from kimi_jax.loading import tokenizer_of
from kimi_jax.model import head, init_params

ROWS = 8  # that are computed at once
HOLDOUT = 0.05  # as training has it, so that the text is new to a model of configs/debug.py


class Setting(NamedTuple):
    name: str
    dtype: str  # of the products
    weights: str
    cache: str


REFERENCE = Setting("f32", "float32", "bf16", "float32")  # "bf16": not quantised, in the dtype of the products
SETTINGS = (
    Setting("bf16", "bfloat16", "bf16", "bfloat16"),
    Setting("fp8 weights", "bfloat16", "fp8", "bfloat16"),
    Setting("int8 weights", "bfloat16", "int8", "bfloat16"),
    Setting("bf16, fp8 cache", "bfloat16", "bf16", "float8_e4m3fn"),
    Setting("fp8 weights, fp8 cache", "bfloat16", "fp8", "float8_e4m3fn"),
)


def text_tokens(spec: str, text: Path | None, n: int) -> list[int]:
    tokenizer = tokenizers.load(spec)
    if text:
        tokens = tokenizer.encode(text.read_text(encoding="utf-8"))
    else:
        held_out = split(documents(SourceConfig(STDLIB)), HOLDOUT, held_out=True)
        found = itertools.chain.from_iterable(tokenizer.encode(document.text) for document in held_out)
        tokens = list(itertools.islice(found, n))
    if len(tokens) < n:
        raise UserError(f"the text has {len(tokens)} tokens; --rows times --length asks for {n}")
    return tokens[:n]


def log_probabilities(cfg: ModelConfig, setting: Setting, read: Read, block: Block, tokens_BT: np.ndarray):
    """log softmax after every token, f32 [B, T, V], and the bytes of the weights."""
    cfg = cfg.replace(dtype=setting.dtype, param_dtype="float32")
    params = serving_params(abstract(cfg, setting.weights, block=block), cfg, setting.weights, read, block)
    (B, T), page = tokens_BT.shape, 32
    per_row = -(-T // page)
    pages_BP = jnp.asarray(1 + np.arange(ROWS * per_row).reshape(ROWS, per_row))

    @jax.jit
    def run(params, tokens_BT):
        empty = cache.init(cfg, 1 + ROWS * per_row, page, dtype=setting.cache)
        rows = jnp.zeros(ROWS, jnp.int32), jnp.full(ROWS, T), pages_BP
        x_BTD, _ = forward(params, cfg, empty, tokens_BT, *rows)
        return jax.nn.log_softmax(head(params, x_BTD), axis=-1)

    found = [np.asarray(run(params, jnp.asarray(tokens_BT[i : i + ROWS]))) for i in range(0, B, ROWS)]
    return np.concatenate(found), sum(w.nbytes for w in jax.tree.leaves(params))


def main() -> None:
    parser = cli.Parser("python benchmarks/quantization.py", "Quality of eight-bit weights and latents.", __doc__ or "")
    parser.add_argument("--checkpoint", help="what kimi_jax.load takes; default: a random small model")
    parser.add_argument("--text", type=Path, help="default: held-out text of the standard library")
    parser.add_argument("--rows", type=int, default=32, help=f"a multiple of {ROWS}")
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--json", type=Path)
    measure(parser.parse_args())


def measure(args: argparse.Namespace) -> None:
    if args.rows < 1 or args.rows % ROWS:
        raise UserError(f"--rows must be a multiple of {ROWS}, not {args.rows}")
    if args.checkpoint:
        weights = open_weights(args.checkpoint)
        cfg, block, spec = weights.cfg, weights.block, tokenizer_of(args.checkpoint)
        read: Read = lambda entry: weights.read(entry, 0, entry.shape[0])  # noqa: E731
    else:
        cfg, block, spec = presets.tiny(), fp8.BLOCK, "bytes"
        read = held(init_params(cfg, seed=0))
    if spec is None:
        raise UserError(f"{args.checkpoint} names no tokenizer")
    tokens_BT = np.asarray(text_tokens(spec, args.text, args.rows * args.length), np.int32).reshape(args.rows, -1)
    theirs, n_bytes = log_probabilities(cfg, REFERENCE, read, block, tokens_BT)
    records = [record(REFERENCE.name, theirs, theirs, tokens_BT, n_bytes)]
    for setting in SETTINGS:
        ours, n_bytes = log_probabilities(cfg, setting, read, block, tokens_BT)
        records.append(record(setting.name, theirs, ours, tokens_BT, n_bytes))
    print(f"{tokens_BT.size} tokens; KL in nats\n\n| | weights, MB | KL(f32 \\|\\| served) | top-1 | loss |")
    print("|---|---|---|---|---|")
    for r in records:
        print(f"| {r['setting']} | {r['bytes'] / 1e6:.1f} | {r['kl']:.1e} | {r['top_1']:.2%} | {r['loss']:.4f} |")
    if args.json:
        args.json.write_text(json.dumps(records, indent=1), encoding="utf-8")


def record(name: str, theirs: np.ndarray, ours: np.ndarray, tokens_BT: np.ndarray, n_bytes: int) -> dict:
    kl_BT = np.sum(np.exp(theirs.astype(np.float64)) * (theirs.astype(np.float64) - ours), axis=-1)
    chosen = np.take_along_axis(ours[:, :-1], tokens_BT[:, 1:, None], axis=-1)
    same = ours.argmax(-1) == theirs.argmax(-1)
    return {
        "setting": name,
        "bytes": n_bytes,
        "kl": float(kl_BT.mean()),
        "top_1": float(same.mean()),
        "loss": float(-chosen.mean(dtype=np.float64)),
    }


if __name__ == "__main__":
    cli.run("python benchmarks/quantization.py", main)
