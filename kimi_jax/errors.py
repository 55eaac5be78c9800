"""The one exception whose message is meant for the person at the terminal."""

from collections.abc import Iterator
from contextlib import contextmanager


class UserError(ValueError):
    """Bad input. The message is one line that says what is wrong and what to do."""


@contextmanager
def os_errors_as(beginning: str) -> Iterator[None]:
    """An error of the operating system as one line, ``beginning: reason``."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{beginning}: {error.strerror or error}") from error


def one_line(error: BaseException) -> str:
    """What a command says before it exits. An error that is not the user's says so."""
    kind = "" if isinstance(error, UserError) else f"unexpected {type(error).__name__}: "
    hint = "" if isinstance(error, UserError) else " (--verbose shows the traceback)"
    return f"{kind}{' '.join(str(error).split())}{hint}"
