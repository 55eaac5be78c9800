"""Work in threads that ends with the first error."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T")


def for_each(f: Callable[[T], Any], items: Iterable[T], workers: int) -> None:
    """Calls ``f`` on every item. After the first error nothing new is begun; it is raised when all have stopped.

    Threads take the items themselves, for a queue would hold them all. No item is None.
    """
    pending, lock, stop = iter(items), threading.Lock(), threading.Event()

    def work() -> None:
        try:
            while not stop.is_set():
                with lock:
                    item = next(pending, None)
                if item is None:
                    return
                f(item)
        except BaseException:
            stop.set()
            raise

    with ThreadPoolExecutor(workers) as pool:
        futures = [pool.submit(work) for _ in range(workers)]
        try:
            for future in futures:
                future.result()
        finally:
            stop.set()
