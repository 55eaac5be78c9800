"""Ids to text as they come: whole characters only, and the same text however the ids are cut into steps."""

from __future__ import annotations

import codecs
from collections.abc import Iterable

from kimi_jax.data.tokenizer import Tokenizer


class Detokenizer:
    """Text of a growing sequence of ids. A character that spans tokens is held back until its last byte is there.

    Control tokens give no text, except those named in ``keep``, which give their name. Bytes that form no character
    become U+FFFD: those that come before a control token, a byte that cannot continue them, or the end.
    """

    def __init__(self, tokenizer: Tokenizer, keep: Iterable[str] = ()):
        self._pieces = tokenizer.pieces
        self._kept = {tokenizer.special_ids[name]: name for name in keep}
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, token: int) -> str:
        """The characters that ``token`` completes; ``""`` while one is incomplete."""
        if token < len(self._pieces):
            return self._decoder.decode(self._pieces[token])
        return self.finish() + self._kept.get(token, "")

    def finish(self) -> str:
        """What is left when no more ids come: U+FFFD for an incomplete character, else ``""``."""
        rest = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return rest
