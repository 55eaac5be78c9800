"""python -m kimi_jax.generate: continues a prompt, or every prompt of a file. ``--help`` has examples."""

from __future__ import annotations

import contextlib
import functools
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from kimi_jax import cli
from kimi_jax.errors import UserError, os_errors_as

if TYPE_CHECKING:
    from kimi_jax.inference.request import Event
    from kimi_jax.pods.session import Session

PROG = "python -m kimi_jax.generate"
EXAMPLES = f"""\
  {PROG} --checkpoint runs/demo --prompt 'def main('
  {PROG} --checkpoint runs/demo --prompt 'import ' --temperature 0.8 --top-p 0.95 --seed 3 --max-new-tokens 400
  {PROG} --checkpoint ckpt/k2 --prompt 'The sky is' --tokenizer path/to/tiktoken.model --stop '.'
  {PROG} --checkpoint path/to/hf_directory --prompt 'The capital of France' --dtype bfloat16
  {PROG} --checkpoint ckpt/k2 --batch prompts.jsonl --output answers.jsonl --max-rows 128

A line of --batch is {{"prompt": TEXT or [token ids]}}, and if need be "id", "max_tokens", "n", "stop", "seed",
"temperature" and the like; the flags say what holds for lines that do not. Answers come in the order of the lines.
"""


def main() -> None:
    parser = cli.Parser(PROG, "Continues prompts with a trained checkpoint or a Hugging Face directory.", EXAMPLES)
    parser.add_argument(
        "--checkpoint", required=True, help="a training workdir, a converted checkpoint, or a Hugging Face directory"
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--prompt")
    what.add_argument("--batch", type=Path, metavar="FILE", help="JSON lines, a prompt on each")
    parser.add_argument("--output", type=Path, metavar="FILE", help="of the answers to --batch; default: stdout")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--temperature", type=float, default=0.0, help="0 (the default) takes the most likely token")
    parser.add_argument(
        "--top-p", type=float, default=1.0, help="draw from the most likely tokens with this much chance"
    )
    parser.add_argument("--top-k", type=int, default=0, help="draw from so many tokens; 0 (the default): all")
    parser.add_argument("--min-p", type=float, default=0.0, help="leave out what is less likely, against the likeliest")
    parser.add_argument("--stop", action="append", default=[], help="end before this text; several are possible")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), help="of the computation; default: the model's")
    parser.add_argument("--tokenizer", help="'bytes' or a tiktoken.model; default: the checkpoint's own")
    parser.add_argument("--max-rows", type=int, default=64, help="answers that are generated at once")
    parser.add_argument("--cache-tokens", type=int, help="that the latent cache holds; default: what the prompts need")
    parser.add_argument("--weights", choices=("fp8", "int8"), help="on the device; default: as they are computed with")
    parser.add_argument("--cache-dtype", choices=cli.CACHE_DTYPES, help="of the latent cache")
    parser.add_processes()
    args = parser.parse_args()
    if args.max_new_tokens < 1 or args.max_rows < 1 or (args.cache_tokens is not None and args.cache_tokens < 1):
        parser.error("--max-new-tokens, --max-rows and --cache-tokens must be at least 1")
    if args.prompt and args.prompt.encode(errors="ignore").decode() != args.prompt:
        parser.error("--prompt is not UTF-8")
    if args.output and not args.batch:
        parser.error("--output is for the answers to --batch")
    if args.output and args.batch.resolve() in (args.output.resolve(), unfinished(args.output.resolve())):
        parser.error("--output would take the place of --batch: give it another name")
    from kimi_jax.pods import serving

    with serving.joined(PROG, args) as session:
        generate(args, session)


def generate(args, session: Session) -> None:
    from kimi_jax.inference import offline
    from kimi_jax.inference.request import Request, Sampling
    from kimi_jax.inference.start import load_to_serve
    from kimi_jax.pods.serving import follow, leading

    sampling = Sampling(temperature=args.temperature, top_k=args.top_k, top_p=args.top_p, min_p=args.min_p)
    default = Request((0,), sampling, args.max_new_tokens, stop=tuple(args.stop))
    if session.process:
        return follow(session, load_to_serve(args.checkpoint, args.tokenizer, args.dtype, args.weights))
    jobs = offline.read(args.batch, default) if args.batch else [offline.Job(0, None, args.prompt, default)]
    with whole(args.output) as write:
        model = load_to_serve(args.checkpoint, args.tokenizer, args.dtype, args.weights)
        jobs = offline.encode(jobs, model.tokenizer, model.cfg)
        requests = [job.request for job in jobs]
        limits = offline.limits_for(requests, model.cfg, args.max_rows, args.cache_tokens, model.devices)
        offline.check(jobs, limits)
        with leading(session, model, limits, args.cache_dtype, tokenizer=model.tokenizer, seed=args.seed) as engine:
            events = engine.generate(requests)
            if not args.batch:
                return show(args.prompt, events)
            progress = Progress(len(jobs))
            for answer in offline.answers(jobs, progress.watch(events)):
                line = json.dumps(answer, ensure_ascii=False)
                # An id may hold half a surrogate pair, which UTF-8 cannot.
                write(line.encode(errors="backslashreplace").decode() + "\n")
                progress.answered()
    progress.close()


def show(prompt: str, events: Iterable[Event]) -> None:
    """The text as it comes."""
    sys.stdout.write(prompt)
    for event in events:
        sys.stdout.write(event.text)
        sys.stdout.flush()
        if event.finish == "error":
            raise UserError(str(event.message))
    print()


@contextlib.contextmanager
def whole(path: Path | None) -> Iterator[Callable[[str], None]]:
    """What writes to stdout, or to a file that has another name until it is whole."""
    if path is None:
        yield functools.partial(print, end="", flush=True)
        return
    if path.is_dir():
        raise UserError(f"--output: {path} is a directory")
    special = path.exists() and not path.is_file()  # a pipe or a device is written to as it is
    path = path if special else path.resolve()  # a link stays one
    written = path if special else unfinished(path)
    named = functools.partial(os_errors_as, f"--output: cannot write {written}")
    with named():
        file = open(written, "w", encoding="utf-8")

    def write(text: str) -> None:
        with named():
            file.write(text)
            file.flush()

    try:
        yield write
    finally:
        with named():
            file.close()
    if not special:
        written.replace(path)


def unfinished(path: Path) -> Path:
    return path.with_name(path.name + ".part")


class Progress:
    """On stderr: a line that is written over on a terminal, elsewhere one every few seconds; the rate at the end."""

    def __init__(self, n_prompts: int):
        self._n_prompts, self._n_answered, self._n_failed, self._n_tokens = n_prompts, 0, 0, 0
        self._terminal = sys.stderr.isatty()
        self._began = self._said = time.monotonic()

    def watch(self, events: Iterable[Event]) -> Iterator[Event]:
        for event in events:
            self._n_tokens += len(event.tokens)
            self._n_failed += event.finish == "error"
            now = time.monotonic()
            if now - self._said > (0.2 if self._terminal else 10):
                self._said = now
                print(self._line(now), file=sys.stderr, end="\r" if self._terminal else "\n", flush=True)
            yield event

    def answered(self) -> None:
        self._n_answered += 1

    def close(self) -> None:
        print(self._line(time.monotonic()), file=sys.stderr)
        if self._n_failed:
            raise UserError(f"{self._n_failed} answers ended with an error: see their message")

    def _line(self, now: float) -> str:
        seconds = now - self._began
        done = f"{self._n_answered} of {self._n_prompts} prompts answered, {self._n_tokens} tokens"
        return f"{done} in {seconds:.1f} s ({self._n_tokens / max(seconds, 1e-9):.1f} tokens/s)"


if __name__ == "__main__":
    cli.run(PROG, main)
