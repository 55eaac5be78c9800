"""What every command line shares: one-line errors, truthful exit codes, --verbose for the traceback."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable

from kimi_jax.errors import one_line

CACHE_DTYPES = ("bfloat16", "float32", "float8_e4m3fn")  # for the flags that name that of the latent cache


class Parser(argparse.ArgumentParser):
    """An ``ArgumentParser`` with ``--verbose``, examples in the help, and errors on one line."""

    def __init__(self, prog: str, description: str, examples: str):
        super().__init__(
            prog=prog,
            description=description,
            epilog=f"examples:\n{examples}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        self.add_argument("--verbose", action="store_true", help="show the traceback of an error")

    def add_processes(self) -> None:
        """Flags for a run on several processes, for ``pods.cluster.Told``."""
        several = self.add_argument_group("several processes", "found by themselves on TPU VMs, GKE and Slurm")
        several.add_argument("--coordinator", metavar="HOST:PORT", help="of process 0; or JAX_COORDINATOR_ADDRESS")
        several.add_argument("--process", type=int, metavar="N", help="which one this is, from 0; or JAX_PROCESS_ID")
        several.add_argument("--processes", type=int, metavar="M", help="how many there are; or JAX_NUM_PROCESSES")

    def parse_with_overrides(self) -> tuple[argparse.Namespace, list[str]]:
        """The arguments, and apart from them ``--config.KEY=VALUE``."""
        args, overrides = self.parse_known_args()
        if getattr(args, "config.KEY") is not None:
            self.error("KEY of --config.KEY stands for an entry of the config, as in --config.steps=50")
        for override in overrides:
            if not override.startswith("--config.") or "=" not in override:
                self.error(f"unknown argument {override!r}; overrides are written --config.KEY=VALUE")
        return args, overrides

    def error(self, message: str):
        print(f"{self.prog}: {message} (see --help)", file=sys.stderr)
        sys.exit(2)


def run(prog: str, main: Callable[[], None]) -> None:
    """Calls ``main`` and exits: 0, or 1 after one line on what is wrong. An error that is not the user's says so."""
    verbose = "--verbose" in sys.argv
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:  # the reader, such as `head`, has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        sys.exit(f"{prog}: interrupted")
    except Exception as error:
        if verbose:
            raise
        sys.exit(f"{prog}: {one_line(error)}")
