"""python -m kimi_jax.serve: a checkpoint behind the HTTP APIs of OpenAI and Anthropic. ``--help`` has examples."""

from __future__ import annotations

from kimi_jax import cli
from kimi_jax.errors import UserError

PROG = "python -m kimi_jax.serve"
EXAMPLES = f"""\
  {PROG} --checkpoint runs/demo
  {PROG} --checkpoint ckpt/k2 --host 0.0.0.0 --port 8080 --api-key first --api-key second
  {PROG} --checkpoint path/to/hf_directory --dtype bfloat16 --max-model-len 8192 --cache-tokens 65536
"""
PAGE_SIZE = 16


def main() -> None:
    parser = cli.Parser(PROG, "Serves a trained checkpoint or a Hugging Face directory over HTTP.", EXAMPLES)
    parser.add_argument(
        "--checkpoint", required=True, help="a training workdir, a converted checkpoint, or a Hugging Face directory"
    )
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--api-key", action="append", default=[], help="several are possible; none: no key needed")
    parser.add_argument("--model-name", action="append", default=[], help="what clients call it; default: kimi_jax")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), help="of the computation; default: as stored")
    parser.add_argument("--tokenizer", help="'bytes' or a tiktoken.model; default: the checkpoint's own")
    parser.add_argument("--max-model-len", type=int, help="tokens of prompt and answer; default: 4096, or the model's")
    parser.add_argument("--max-rows", type=int, default=64, help="answers that are generated at once")
    parser.add_argument("--cache-tokens", type=int, default=65536, help="that the latent cache holds")
    args = parser.parse_args()
    serve(args)


def serve(args) -> None:
    try:
        from kimi_jax.server import run
        from kimi_jax.server.app import Settings, create_app
        from kimi_jax.server.engine_thread import EngineThread
        from kimi_jax.server.service import Service
    except ModuleNotFoundError as error:
        raise UserError(f"{error.name} is not installed: pip install 'kimi_jax[serve]'") from error
    from kimi_jax.inference.engine import Engine
    from kimi_jax.inference.limits import Limits
    from kimi_jax.loading import load_to_generate

    tokenizer, cfg, params = load_to_generate(args.checkpoint, args.tokenizer, args.dtype)
    limits = Limits(
        n_pages=1 + -(-args.cache_tokens // PAGE_SIZE),
        page_size=PAGE_SIZE,
        max_len=args.max_model_len or min(4096, cfg.max_position_embeddings),
        vocab_size=cfg.vocab_size,
        max_rows=args.max_rows,
    )
    with EngineThread(Engine(params, cfg, limits), cfg.vocab_size, limits.max_len) as engine:
        service = Service(engine, tokenizer, args.model_name or ["kimi_jax"])
        run.serve(create_app(service, Settings(api_keys=tuple(args.api_key))), args.host, args.port)


if __name__ == "__main__":
    cli.run(PROG, main)
