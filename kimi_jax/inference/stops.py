"""Nothing of a stop string is ever shown, however the text is cut into tokens."""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """Text up to whichever of ``stops`` is complete first; of several that end at one character, the longest.

    What may be the beginning of a stop string is held back: for each, the longest of its prefixes that the text ends
    with (Knuth, Morris and Pratt), so that a character costs the same however long the strings are.
    """

    def __init__(self, stops: Sequence[str] = ()):
        self.met: str | None = None
        self._held = ""
        self._matchers = [_Matcher(stop) for stop in sorted(stops, key=len, reverse=True)]

    def feed(self, text: str) -> str:
        """What ``text`` makes certain. Once a stop string is met, there is no more."""
        if self.met is not None:
            return ""
        seen, before = self._held + text, len(self._held)
        for end, char in enumerate(text, before + 1):
            found = [matcher.stop for matcher in self._matchers if matcher.feed(char)]
            if found:
                self.met, self._held = found[0], ""
                return seen[: end - len(found[0])]
        shown = len(seen) - max((matcher.n_matched for matcher in self._matchers), default=0)
        self._held = seen[shown:]
        return seen[:shown]

    def would_meet(self, text: str) -> bool:
        """Whether a stop string would be complete with ``text``."""
        return self.met is None and any(matcher.completes(text) for matcher in self._matchers)

    def finish(self) -> str:
        """What was held back, when no more text comes."""
        text, self._held = self._held, ""
        return text


class _Matcher:
    """Follows how many characters of ``stop`` the text so far ends with."""

    def __init__(self, stop: str):
        self.stop = stop
        self.n_matched = 0
        self._shorter = [0]  # [i]: the longest proper prefix of stop that stop[: i + 1] ends with
        for char in stop[1:]:
            self._shorter.append(self._next(self._shorter[-1], char))

    def feed(self, char: str) -> bool:
        self.n_matched = self._next(self.n_matched, char)
        return self.n_matched == len(self.stop)

    def completes(self, text: str) -> bool:
        n = self.n_matched
        for char in text:
            n = self._next(n, char)
            if n == len(self.stop):
                return True
        return False

    def _next(self, n: int, char: str) -> int:
        while n and self.stop[n] != char:
            n = self._shorter[n - 1]
        return n + (self.stop[n] == char)
