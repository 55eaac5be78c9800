"""Memory of the host that a program frees and wants again in its next step."""

from __future__ import annotations

import ctypes
import platform

_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8  # parameters of glibc's mallopt(3)


def keep_freed_memory() -> None:
    """Lets glibc keep what is freed instead of returning it to the system; elsewhere nothing.

    XLA:CPU allocates and frees its buffers in every step. By default glibc maps and unmaps each large one, and a step
    spends a fifth of its time on page faults. Call it before arrays are made, in a program of its own.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL(None)
    libc.mallopt(_ARENA_MAX, 1)
    libc.mallopt(_MMAP_MAX, 0)
    libc.mallopt(_TRIM_THRESHOLD, -1)
