"""Which tokens an answer may go on with: JSON Schema, regular expressions and ids as masks over the vocabulary."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable
from typing import Any

import llguidance
import numpy as np

from kimi_jax.data.tokenizer import Tokenizer
from kimi_jax.errors import UserError
from kimi_jax.server import schema as schemas

# White space is one space, or a new line and its indentation: sampling cannot pad without end. There is no \uXXXX, by
# which an additional property could take a declared name.
_WHITE_SPACE = r" |\n[ \t]{0,32}"
# An object takes four items in a row for each optional property, and many more for a mask.
LIMITS = llguidance.LLParserLimits(max_items_in_row=20_000, step_max_items=500_000)
_ESCAPES = 'nrbtf\\"'


class Vocabulary:
    """A tokenizer's ids as the grammar engine sees them, up to the ``vocab_size`` of the model.

    Control tokens match no text, so that a string can hold any spelling of them but never one itself. Ids past the
    tokenizer's own are never allowed.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int):
        self.vocab_size = vocab_size
        self.stop_ids = tokenizer.stop_ids
        self.special_ids = tokenizer.special_ids
        self.text_of = tokenizer.decode
        self.ll_tokenizer = llguidance.LLTokenizer(
            llguidance.TokenizerWrapper(_Adapter(tokenizer)), eos_token=sorted(tokenizer.stop_ids)
        )
        self.compiled = functools.lru_cache(maxsize=256)(self._compile)

    def mask_of(self, ids: Iterable[int]) -> np.ndarray:
        """Exactly ``ids`` allowed."""
        mask = np.zeros((self.vocab_size + 31) // 32, np.uint32)
        for i in ids:
            mask[i // 32] |= np.uint32(1 << i % 32)
        return mask

    def matcher(self, grammar: str) -> Matcher:
        """A fresh matcher; a grammar that was seen before is not compiled again."""
        return Matcher(self.compiled(grammar).deep_copy(), len(self.mask_of([])))

    def _compile(self, grammar: str) -> llguidance.LLMatcher:
        matcher = llguidance.LLMatcher(self.ll_tokenizer, grammar, log_level=0, limits=LIMITS)
        if not matcher.is_error():
            matcher.compute_bitmask()  # finds what has no first token
        if matcher.is_error():
            raise UserError(_one_line(matcher.get_error()))
        return matcher


class Matcher:
    """The whole answer matches one grammar; then a stop id."""

    def __init__(self, matcher: llguidance.LLMatcher, words: int):
        self._matcher, self._words = matcher, words

    def mask(self) -> np.ndarray:
        known = np.frombuffer(self._matcher.compute_bitmask(), np.uint32)[: self._words]
        mask = np.zeros(self._words, np.uint32)
        mask[: len(known)] = known
        if self._matcher.is_error():
            raise UserError(f"the grammar cannot go on: {_one_line(self._matcher.get_error())}")
        return mask

    def accept(self, token: int) -> None:
        if not self._matcher.consume_token(token):
            raise UserError(f"token {token} breaks the grammar: {_one_line(self._matcher.get_error())}")


class Without:
    """Everything but some ids."""

    def __init__(self, vocabulary: Vocabulary, ids: Iterable[int]):
        self._mask = ~vocabulary.mask_of(ids)

    def mask(self) -> np.ndarray:
        return self._mask

    def accept(self, token: int) -> None:
        pass


def of_schema(schema: Any, lenient: bool = False) -> str:
    """Grammar of one JSON value. ``lenient`` ignores what cannot be enforced; otherwise it is refused."""
    return _of_normal(schemas.normalize(schema), lenient)


def of_arguments(parameters: Any, lenient: bool = False) -> str:
    """Grammar of the arguments of a function that declares ``parameters``."""
    return _of_normal(schemas.of_parameters(parameters), lenient)


def _of_normal(schema: Any, lenient: bool) -> str:
    if isinstance(schema, bool):
        schema = {} if schema else {"enum": []}
    options: Any = {"whitespace_pattern": _WHITE_SPACE, "json_allowed_escapes": _ESCAPES}
    options |= {"lenient": lenient, "coerce_one_of": lenient}
    return llguidance.LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=options)


def of_regex(pattern: str) -> str:
    return llguidance.LLMatcher.grammar_from_regex(pattern)


def of_choice(texts: Iterable[str], end: int | None = None) -> str:
    """One of ``texts``, then the control token ``end``."""
    options = " | ".join(json.dumps(text, ensure_ascii=False) for text in texts)
    return llguidance.LLMatcher.grammar_from_lark(f"start: ({options})" + ("" if end is None else f" <[{end}]>"))


def then(grammar: str, end: int) -> str:
    """What ``grammar`` matches, then the control token ``end``."""
    inner = json.loads(grammar)["grammars"][0] | {"name": "inner"}
    return json.dumps({"grammars": [{"lark_grammar": f"start: @inner <[{end}]>"}, inner]})


def _one_line(error: str) -> str:
    return " ".join(error.split("<state>")[0].split())[:300] or "no way on"


class _Adapter:
    """What ``llguidance.TokenizerWrapper`` asks of a tokenizer."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self.eos_token_id = tokenizer.special_ids["<|im_end|>"]
        self.bos_token_id = tokenizer.bos
        self.special_token_ids = sorted(tokenizer.special_ids.values())
        self.tokens = [*tokenizer.pieces, *(name.encode() for name in tokenizer.special_ids)]

    def __call__(self, text: bytes | str) -> list[int]:
        return self._tokenizer.encode(text.decode("utf-8", "replace") if isinstance(text, bytes) else text)
