"""The one exception whose message is meant for the person at the terminal."""


class UserError(ValueError):
    """Bad input. The message is one line that says what is wrong and what to do."""


def one_line(error: BaseException) -> str:
    """What a command says before it exits. An error that is not the user's says so."""
    kind = "" if isinstance(error, UserError) else f"unexpected {type(error).__name__}: "
    hint = "" if isinstance(error, UserError) else " (--verbose shows the traceback)"
    return f"{kind}{' '.join(str(error).split())}{hint}"
