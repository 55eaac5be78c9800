"""What the chat APIs have in common: a dialogue with tools, to prompt ids and the constraint of its answer."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from kimi_jax.data.tokenizer import Tokenizer
from kimi_jax.errors import UserError
from kimi_jax.inference.request import Grammar
from kimi_jax.server import call_ids, grammar, template
from kimi_jax.server.errors import ApiError
from kimi_jax.server.grammar import Vocabulary, Without
from kimi_jax.server.template import Message
from kimi_jax.server.tool_constraint import ToolCalls, ToolRules
from kimi_jax.server.tool_parser import MARKERS

_NAME = re.compile(r"[^\s<>]{1,256}")


@dataclass(frozen=True)
class Format:
    """What the text of the answer must be: JSON of a schema, a match of a regular expression, or one of some texts."""

    schema: Any = None
    regex: str | None = None
    choice: tuple[str, ...] | None = None
    param: str = "response_format"

    def grammar(self) -> str:
        if self.regex is not None:
            return grammar.of_regex(self.regex)
        return grammar.of_choice(self.choice) if self.choice is not None else grammar.of_schema(self.schema)


@dataclass(frozen=True)
class Dialogue:
    messages: Sequence[Message]  # in OpenAI's form
    tools: Sequence[Mapping[str, Any]] = ()  # OpenAI's, as they came
    tool_choice: Literal["auto", "none", "required"] = "auto"
    allowed: frozenset[str] | None = None  # of the tools; None: all
    parallel: bool = True
    format: Format | None = None
    continue_final: bool = False
    add_generation_prompt: bool = True


@dataclass(frozen=True)
class Plan:
    prompt_ids: list[int]
    constraint: Callable[[], Grammar] | None  # a fresh one for each answer
    calls: bool  # whether the answer may hold calls


def prompt_ids(dialogue: Dialogue, tokenizer: Tokenizer) -> list[int]:
    messages, _ = call_ids.normalize(dialogue.messages)
    return template.to_ids(_render(dialogue, messages), tokenizer)


def _render(dialogue: Dialogue, messages: Sequence[Message]) -> list[template.Piece]:
    try:
        return template.render(messages, dialogue.tools, dialogue.add_generation_prompt, dialogue.continue_final)
    except UserError as error:
        raise ApiError(400, str(error), "messages") from error


def plan(dialogue: Dialogue, tokenizer: Tokenizer, vocabulary: Vocabulary) -> Plan:
    """Everything that can be refused is refused here, before any token."""
    functions = declared(dialogue.tools)
    _check_choice(dialogue, functions)
    messages, next_index = call_ids.normalize(dialogue.messages)
    ids = template.to_ids(_render(dialogue, messages), tokenizer)
    content = dialogue.format and compiled(vocabulary, dialogue.format.grammar, dialogue.format.param)
    names = functions.keys() if dialogue.allowed is None else functions.keys() & dialogue.allowed
    if dialogue.tool_choice == "none" or not names:
        return Plan(ids, _text_only(vocabulary, content, bool(functions)), calls=False)
    forced = dialogue.tool_choice == "required"
    arguments = {
        name: _arguments(function, forced, vocabulary, i)
        for i, (name, function) in enumerate(functions.items())
        if name in names
    }
    rules = ToolRules(arguments, next_index, forced, not dialogue.parallel, content)
    ToolCalls(vocabulary, rules)
    return Plan(ids, lambda: ToolCalls(vocabulary, rules), calls=True)


def _text_only(vocabulary: Vocabulary, content: str | None, tools: bool) -> Callable[[], Grammar] | None:
    """Without tools there is no reason for a call, and stray markers are no content; with them, calls are ruled out."""
    if content:
        return lambda: vocabulary.matcher(content)
    return (lambda: Without(vocabulary, [vocabulary.special_ids[name] for name in MARKERS])) if tools else None


def compiled(vocabulary: Vocabulary, source: Callable[[], str], param: str) -> str:
    try:
        found = source()
        vocabulary.compiled(found)
    except UserError as error:
        raise ApiError(400, str(error), param) from error
    except (ValueError, TypeError, OverflowError, RecursionError) as error:
        raise ApiError(400, f"not compilable: {' '.join(str(error).split())[:200]}", param) from error
    return found


def _arguments(function: Mapping[str, Any], forced: bool, vocabulary: Vocabulary, i: int) -> str:
    """Grammar of a function's arguments. What a forced or strict call could not honour is refused."""
    parameters, param = function.get("parameters"), f"tools[{i}].function.parameters"
    try:
        return compiled(vocabulary, lambda: grammar.of_arguments(parameters), param)
    except ApiError:
        if forced or function.get("strict"):
            raise
    try:
        return compiled(vocabulary, lambda: grammar.of_arguments(parameters, lenient=True), param)
    except ApiError:
        return grammar.of_schema({"type": "object"})


def declared(tools: Sequence[Any]) -> dict[str, Mapping[str, Any]]:
    """Functions by name."""
    found = {}
    for i, tool in enumerate(tools):
        where = f"tools[{i}]"
        if not isinstance(tool, Mapping) or tool.get("type") != "function":
            raise ApiError(400, "a tool must have type 'function'", f"{where}.type")
        function = tool.get("function")
        if not isinstance(function, Mapping):
            raise ApiError(400, "a function tool must have an object 'function'", f"{where}.function")
        name = function.get("name")
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise ApiError(400, "a name has 1 to 256 characters, no white space, < or >", f"{where}.function.name")
        if name in found:
            raise ApiError(400, f"the function {name!r} is declared twice", f"{where}.function.name")
        if not isinstance(function.get("description", ""), str | None):
            raise ApiError(400, "a description must be a string", f"{where}.function.description")
        if not isinstance(function.get("parameters", {}), Mapping | None):
            raise ApiError(400, "parameters must be a JSON schema", f"{where}.function.parameters")
        if not isinstance(function.get("strict", False), bool | None):
            raise ApiError(400, "strict must be true or false", f"{where}.function.strict")
        found[name] = function
    return found


def _check_choice(dialogue: Dialogue, functions: Mapping[str, Any]) -> None:
    unknown = sorted((dialogue.allowed or frozenset()) - functions.keys())
    if unknown:
        raise ApiError(400, f"tool_choice names {unknown[0]!r}, which is not in tools", "tool_choice")
    if dialogue.tool_choice == "required" and not functions:
        raise ApiError(400, "tool_choice asks for a call, but there are no tools", "tool_choice")
