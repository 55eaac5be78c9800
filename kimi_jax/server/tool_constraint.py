"""Tool calls that are valid by construction: once the section opens, only declared names and fitting arguments.

A small state machine decides which marker, id or argument comes next; ids and arguments are matched by grammars.
Before the section the answer is free, or itself bound by a grammar.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from kimi_jax.server import grammar
from kimi_jax.server.grammar import Matcher, Vocabulary
from kimi_jax.server.template import ARGUMENT_BEGIN, CALL_BEGIN, CALL_END, SECTION_BEGIN, SECTION_END


class _State(enum.Enum):
    START = enum.auto()  # nothing yet: text or the section
    TEXT = enum.auto()
    FIRST_CALL = enum.auto()
    ID = enum.auto()
    ARGUMENTS = enum.auto()
    BETWEEN = enum.auto()
    END = enum.auto()


@dataclass(frozen=True)
class ToolRules:
    """``arguments`` maps the names that may be called to grammars of their arguments."""

    arguments: Mapping[str, str]
    next_index: int  # IDX of the first call: the dialogue's count
    forced: bool = False  # the answer is the section
    single: bool = False  # one call only
    content: str | None = None  # grammar of an answer without calls


class ToolCalls:
    """The constraint of one answer under ``rules``."""

    def __init__(self, vocabulary: Vocabulary, rules: ToolRules):
        self._vocabulary, self._rules = vocabulary, rules
        self._id_of = vocabulary.special_ids
        self._state = _State.START
        self._index = rules.next_index
        self._id: list[int] = []
        self._matcher: Matcher | None = vocabulary.matcher(rules.content) if rules.content else None
        self._names = {f"functions.{name}:": name for name in rules.arguments}
        for arguments in rules.arguments.values():  # refused before any token, not in the middle
            vocabulary.compiled(self._then_end(arguments))

    def mask(self) -> np.ndarray | None:
        match self._state:
            case _State.START if self._rules.forced:
                return self._only(SECTION_BEGIN)
            case _State.START if self._matcher:
                return self._matcher.mask() | self._only(SECTION_BEGIN)
            case _State.FIRST_CALL:
                return self._only(CALL_BEGIN)
            case _State.BETWEEN:
                return self._only(SECTION_END) if self._rules.single else self._only(CALL_BEGIN, SECTION_END)
            case _State.END:
                return self._vocabulary.mask_of(self._vocabulary.stop_ids)
        return self._matcher.mask() if self._matcher else None

    def accept(self, token: int) -> None:
        match self._state:
            case _State.START | _State.TEXT if token == self._id_of[SECTION_BEGIN] and self._may_open():
                self._state, self._matcher = _State.FIRST_CALL, None
            case _State.START | _State.TEXT if token == self._id_of[CALL_BEGIN] and self._may_open():
                self._begin_call()  # the parser needs no section
            case _State.START | _State.TEXT:
                self._state = _State.TEXT
                if self._matcher:
                    self._matcher.accept(token)
            case _State.FIRST_CALL | _State.BETWEEN:
                self._begin_call() if token == self._id_of[CALL_BEGIN] else self._end_section()
            case _State.ID:
                self._accept_id(token)
            case _State.ARGUMENTS:
                self._matched().accept(token)
                if token == self._id_of[CALL_END]:
                    self._state, self._matcher = _State.BETWEEN, None

    def _may_open(self) -> bool:
        return self._state is _State.START or self._matcher is None

    def _begin_call(self) -> None:
        ids = [f"{prefix}{self._index}" for prefix in self._names]
        self._matcher = self._vocabulary.matcher(grammar.of_choice(ids, self._id_of[ARGUMENT_BEGIN]))
        self._state, self._id = _State.ID, []
        self._index += 1

    def _accept_id(self, token: int) -> None:
        self._matched().accept(token)
        if token != self._id_of[ARGUMENT_BEGIN]:
            self._id.append(token)
            return
        name = self._names[self._vocabulary.text_of(self._id).removesuffix(str(self._index - 1))]
        self._state = _State.ARGUMENTS
        self._matcher = self._vocabulary.matcher(self._then_end(self._rules.arguments[name]))

    def _end_section(self) -> None:
        self._state, self._matcher = _State.END, None

    def _matched(self) -> Matcher:
        assert self._matcher is not None
        return self._matcher

    def _only(self, *names: str) -> np.ndarray:
        return self._vocabulary.mask_of(self._id_of[name] for name in names)

    def _then_end(self, arguments: str) -> str:
        return grammar.then(arguments, self._id_of[CALL_END])
