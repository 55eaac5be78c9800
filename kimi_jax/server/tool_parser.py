"""Model output to text and tool calls, as it comes: a state machine over text and the five tool markers.

::

    text <|tool_calls_section_begin|>
         <|tool_call_begin|> functions.NAME:IDX <|tool_call_argument_begin|> ARGUMENTS <|tool_call_end|> ...
         <|tool_calls_section_end|>

A marker arrives as its control token or spelled in text, split anywhere; what may become one is held back. Arguments of
a call that control tokens opened are data, whatever they spell. White space around ids and arguments, in the section
and between text and a call is dropped, and so are text after a call, ids without ``:IDX`` and markers out of place.
How the output is cut into steps changes nothing but the cut of the events.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from kimi_jax.server.template import ARGUMENT_BEGIN, CALL_BEGIN, CALL_END, SECTION_BEGIN, SECTION_END

MARKERS = (SECTION_BEGIN, SECTION_END, CALL_BEGIN, ARGUMENT_BEGIN, CALL_END)
_SINGULAR = {"<|tool_call_section_begin|>": SECTION_BEGIN, "<|tool_call_section_end|>": SECTION_END}
_SPELLED = (*MARKERS, *_SINGULAR)
_MARKER = re.compile("|".join(map(re.escape, _SPELLED)))
_CERTAIN = "<|tool_call"  # a marker cut off after this is dropped; anything shorter is text
_ID = re.compile(r"(?:functions\.)?(\S+):[0-9]+")
_SPACE = " \t\r\n"


class Text(NamedTuple):
    text: str


class CallStart(NamedTuple):
    position: int  # within the message
    id: str
    name: str


class Arguments(NamedTuple):
    position: int
    text: str


class CallEnd(NamedTuple):
    position: int


Event = Text | CallStart | Arguments | CallEnd


class _State(enum.Enum):
    TEXT = enum.auto()
    SECTION = enum.auto()  # between calls
    ID = enum.auto()
    ARGUMENTS = enum.auto()
    SKIPPED = enum.auto()  # the arguments of a malformed id


class ToolParser:
    """``feed`` gives the events that are certain so far, ``finish`` the rest. A call counts once it has its CallEnd."""

    def __init__(self):
        self._state = _State.TEXT
        self._held = ""  # may become a marker
        self._space = ""  # white space that is dropped unless more follows
        self._id = ""
        self._begun = False  # whether the arguments have
        self._calls = 0
        self._spelled = False  # whether the latest marker was
        self._events: list[Event] = []

    def feed(self, text: str, control: bool = False) -> list[Event]:
        """The next piece of the output: text, or with ``control`` one marker that came as its token."""
        if control:
            self._text(self._held)
            self._held, self._spelled = "", False
            self._marker(text)
        else:
            self._scan(self._held + text)
        return self._take()

    def finish(self) -> list[Event]:
        """The output has ended. A call that it cut off gets no CallEnd."""
        if self._state is _State.TEXT and not self._held.startswith(_CERTAIN):
            self._text(self._held)
        if not self._calls and self._space:
            self._events.append(Text(self._space))
        self._held = self._space = ""
        return self._take()

    @property
    def withheld(self) -> str:
        """White space after the text that is part of it, unless a call follows."""
        return self._space if self._state is _State.TEXT and not self._calls else ""

    def _take(self) -> list[Event]:
        events, self._events = self._events, []
        return events

    def _scan(self, text: str) -> None:
        self._held = ""
        while text:
            opaque = self._state is _State.ARGUMENTS and not self._spelled
            match = None if opaque or "<" not in text else _MARKER.search(text)
            if match is None:
                cut = len(text) if opaque else _certain_length(text)
                self._text(text[:cut])
                self._held = text[cut:]
                return
            self._text(text[: match.start()])
            self._spelled = True
            self._marker(_SINGULAR.get(match[0], match[0]))
            text = text[match.end() :]

    def _text(self, text: str) -> None:
        if self._state is _State.ID:
            self._id += text
        elif self._state is _State.TEXT and not self._calls:
            if solid := self._without_trailing_space(text):
                self._events.append(Text(solid))
        elif self._state is _State.ARGUMENTS:
            text = text if self._begun else text.lstrip(_SPACE)
            self._begun |= bool(text)
            if solid := self._without_trailing_space(text):
                self._events.append(Arguments(self._calls - 1, solid))

    def _without_trailing_space(self, text: str) -> str:
        text = self._space + text
        solid = text.rstrip(_SPACE)
        self._space = text[len(solid) :]
        return solid

    def _marker(self, marker: str) -> None:
        if marker == ARGUMENT_BEGIN:
            if self._state is _State.ID:
                self._start_call()
            return
        if self._state is _State.ARGUMENTS:
            self._events.append(CallEnd(self._calls - 1))
            self._space = ""
        if marker == CALL_BEGIN:
            self._state, self._id = _State.ID, ""
        elif marker == SECTION_END:
            self._state = _State.TEXT
        elif marker == SECTION_BEGIN or self._state is not _State.TEXT:
            self._state = _State.SECTION

    def _start_call(self) -> None:
        match = _ID.fullmatch(self._id.strip(_SPACE))
        self._state = _State.ARGUMENTS if match else _State.SKIPPED
        if match:
            self._events.append(CallStart(self._calls, match[0], match[1]))
            self._calls += 1
            self._space, self._begun = "", False


def _certain_length(text: str) -> int:
    """Where the longest tail of ``text`` that may become a marker begins."""
    start = text.rfind("<")
    tail = text[start:] if start >= 0 else ""
    return start if tail and any(marker.startswith(tail) for marker in _SPELLED) else len(text)


@dataclass
class Call:
    id: str
    name: str
    arguments: str = ""
    complete: bool = False


@dataclass
class Answer:
    """What the events of one output add up to."""

    content: str = ""
    started: list[Call] = field(default_factory=list)

    @property
    def calls(self) -> list[Call]:
        """The complete ones."""
        return [call for call in self.started if call.complete]

    @property
    def whole(self) -> bool:
        """Whether there are calls, and all are complete."""
        return bool(self.started) and len(self.calls) == len(self.started)

    def add(self, events: Iterable[Event]) -> None:
        for event in events:
            match event:
                case Text(text):
                    self.content += text
                case CallStart(_, id_, name):
                    self.started.append(Call(id_, name))
                case Arguments(index, text):
                    self.started[index].arguments += text
                case CallEnd(index):
                    self.started[index].complete = True
