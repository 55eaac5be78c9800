"""Tokenizers against an independent byte-pair encoder over Python's ``regex``, and against the published facts."""

import base64
import os
import random
from pathlib import Path

import pytest
import regex

from kimi_jax.data import tokenizer as tk
from kimi_jax.errors import UserError

MERGES = ["he", "ll", "hell", "hello", " w", "or", " wor", "12", "123", "你".encode()[:2], "你", "  ", "\n\n", "'s"]
TEXTS = [
    "",
    "hello hello world's  end\n\n\tnext 1234567 [EOS] <|im_end|>",
    "helloWorldFooBAR Hello你好World ひらがな漢字 a  b 😀é\u0301 \u3000x\r\n\r\n  y   ",
    "I'M we'll CAN'T it'ſ ½Ⅷ٣٤ ǅungla ʰ ___!!!\n\n...\r",
    "tail  \n \t ",
]


def rank_lines(pieces):
    return b"".join(base64.b64encode(piece) + b" %d\n" % rank for rank, piece in enumerate(pieces))


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    pieces = [bytes([i]) for i in range(256)] + [m.encode() if isinstance(m, str) else m for m in MERGES]
    path = tmp_path_factory.mktemp("vocabulary") / "tiktoken.model"
    path.write_bytes(rank_lines(pieces))
    return tk.TiktokenTokenizer.from_file(path), pieces, path


@pytest.fixture(scope="module")
def released():
    shared = Path(os.environ.get("KIMI_JAX_DATA", Path(__file__).parents[3] / "shared" / "data"))
    if not (shared / "kimi_k2_tokenizer").is_dir():
        pytest.skip("the released vocabulary is not here")
    return tk.load(str(shared / "kimi_k2_tokenizer"))


def reference_split(text):
    return [match.group() for match in regex.finditer(tk.PATTERN, text, flags=regex.V1)]


def reference_encode(text, ranks):
    """Merges the adjacent pair of lowest rank, the first such pair, until none is a token."""
    ids = []
    for word in reference_split(text):
        parts = [bytes([b]) for b in word.encode()]
        while True:
            pairs = [
                (ranks[a + b], i) for i, (a, b) in enumerate(zip(parts, parts[1:], strict=False)) if a + b in ranks
            ]
            if not pairs:
                break
            _, i = min(pairs)
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        ids += [ranks[part] for part in parts]
    return ids


def random_texts(n=150):
    alphabet = list("abXYZ  \n\r\t'sdltmrve0159.,!_<|>") + list("你好漢ひǅʰ́é😀½٣ſ\u3000\u00a0\u200d\ud7ffΩЖ")
    rng = random.Random(0)
    return ["".join(rng.choices(alphabet, k=rng.randrange(60))) for _ in range(n)]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("helloWorldFooBAR", ["hello", "World", "Foo", "BAR"]),
        ("Hello你好World", ["Hello", "你好", "World"]),
        ("ひらがな漢字", ["ひらがな", "漢字"]),
        ("1234567", ["123", "456", "7"]),
        ("a  b", ["a", " ", " b"]),
    ],
)
def test_pattern_examples(text, words):
    assert reference_split(text) == words


def test_byte_pairs_match_the_reference_encoder(small):
    tokenizer, pieces, _ = small
    ranks = {piece: rank for rank, piece in enumerate(pieces)}
    for text in TEXTS + random_texts():
        assert tokenizer.encode(text) == reference_encode(text, ranks)


def test_released_vocabulary_matches_the_reference_encoder(released):
    ranks = {piece: rank for rank, piece in enumerate(released.pieces)}
    for text in TEXTS + random_texts():
        assert released.encode(text) == reference_encode(text, ranks)


GOLDEN = {
    "You are Kimi, an AI assistant created by Moonshot AI.": (
        *(3900, 554, 24980, 72, 11, 519, 22572),
        *(26626, 5232, 673, 30218, 10065, 22572, 13),
    ),
    "system": (14062,),
    "\n": (198,),
    "## Return of functions.get_weather:0\n": (798, 6014, 318, 8271, 1150, 21055, 2800, 25, 15, 198),
    "月之暗面 Kimi": (892, 685, 5519, 696, 24980, 72),
    "def f(x):\n    return x + 1234567\n": (1166, 285, 3940, 2360, 274, 745, 1288, 715, 220, 6694, 12972, 22, 198),
    "I'll DON'T": (65447, 92629, 64833),
    " <|im_end|>[EOS]": (22652, 348, 11129, 91, 41282, 85521, 60),
}


@pytest.mark.parametrize("text", GOLDEN)
def test_released_vocabulary_keeps_its_ids(text, released):
    assert released.encode(text) == list(GOLDEN[text])


def test_released_vocabulary_has_the_published_ids(released):
    assert released.vocab_size == 163_840
    assert (released.bos, released.eos, released.pad) == (163_584, 163_585, 163_839)
    published = {"<|im_end|>": 163586, "<|im_system|>": 163594, "<|tool_call_end|>": 163599, "<|im_middle|>": 163601}
    published |= {"<|reserved_token_163589|>": 163589, "<|reserved_token_163837|>": 163837, "[UNK]": 163838}
    for name, id_ in published.items():
        assert released.special_ids[name] == id_
        assert released.encode(name, allow_special=True) == [id_]
        assert released.decode([id_]) == name
        assert max(released.encode(name)) < 163_584
    assert len(released.special_ids) == 256


@pytest.fixture(params=["bytes", "small"])
def tokenizer(request, small):
    return tk.load("bytes") if request.param == "bytes" else small[0]


def test_round_trip_and_bytes_per_token(tokenizer):
    for text in TEXTS + random_texts():
        ids = tokenizer.encode(text)
        assert all(0 <= i < tokenizer.vocab_size - 256 for i in ids)
        assert tokenizer.decode_bytes(ids) == text.encode()
        assert tokenizer.decode(ids) == text
        assert tokenizer.token_bytes_V[ids].sum() == len(text.encode())
    assert tokenizer.token_bytes_V.shape == (tokenizer.vocab_size,)
    assert not tokenizer.token_bytes_V[-256:].any()


def test_text_is_ordinary_unless_allowed(tokenizer):
    text = "a[EOS]b<|im_end|>[PAD] [eos]"
    n_base = tokenizer.vocab_size - 256
    assert (tokenizer.bos, tokenizer.eos, tokenizer.pad) == (n_base, n_base + 1, n_base + 255)
    assert max(tokenizer.encode(text)) < n_base
    a, b, tail = (tokenizer.encode(piece) for piece in ("a", "b", " [eos]"))
    want = [*a, n_base + 1, *b, n_base + 2, n_base + 255, *tail]
    assert tokenizer.encode(text, allow_special=True) == want
    assert tokenizer.decode(want) == text
    reserved = f"<|reserved_token_{n_base + 5}|>"
    assert tokenizer.encode(reserved, allow_special=True) == [n_base + 5]


def test_decode_of_half_a_character_and_of_foreign_ids(tokenizer):
    half = tokenizer.encode("é")[:1]
    assert tokenizer.decode(half) == "\ufffd"
    assert tokenizer.decode_bytes(half) == "é".encode()[:1]
    for bad in (-1, tokenizer.vocab_size):
        with pytest.raises(UserError, match=f"token id {bad} "):
            tokenizer.decode([bad])


def reference_chunks(text, max_chars=400_000, max_run=25_000):
    for start in range(0, len(text), max_chars):
        piece, current, run = text[start : start + max_chars], "", 0
        for before, char in zip(" " + piece, piece, strict=False):
            run = run + 1 if current and before.isspace() == char.isspace() else 1
            if run > max_run:
                yield current
                current, run = "", 1
            current += char
        yield current


def test_chunks_match_a_character_loop():
    rng = random.Random(1)
    texts = ["", "x", " " * 25_000, "x" * 25_001, "y" * 50_001 + "\u2003" * 75_003 + "end", "ab " * 200_000]
    texts += ["".join(rng.choice(" x") * rng.choice((1, 7, 24_999, 25_000, 25_001, 60_000)) for _ in range(20))]
    for text in texts:
        assert list(tk.chunks(text)) == list(reference_chunks(text))
        assert "".join(tk.chunks(text)) == text


def test_a_run_is_encoded_chunk_by_chunk(small):
    tokenizer, *_ = small
    text = "h" * 24_999 + "hello"
    assert tokenizer.encode(text) == tokenizer.encode(text[:25_000]) + tokenizer.encode(text[25_000:])
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_identity_tells_vocabularies_apart(small, tmp_path):
    tokenizer, pieces, path = small
    (tmp_path / "tiktoken.model").write_bytes(rank_lines(pieces[:-1]))
    other = tk.load(str(tmp_path))
    assert len({tk.load("bytes").identity, tokenizer.identity, other.identity}) == 3
    assert tk.load(str(path)).identity == tokenizer.identity


BYTES = [bytes([i]) for i in range(256)]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (rank_lines(BYTES) + b"YWI=\n", ":257 is not a line 'base64 rank'"),
        (rank_lines(BYTES) + b"Y*I= 256\n", ":257 is not a line"),
        (rank_lines(BYTES) + b"YWI= x\n", ":257 is not a line"),
        (rank_lines(BYTES) + b"YWI= 300\n", r"not 0\.\.256, each once"),
        (rank_lines(BYTES) + b"YWI= 255\n", r"not 0\.\.256, each once"),
        (rank_lines([*BYTES, b"a"]), "repeated token"),
        (rank_lines(BYTES[:-1]), "lacks the single byte 0xff"),
        (b"", "lacks the single byte 0x00"),
        (b"\x80\x04\x95garbage", ":1 is not a line"),
    ],
)
def test_damaged_rank_files(tmp_path, content, message):
    path = tmp_path / "tiktoken.model"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        tk.load(str(path))


def test_rank_files_may_come_in_any_order_with_blank_lines(tmp_path, small):
    tokenizer, pieces, _ = small
    lines = rank_lines(pieces).splitlines(keepends=True)
    random.Random(0).shuffle(lines)
    (tmp_path / "tiktoken.model").write_bytes(b"\n".join(lines) + b"\n\n")
    assert tk.load(str(tmp_path)).encode(TEXTS[1]) == tokenizer.encode(TEXTS[1])


def test_missing_file(tmp_path):
    with pytest.raises(UserError, match="cannot read the tokenizer .*nothing"):
        tk.load(str(tmp_path / "nothing"))
    with pytest.raises(UserError, match="cannot read the tokenizer .*tiktoken.model"):
        tk.load(str(tmp_path))
