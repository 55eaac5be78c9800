"""python -m kimi_jax.generate: continues a prompt. ``--help`` has examples."""

from __future__ import annotations

import sys

from kimi_jax import cli
from kimi_jax.errors import UserError

PROG = "python -m kimi_jax.generate"
EXAMPLES = f"""\
  {PROG} --checkpoint runs/demo --prompt 'def main('
  {PROG} --checkpoint runs/demo --prompt 'import ' --temperature 0.8 --seed 3 --max-new-tokens 400
  {PROG} --checkpoint ckpt/k2 --prompt 'The sky is' --tokenizer path/to/tiktoken.model
  {PROG} --checkpoint path/to/hf_directory --prompt 'The capital of France' --dtype bfloat16
"""


def main() -> None:
    parser = cli.Parser(PROG, "Continues a prompt with a trained checkpoint or a Hugging Face directory.", EXAMPLES)
    parser.add_argument(
        "--checkpoint", required=True, help="a training workdir, a converted checkpoint, or a Hugging Face directory"
    )
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--temperature", type=float, default=0.0, help="0 (the default) takes the most likely token")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), help="of the computation; default: as stored")
    parser.add_argument("--tokenizer", help="'bytes' or a tiktoken.model; default: the checkpoint's own")
    args = parser.parse_args()
    if args.max_new_tokens < 1 or args.temperature < 0:
        parser.error("--max-new-tokens must be at least 1 and --temperature at least 0")
    generate(args)


def generate(args) -> None:
    from kimi_jax.inference import decode
    from kimi_jax.loading import load_to_generate

    tokenizer, cfg, params = load_to_generate(args.checkpoint, args.tokenizer, args.dtype)
    prompt = tokenizer.encode(args.prompt) or [tokenizer.bos]
    room = cfg.max_position_embeddings - args.max_new_tokens
    if len(prompt) > room:
        raise UserError(f"the prompt has {len(prompt)} tokens; with --max-new-tokens there is room for {room}")
    tokens = decode.generate(
        params, cfg, [prompt], new_tokens=args.max_new_tokens, temperature=args.temperature, seed=args.seed
    )
    ids, shown = list(prompt), ""
    for token_B in tokens:
        token = int(token_B[0])
        if token in tokenizer.stop_ids or token >= tokenizer.vocab_size:
            break
        ids.append(token)
        text = tokenizer.decode(ids)
        whole = text.rstrip("\ufffd")  # a character whose bytes are not all there yet
        sys.stdout.write(whole[len(shown) :])
        sys.stdout.flush()
        shown = whole
    print()


if __name__ == "__main__":
    cli.run(PROG, main)
