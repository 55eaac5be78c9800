"""python tools/convert_ckpt.py: Hugging Face directories to checkpoints and back. ``--help`` has examples."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # from a checkout that is not installed

from kimi_jax import cli  # noqa: E402

PROG = "python tools/convert_ckpt.py"
EXAMPLES = f"""\
  {PROG} from-hf Kimi-K2-Instruct ckpt/kimi-k2                 bf16, for training and generation
  {PROG} from-hf Kimi-K2-Instruct gs://bucket/k2 --dtype fp8   the released bytes, for serving
  {PROG} to-hf runs/mine exported --dtype fp8                  for vLLM, SGLang, transformers
  {PROG} inspect ckpt/kimi-k2
  {PROG} verify Kimi-K2-Instruct ckpt/kimi-k2
"""
FROM_HF = f"""\
  {PROG} from-hf Kimi-K2-Instruct ckpt/kimi-k2 --dry-run       what it would take; config.json is enough
  {PROG} from-hf Kimi-K2-Instruct ckpt/kimi-k2                 the same command again goes on after a kill
  {PROG} from-hf s3://bucket/hf gs://bucket/k2 --shard 3/16    on the fourth of 16 hosts; the last to end finishes it
"""
TO_HF = f"""\
  {PROG} to-hf ckpt/kimi-k2-fp8 exported                       what came in as fp8 goes out byte for byte
  {PROG} to-hf runs/mine exported --dtype fp8 --shard-size 5GB
"""
INSPECT = f"  {PROG} inspect ckpt/kimi-k2\n"
VERIFY = f"""\
  {PROG} verify Kimi-K2-Instruct ckpt/kimi-k2
  {PROG} verify ckpt/a ckpt/b --digest
"""
WORKERS = min(4, os.cpu_count() or 1)


def main() -> None:
    parser = cli.Parser(PROG, "Converts checkpoints, in one pass and bounded memory, exactly.", EXAMPLES)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    add_from_hf(commands)
    add_to_hf(commands)
    add_inspect(commands)
    add_verify(commands)
    args = parser.parse_args()
    args.run(args)


def add_from_hf(commands) -> None:
    about = "Hugging Face directory (fp8, int4, bf16 or f32 safetensors) to a checkpoint"
    p = commands.add_parser("from-hf", help=about, description=about, examples=FROM_HF)
    p.add_argument("source", type=path, help="folder or URL, such as gs://bucket/hf")
    p.add_argument("target", type=path, help="folder or URL; what another run left unfinished there is continued")
    p.add_argument(
        "--dtype", choices=("bf16", "float32", "fp8"), default="bf16", help="fp8 keeps the source's bytes and scales"
    )
    p.add_argument("--workers", type=positive, default=WORKERS, help="threads; each needs some 100 MB")
    p.add_argument(
        "--shard",
        type=share,
        metavar="I/N",
        help="this host's share of the work: I = 0..N-1, or 1..N (N/N is the same as 0/N)",
    )
    p.add_argument("--dry-run", action="store_true", help="plan only: names, bytes per host, peak memory per worker")
    p.add_argument(
        "--report", type=path, metavar="FILE", help="JSON; default: TARGET.report.json, or TARGET.report-I-of-N.json"
    )
    p.set_defaults(run=from_hf)


def from_hf(args) -> None:
    from kimi_jax.checkpoint import report
    from kimi_jax.checkpoint.convert import default_share, from_hf
    from kimi_jax.checkpoint.dry_run import dry_run
    from kimi_jax.host_memory import keep_freed_memory

    keep_freed_memory()  # every unit asks for what the one before it gave back
    i, n = args.shard or default_share()
    if args.report:
        report.check(args.report)
    if args.dry_run:
        found = dry_run(args.source, args.dtype, n, args.workers)
        if args.report:
            report.write(args.report, found)
        return
    found = from_hf(args.source, args.target, args.dtype, (i, n), args.workers)
    write_report(args, found, f".report-{i}-of-{n}.json" if n > 1 else ".report.json")


def add_to_hf(commands) -> None:
    about = "checkpoint to a Hugging Face directory"
    p = commands.add_parser("to-hf", help=about, description=about, examples=TO_HF)
    p.add_argument("source", type=path, help="a converted checkpoint, a training workdir or one of its steps")
    p.add_argument("target", type=path, help="a local folder; what another run left unfinished there is continued")
    p.add_argument("--dtype", choices=("bf16", "fp8"), help="default: as stored")
    p.add_argument("--shard-size", type=size, default="5GB", metavar="BYTES", help="of a file, such as 500MB or 5GB")
    p.add_argument("--workers", type=positive, default=WORKERS, help="threads")
    p.add_argument("--report", type=path, metavar="FILE", help="JSON; default: TARGET.report.json")
    p.set_defaults(run=to_hf)


def to_hf(args) -> None:
    from kimi_jax.checkpoint import report
    from kimi_jax.checkpoint.export import to_hf

    if args.report:
        report.check(args.report)
    found = to_hf(args.source, args.target, args.dtype, args.shard_size, args.workers)
    write_report(args, found, ".report.json")


def add_inspect(commands) -> None:
    about = "say what a path holds: kind, shapes, dtypes, sizes, step"
    p = commands.add_parser("inspect", help=about, description=about, examples=INSPECT)
    p.add_argument("path", type=path)
    p.add_argument("--json", action="store_true", help="for programs")
    p.set_defaults(run=inspect)


def inspect(args) -> None:
    from kimi_jax.checkpoint.inspect import inspect

    found = inspect(args.path)
    print(found.as_json() if args.json else found)


def add_verify(commands) -> None:
    about = "compare the weights of two checkpoints of any kind; exit 0 if they are the same"
    p = commands.add_parser("verify", help=about, description=about, examples=VERIFY)
    p.add_argument("a", type=path)
    p.add_argument("b", type=path)
    p.add_argument("--tolerance", type=float, default=0.0, help="largest absolute difference that counts as the same")
    p.add_argument("--digest", action="store_true", help="compare one digest of all bits")
    p.add_argument("--workers", type=positive, default=WORKERS, help="threads")
    p.set_defaults(run=verify)


def verify(args) -> None:
    from kimi_jax.checkpoint.verify import verify

    verdict = verify(args.a, args.b, args.tolerance, args.digest, args.workers)
    print(verdict)
    if not verdict.same:
        sys.exit(1)


def write_report(args, found: dict, suffix: str) -> None:
    """Where --report says; else beside the target, if that can be written: the work is done."""
    from kimi_jax.checkpoint import paths, report
    from kimi_jax.errors import UserError

    if args.report:
        report.write(args.report, found)
        return
    beside = args.target.rstrip("/") if paths.is_remote(args.target) else os.path.abspath(args.target)
    try:
        report.write(beside + suffix, found)
    except UserError as error:
        print(f"report not written: {error}")


def path(text: str) -> str:
    from kimi_jax.checkpoint import paths

    return paths.local(text)


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a positive number, not {text!r}")
    return int(text)


def share(text: str) -> tuple[int, int]:
    i, slash, n = text.partition("/")
    if not (slash and i.isdecimal() and n.isdecimal() and int(n) > 0 and int(i) <= int(n)):
        raise argparse.ArgumentTypeError(f"must be I/N with I from 0 to N-1, not {text!r}")
    return int(i) % int(n), int(n)


def size(text: str) -> int:
    units = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
    number = text.rstrip("BbGgIiKkMm")
    unit = text[len(number) :].upper()
    try:
        return int(float(number) * units[unit])
    except (ValueError, KeyError, OverflowError):
        raise argparse.ArgumentTypeError(f"must be a size such as 500MB or 5GB, not {text!r}") from None


if __name__ == "__main__":
    cli.run(PROG, main)
