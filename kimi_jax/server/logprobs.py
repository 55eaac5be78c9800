"""Log probabilities as OpenAI's two endpoints write them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kimi_jax.data.detokenizer import Detokenizer
from kimi_jax.data.tokenizer import Tokenizer
from kimi_jax.server.engine import Token

LOWEST = -9999.0  # JSON has no -inf


def token_text(tokenizer: Tokenizer, token: int) -> tuple[str, bytes]:
    """A token's name and bytes. One that is no text by itself, half a character, is named by its bytes."""
    if token >= tokenizer.vocab_size:
        return f"<|unused_{token}|>", b""
    raw = tokenizer.decode_bytes([token])
    try:
        return raw.decode("utf-8"), raw
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw), raw


def chat_logprobs(tokenizer: Tokenizer, tokens: Sequence[Token]) -> dict[str, Any]:
    def entry(token: int, logprob: float | None) -> dict[str, Any]:
        text, raw = token_text(tokenizer, token)
        return {"token": text, "logprob": _number(logprob), "bytes": list(raw)}

    content = [
        {**entry(token.id, token.logprob), "top_logprobs": [entry(*pair) for pair in token.top]} for token in tokens
    ]
    return {"content": content, "refusal": None}


class CompletionLogprobs:
    """Grows with the text; ``text_offset`` counts characters from the start of what is returned."""

    def __init__(self, tokenizer: Tokenizer, keep: Sequence[str]):
        self._tokenizer, self._text = tokenizer, Detokenizer(tokenizer, keep)
        self._offset = 0

    def take(self, tokens: Sequence[Token]) -> dict[str, Any]:
        found: dict[str, list] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for token in tokens:
            pairs = list(token.top)
            if token.logprob is not None and token.id not in dict(pairs):
                pairs.append((token.id, token.logprob))
            top = {token_text(self._tokenizer, i)[0]: _number(value) for i, value in reversed(pairs)}
            found["tokens"].append(token_text(self._tokenizer, token.id)[0])
            found["token_logprobs"].append(None if token.logprob is None else _number(token.logprob))
            found["top_logprobs"].append(dict(reversed(top.items())) if top else None)
            found["text_offset"].append(self._offset)
            self._offset += len(self.text(token.id))
        return found

    def text(self, token: int) -> str:
        return self._text.feed(token)


def _number(logprob: float | None) -> float:
    return LOWEST if logprob is None else max(logprob, LOWEST)
