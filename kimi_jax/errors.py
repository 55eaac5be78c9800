"""The one exception whose message is meant for the person at the terminal."""


class UserError(ValueError):
    """Bad input. The message is one line that says what is wrong and what to do."""
