"""The chat format: ``MARKER label <|im_middle|> body <|im_end|>`` per message, nothing between turns.

Rendering keeps two kinds of pieces apart: control tokens, which only this file writes, and text, which becomes ordinary
ids whatever it spells. Neighbouring texts are encoded as one, so that byte pairs form across them.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from kimi_jax.data.tokenizer import Tokenizer
from kimi_jax.errors import UserError

DEFAULT_SYSTEM = "You are Kimi, an AI assistant created by Moonshot AI."

END = "<|im_end|>"
MIDDLE = "<|im_middle|>"
SYSTEM = "<|im_system|>"
MARKERS = {"user": "<|im_user|>", "assistant": "<|im_assistant|>"}  # every other role is SYSTEM
SECTION_BEGIN, SECTION_END = "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"
CALL_BEGIN, ARGUMENT_BEGIN, CALL_END = "<|tool_call_begin|>", "<|tool_call_argument_begin|>", "<|tool_call_end|>"

Message = Mapping[str, Any]  # in OpenAI's form


class Piece(NamedTuple):
    text: str
    control: bool = False  # the name of a control token


def render(
    messages: Sequence[Message],
    tools: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = True,
    continue_final: bool = False,
) -> list[Piece]:
    """The dialogue as pieces. With ``continue_final`` the last message stays open, for the model to go on with it."""
    return list(_render(messages, tools, add_generation_prompt, continue_final))


def to_text(pieces: Sequence[Piece]) -> str:
    """For reading only: here a marker that a client spelled looks like one of the frame."""
    return "".join(piece.text for piece in pieces)


def to_ids(pieces: Sequence[Piece], tokenizer: Tokenizer) -> list[int]:
    ids: list[int] = []
    for control, group in itertools.groupby(pieces, key=lambda piece: piece.control):
        if control:
            ids += [tokenizer.special_ids[piece.text] for piece in group]
        else:
            ids += tokenizer.encode(to_text(list(group)))
    return ids


def _render(messages, tools, add_generation_prompt: bool, continue_final: bool) -> Iterator[Piece]:
    if tools:
        declaration = dumps(tools, sort_keys=True, separators=(",", ":"))
        yield from _turn(SYSTEM, "tool_declare", [Piece(declaration)])
    if messages and messages[0]["role"] != "system":
        yield from _turn(SYSTEM, "system", [Piece(DEFAULT_SYSTEM)])
        yield Piece("\n")  # only after this turn
    for i, message in enumerate(messages):
        role = message["role"]
        turn = _turn(MARKERS.get(role, SYSTEM), message.get("name") or role, _body(message))
        if continue_final and i == len(messages) - 1:
            yield from turn[:-1]
            return
        yield from turn
    if add_generation_prompt:
        yield from (Piece(MARKERS["assistant"], True), Piece("assistant"), Piece(MIDDLE, True))


def _turn(marker: str, label: str, body: list[Piece]) -> list[Piece]:
    return [Piece(marker, True), Piece(label), Piece(MIDDLE, True), *body, Piece(END, True)]


def _body(message: Message) -> list[Piece]:
    text = content_text(message.get("content"))
    if message["role"] == "tool":
        return [Piece(f"## Return of {message.get('tool_call_id') or ''}\n{text}")]
    calls = message.get("tool_calls") if message["role"] == "assistant" else None
    if not calls:
        return [Piece(text)]
    section = [Piece(text), Piece(SECTION_BEGIN, True)]
    for call in calls:
        arguments = call["function"].get("arguments", "")
        text = arguments if isinstance(arguments, str) else dumps(arguments)
        section += [Piece(CALL_BEGIN, True), Piece(call.get("id") or ""), Piece(ARGUMENT_BEGIN, True)]
        section += [Piece(text), Piece(CALL_END, True)]
    return [*section, Piece(SECTION_END, True)]


def content_text(content: str | Sequence[Mapping[str, Any]] | None) -> str:
    """A string as it is, the texts and refusals of a list of parts joined without separators, nothing for ``None``."""
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, list | tuple):
        raise UserError("content must be a string, null or a list of text parts")
    texts = []
    for part in content:
        kind = part.get("type", "text") if isinstance(part, Mapping) else type(part).__name__
        text = part.get(kind) if kind in ("text", "refusal") else None
        if not isinstance(text, str):
            raise UserError(f"content part of type {kind!r}: this model reads text only")
        texts.append(text)
    return "".join(texts)


def dumps(value: Any, **options: Any) -> str:
    """JSON with non-ASCII unescaped."""
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False, **options)
    except (ValueError, TypeError, RecursionError) as error:
        raise UserError(f"not representable as JSON: {error}") from error
