r"""Text to ids and back: bytes alone, or byte-pair ranks in tiktoken's format with Kimi's pattern.

Both tokenizers number their ``n_base`` ordinary tokens from 0; 256 control tokens follow, at the offsets that the
released Kimi-K2 vocabulary gives them (163,584 ranks, so ids 163584..163839). Text is ordinary unless the caller says
otherwise: ``[EOS]`` in a document becomes the five characters it is spelled with, never the control id.
"""

from __future__ import annotations

import abc
import base64
import functools
import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from kimi_jax.errors import UserError, os_errors_as

if TYPE_CHECKING:
    import tiktoken

N_SPECIAL = 256
BOS, EOS, PAD = "[BOS]", "[EOS]", "[PAD]"
NAMED = {  # offset from the first control id; every other one is <|reserved_token_ID|>
    0: BOS,
    1: EOS,
    2: "<|im_end|>",
    3: "<|im_user|>",
    4: "<|im_assistant|>",
    6: "<|start_header_id|>",
    7: "<|end_header_id|>",
    9: "[EOT]",
    10: "<|im_system|>",
    11: "<|tool_calls_section_begin|>",
    12: "<|tool_calls_section_end|>",
    13: "<|tool_call_begin|>",
    14: "<|tool_call_argument_begin|>",
    15: "<|tool_call_end|>",
    17: "<|im_middle|>",
    254: "[UNK]",
    255: PAD,
}

_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"  # && intersects: letters that are not Han
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
_SUFFIX = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
PATTERN = "|".join(
    (
        r"[\p{Han}]+",
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_SUFFIX}",
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_SUFFIX}",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)


def load(spec: str) -> Tokenizer:
    """``"bytes"``, or the path of a ``tiktoken.model`` file or of a directory that holds one."""
    return ByteTokenizer() if spec == "bytes" else TiktokenTokenizer.from_file(spec)


def special_tokens(n_base: int) -> dict[str, int]:
    """Name to id of the 256 control tokens that follow ``n_base`` ordinary ones."""
    return {NAMED.get(i, f"<|reserved_token_{n_base + i}|>"): n_base + i for i in range(N_SPECIAL)}


@dataclass(frozen=True)
class Tokenizer(abc.ABC):
    """``pieces[i]`` is the byte string of ordinary token ``i``; the 256 control tokens follow.

    ``identity`` is equal for two tokenizers exactly when both map every text to the same ids.
    """

    pieces: tuple[bytes, ...] = field(repr=False)
    identity: str

    @abc.abstractmethod
    def encode(self, text: str, allow_special: bool = False) -> list[int]:
        """The ids of ``text``; the names of control tokens are recognised in it only if ``allow_special``."""

    @property
    def vocab_size(self) -> int:
        return len(self.pieces) + N_SPECIAL

    @functools.cached_property
    def special_ids(self) -> Mapping[str, int]:
        return special_tokens(len(self.pieces))

    @property
    def bos(self) -> int:
        return self.special_ids[BOS]

    @property
    def eos(self) -> int:
        return self.special_ids[EOS]

    @property
    def pad(self) -> int:
        return self.special_ids[PAD]

    @property
    def stop_ids(self) -> frozenset[int]:
        """Where generation ends: at the end of a text or of a turn."""
        return frozenset({self.eos, self.special_ids["<|im_end|>"]})

    @functools.cached_property
    def token_bytes_V(self) -> np.ndarray:  # noqa: N802
        """UTF-8 bytes that each id stands for, int32 [V]; 0 for control tokens."""
        return np.array([len(piece) for piece in self.pieces] + [0] * N_SPECIAL, np.int32)

    @functools.cached_property
    def _bytes_of(self) -> tuple[bytes, ...]:
        return self.pieces + tuple(name.encode() for name in self.special_ids)

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """The bytes of ``ids``; a control token gives its name. A token may end inside a character."""
        for i in ids:
            if not 0 <= i < self.vocab_size:
                raise UserError(f"token id {i} lies outside this tokenizer's vocabulary of {self.vocab_size}")
        return b"".join([self._bytes_of[i] for i in ids])

    def decode(self, ids: Sequence[int]) -> str:
        """``decode_bytes`` as text; bytes that form no character become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")


@dataclass(frozen=True)
class ByteTokenizer(Tokenizer):
    """One id per UTF-8 byte, then the control tokens: a vocabulary of 512 that needs no file."""

    pieces: tuple[bytes, ...] = field(default=tuple(bytes([i]) for i in range(256)), repr=False)
    identity: str = "bytes"

    def encode(self, text: str, allow_special: bool = False) -> list[int]:
        if not allow_special:
            return list(text.encode("utf-8", errors="replace"))
        ids: list[int] = []
        for piece in self._special_pattern.split(text):
            ids += [self.special_ids[piece]] if piece in self.special_ids else self.encode(piece)
        return ids

    @functools.cached_property
    def _special_pattern(self) -> re.Pattern:
        return re.compile("(" + "|".join(map(re.escape, self.special_ids)) + ")")


@dataclass(frozen=True)
class TiktokenTokenizer(Tokenizer):
    """Byte-pair encoding over ``tiktoken.model`` ranks, split beforehand by Kimi's pattern."""

    encoding: tiktoken.Encoding

    @classmethod
    def from_file(cls, path: str | Path) -> TiktokenTokenizer:
        """From a ``tiktoken.model`` file, or a directory that holds one."""
        import tiktoken

        path = Path(path).expanduser()
        path = path / "tiktoken.model" if path.is_dir() else path
        with os_errors_as(f"cannot read the tokenizer {path}"):
            content = path.read_bytes()
        pieces = parse_ranks(content, str(path))
        encoding = tiktoken.Encoding(
            path.name,
            pat_str=PATTERN,
            mergeable_ranks={piece: rank for rank, piece in enumerate(pieces)},
            special_tokens=special_tokens(len(pieces)),
        )
        return cls(pieces, f"tiktoken:{hashlib.sha256(content).hexdigest()}", encoding)

    def encode(self, text: str, allow_special: bool = False) -> list[int]:
        ids: list[int] = []
        for piece in chunks(text):
            if allow_special:
                ids += self.encoding.encode(piece, allowed_special="all")
            else:
                ids += self.encoding.encode_ordinary(piece)
        return ids


def parse_ranks(content: bytes, where: str) -> tuple[bytes, ...]:
    """Byte strings in rank order from the lines ``base64 rank``; the ranks must be 0, 1, 2, ... in some order."""
    found: list[tuple[int, bytes]] = []
    for number, line in enumerate(content.splitlines(), 1):
        if not line.strip():
            continue
        try:
            piece, rank = line.split()
            found.append((int(rank), base64.b64decode(piece, validate=True)))
        except ValueError as error:
            raise UserError(f"{where}:{number} is not a line 'base64 rank'; is this a tiktoken.model file?") from error
    found.sort()
    pieces = tuple(piece for _, piece in found)
    if [rank for rank, _ in found] != list(range(len(found))):
        raise UserError(f"{where}: the ranks are not 0..{len(found) - 1}, each once; the file is incomplete or damaged")
    if len(set(pieces)) != len(pieces) or b"" in pieces:
        raise UserError(f"{where} holds an empty or a repeated token; the file is damaged")
    missing = set(range(256)) - {piece[0] for piece in pieces if len(piece) == 1}
    if missing:
        raise UserError(f"{where} lacks the single byte 0x{min(missing):02x}; every byte must be a token")
    return pieces


MAX_CHARS = 400_000
MAX_RUN = 25_000
_LONG_RUN = re.compile(rf"(?<!\s)\s{{{MAX_RUN + 1},}}|(?<!\S)\S{{{MAX_RUN + 1},}}")


def chunks(text: str) -> Iterator[str]:
    """Cuts ``text`` as the reference encoder does, so that no input is slow or overflows the pattern's matcher.

    First every 400,000 characters; then, inside such a piece, after every 25,000 characters of a run without a change
    between whitespace and other characters.
    """
    for start in range(0, len(text), MAX_CHARS):
        piece = text[start : start + MAX_CHARS]
        done = 0
        for run in _LONG_RUN.finditer(piece):
            for cut in range(run.start() + MAX_RUN, run.end(), MAX_RUN):
                yield piece[done:cut]
                done = cut
        yield piece[done:]
