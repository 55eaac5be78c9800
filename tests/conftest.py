"""Set before jax is imported: tests run on the CPU, and compiled programs are kept for the next run.

``tests/multidevice`` sees eight devices, which a process has to choose before it starts: name the folder on the
command line, as ``make test`` does, or it is not collected.
"""

import os
import sys
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[1] / ".cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")

EIGHT_DEVICES = "--xla_force_host_platform_device_count=8"
if any("multidevice" in argument for argument in sys.argv[1:]):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {EIGHT_DEVICES}"  # xdist's workers inherit it
collect_ignore = [] if EIGHT_DEVICES in os.environ.get("XLA_FLAGS", "") else ["multidevice"]
