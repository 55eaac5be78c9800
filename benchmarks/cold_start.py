"""How long from the command to the first step of training?

    python benchmarks/cold_start.py       # the demo, without kept programs and with those that this start kept

Seconds until ``step 1`` is printed, which is after its loss has been fetched.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]


def seconds_to_first_step(config: Path, programs: str) -> float:
    with tempfile.TemporaryDirectory() as workdir:
        command = [sys.executable, "-m", "kimi_jax.train", "--config", str(config), "--workdir", workdir]
        env = {"JAX_PLATFORMS": "cpu", **os.environ, "JAX_COMPILATION_CACHE_DIR": programs}
        start = time.perf_counter()
        with subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            for line in process.stdout:
                if line.startswith("step 1/"):
                    seconds = time.perf_counter() - start
                    process.kill()
                    return seconds
    raise SystemExit(f"the run ended before its first step, with exit code {process.returncode}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "debug.py")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    for _ in range(args.repeats):
        with tempfile.TemporaryDirectory() as programs:
            first, second = (seconds_to_first_step(args.config.resolve(), programs) for _ in range(2))
        print(f"first step after {first:.1f} s; with the programs kept, after {second:.1f} s")


if __name__ == "__main__":
    main()
