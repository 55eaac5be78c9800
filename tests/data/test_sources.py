"""Sources: which files, which documents, which side of the held-out split, and what is refused."""

import json
import os
import re
import sysconfig
import tracemalloc

import pyarrow as pa
import pytest
from array_record.python import array_record_module
from pyarrow import parquet

from kimi_jax.data import sources
from kimi_jax.data.sources import Document, SourceConfig
from kimi_jax.errors import UserError

TEXTS = ["first\n", "zweites, ü", "", "三\r\n", "x" * 1000]


def write(path, texts, key="text"):
    """One file of every text, in the format that the suffix names."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".jsonl":
        path.write_text("\n\n".join(json.dumps({"id": 1, key: text}) for text in texts), encoding="utf-8")
    elif path.suffix == ".parquet":
        parquet.write_table(pa.table({"id": list(range(len(texts))), key: texts}), path, row_group_size=2)
    else:
        writer = array_record_module.ArrayRecordWriter(str(path), "group_size:2")
        for text in texts:
            writer.write(text.encode())
        writer.close()
    return path


def read(path, **options):
    return list(sources.documents(SourceConfig(str(path), **options)))


@pytest.mark.parametrize("suffix", ["jsonl", "parquet", "array_record"])
def test_files_of_many_documents(tmp_path, suffix):
    path = write(tmp_path / f"corpus.{suffix}", TEXTS)
    want = [Document(f"corpus.{suffix}#{row}", text) for row, text in enumerate(TEXTS) if text]
    assert read(path) == want
    renamed = path.rename(tmp_path / "corpus.bin")
    assert [d.text for d in read(renamed, format=suffix)] == [d.text for d in want]


def test_a_byte_order_mark_is_no_part_of_the_first_line(tmp_path):
    (tmp_path / "marked.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n{"text": "b"}\r\n')
    assert [d.text for d in read(tmp_path / "marked.jsonl")] == ["a", "b"]


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_the_key_names_the_field(tmp_path, suffix):
    path = write(tmp_path / f"corpus.{suffix}", TEXTS, key="content")
    assert [d.text for d in read(path, key="content")] == [text for text in TEXTS if text]
    with pytest.raises(UserError, match=f"corpus.{suffix}.* has no (field|column) 'text'"):
        read(path)


def test_suffixes_in_capitals(tmp_path):
    path = write(tmp_path / "corpus.jsonl", TEXTS).rename(tmp_path / "CORPUS.JSONL")
    assert [d.text for d in read(path)] == [text for text in TEXTS if text]


def test_a_parquet_file_is_read_a_few_rows_at_a_time(tmp_path):
    texts = [f"{i} " * 1000 for i in range(5000)]
    parquet.write_table(pa.table({"text": texts}), tmp_path / "a.parquet")
    size = sum(map(len, texts))
    tracemalloc.start()
    found = [hash(text) for _, text in sources.documents(SourceConfig(str(tmp_path / "a.parquet")))]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found == list(map(hash, texts)) and peak < size / 4


def test_binary_columns_are_read_as_utf8(tmp_path):
    table = pa.table({"text": pa.array([b"caf\xc3\xa9"], pa.binary())})
    parquet.write_table(table, tmp_path / "a.parquet")
    assert [d.text for d in read(tmp_path / "a.parquet")] == ["café"]


@pytest.fixture
def tree(tmp_path):
    for name in ("b.txt", "a/z.md", "a/y/deep.txt", "a.txt", ".hidden", ".git/config"):
        path = tmp_path / "corpus" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    write(tmp_path / "corpus" / "c.jsonl", ["one", "two"])
    return tmp_path / "corpus"


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("", ["a.txt", "a/y/deep.txt", "a/z.md", "b.txt", "c.jsonl#0", "c.jsonl#1"]),
        ("b.txt", ["b.txt"]),
        ("*.txt", ["a.txt", "b.txt"]),
        ("**/*.txt", ["a.txt", "a/y/deep.txt", "b.txt"]),
        ("[a-b]*", ["a.txt", "a/y/deep.txt", "a/z.md", "b.txt"]),
        ("a/*/*", ["y/deep.txt"]),
    ],
)
def test_paths(tree, pattern, names, monkeypatch):
    assert [d.name for d in read(tree / pattern)] == names
    monkeypatch.chdir(tree)
    assert [d.name for d in read(pattern or ".")] == names


def test_links_to_folders_are_followed_but_not_in_circles(tree, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "d.txt").write_text("d")
    os.symlink(other, tree / "linked")
    os.symlink(tree, other / "back")
    os.symlink(".", tree / "a" / "self")
    names = ["a.txt", "a/y/deep.txt", "a/z.md", "b.txt", "c.jsonl#0", "c.jsonl#1", "linked/d.txt"]
    assert [d.name for d in read(tree)] == names
    assert [d.name for d in read(tree / "linked*")] == [*(f"linked/back/{n}" for n in names[:-1]), "linked/d.txt"]
    assert [d.name for d in read(tree / "**")] == names
    assert [d.name for d in read(tree / "**" / "*.txt")] == [n for n in names if n.endswith(".txt")]
    assert [d.name for d in read(tree / "*" / "self" / "*.md")] == ["a/self/z.md"]  # as it says


def test_text_is_kept_byte_for_byte(tmp_path):
    content = "a\r\nb\rc\n\ufeffü".encode()
    (tmp_path / "a.txt").write_bytes(content)
    assert [d.text.encode() for d in read(tmp_path / "a.txt")] == [content]


def test_a_file_whose_name_looks_like_a_glob(tmp_path):
    (tmp_path / "a[1].txt").write_text("here")
    assert read(tmp_path / "a[1].txt") == [Document("a[1].txt", "here")]


def corrupt_parquet(path):
    content = bytearray(write(path, TEXTS).read_bytes())
    footer = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
    content[4:footer] = bytes(footer - 4)
    path.write_bytes(content)


def corrupt_record(path):
    content = bytearray(write(path, ["hello"] * 1000).read_bytes())
    content[2000] ^= 255
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("name", "fill", "message"),
    [
        ("a.txt", lambda p: p.write_bytes(b"ok\xff"), r"a.txt is not UTF-8 text \(byte 2\)"),
        ("a.jsonl", lambda p: p.write_text('{"text": "a"}\n{"text": '), "a.jsonl:2 is not valid JSON"),
        ("a.jsonl", lambda p: p.write_text("[" * 200_000), "a.jsonl:1 is not valid JSON"),
        ("a.jsonl", lambda p: p.write_text('\n{"text": "", "n": ' + "1" * 5000 + "}"), "a.jsonl:2 is not valid JSON"),
        ("a.jsonl", lambda p: p.write_bytes(b'\n{"text": "\xff"}'), "a.jsonl:2 is not UTF-8"),
        ("a.jsonl", lambda p: p.write_text('"text"'), "a.jsonl:1 has no field 'text'"),
        ("a.jsonl", lambda p: p.write_text('{"text": 3}'), "a.jsonl:1: 'text' holds int, not text"),
        ("a.jsonl", lambda p: p.write_text('{"text": "\\ud800"}'), "a.jsonl:1: .*surrogate"),
        ("a.parquet", lambda p: p.write_bytes(b"PAR1"), "a.parquet is not a readable Parquet file"),
        ("a.parquet", corrupt_parquet, "a.parquet is not a readable Parquet file"),
        ("a.parquet", lambda p: write(p, ["a", None]), "a.parquet row 1: 'text' holds NoneType"),
        ("a.array_record", lambda p: p.write_bytes(b"garbage" * 99), "a.array_record is not a readable ArrayRecord"),
        ("a.array_record", lambda p: p.write_bytes(b""), "a.array_record is not a readable ArrayRecord"),
        ("a.array_record", corrupt_record, r"a.array_record record \d+ is damaged"),
    ],
)
def test_unreadable_content(tmp_path, name, fill, message):
    fill(tmp_path / name)
    with pytest.raises(UserError, match=message) as error:
        read(tmp_path)
    assert "\n" not in str(error.value)


def test_unreadable_paths(tmp_path):
    for path in (tmp_path / "nothing.txt", tmp_path / "*.txt", tmp_path, ""):
        with pytest.raises(UserError, match="no file matches data source"):
            read(path)
    os.symlink(tmp_path / "gone", tmp_path / "link.txt")
    with pytest.raises(UserError, match="cannot read .*link.txt"):
        read(tmp_path)
    os.unlink(tmp_path / "link.txt")
    os.symlink("circle", tmp_path / "circle")
    with pytest.raises(UserError, match=f"cannot read {tmp_path}: Too many levels of symbolic links"):
        read(tmp_path)


@pytest.mark.parametrize("weight", [0, -1.0, float("nan"), float("inf")])
def test_weights_are_positive(weight):
    with pytest.raises(UserError, match="weight of data source x"):
        SourceConfig("x", weight=weight)


def test_unknown_format():
    with pytest.raises(UserError, match="unknown format 'csv' .* use text, jsonl, parquet, array_record"):
        SourceConfig("x", format="csv")


def test_stdlib_is_source_text_of_this_python():
    found = list(sources.documents(SourceConfig("stdlib")))
    names = [d.name for d in found]
    assert names == sorted(set(names))
    assert {"argparse.py", "json/decoder.py", "asyncio/base_events.py"} <= set(names)
    assert not [n for n in names if re.search("(^|/)(site-packages|tests?|encodings|_sysconfigdata)", n)]
    with open(os.path.join(sysconfig.get_path("stdlib"), "argparse.py"), "rb") as file:
        assert found[names.index("argparse.py")].text.encode() == file.read()
    assert 4e6 < sum(len(d.text) for d in found) < 20e6


def both(docs, holdout):
    return [d.name for d in sources.split(docs, holdout, False)], [d.name for d in sources.split(docs, holdout, True)]


def test_split_partitions_and_is_stable_when_documents_come_and_go():
    docs = [Document(f"dir/{i}.py", "x") for i in range(2000)]
    train, held = both(docs, 0.05)
    assert sorted(train + held) == sorted(d.name for d in docs)
    assert 60 <= len(held) <= 140  # 100 +- 4 standard deviations
    assert held == [d.name for d in docs if d.name in set(held)]
    fewer = docs[7:1500:2]
    assert both(fewer, 0.05) == tuple([d.name for d in fewer if d.name in side] for side in (train, held))
    assert set(held) < set(both(docs, 0.1)[1])
    assert both(docs, 0.0) == ([d.name for d in docs], [])


def test_split_pins_the_hash():
    """Changing the hash would move documents between training and evaluation of runs that resume."""
    docs = [Document(f"{i}.txt", "x") for i in range(100)]
    assert both(docs, 0.05)[1] == ["68.txt", "71.txt", "79.txt"]


def test_split_always_leaves_something_to_train_on():
    for n in (1, 2, 3):
        docs = [Document(f"{i}", "x") for i in range(n)]
        for holdout in (0.0, 0.5, 0.999999):
            train, held = both(docs, holdout)
            assert train and sorted(train + held) == [d.name for d in docs]
    assert both([Document("one", "x")], 0.999999) == (["one"], [])
    assert both([], 0.5) == ([], [])
