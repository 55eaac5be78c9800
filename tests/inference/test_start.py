"""What an engine cannot start from is said in one line."""

from __future__ import annotations

import json

import pytest

from kimi_jax.checkpoint.version import FORMAT_VERSION
from kimi_jax.errors import UserError
from kimi_jax.inference import start


def test_a_tokenizer_that_is_gone(tmp_path, monkeypatch):
    monkeypatch.setattr(start, "keep_freed_memory", lambda: None)  # not in the process of all tests
    run, gone = tmp_path / "run", tmp_path / "gone"
    for part in ("state", "meta"):
        (run / part).mkdir(parents=True)
    meta = {"format_version": FORMAT_VERSION, "config": {"data": {"tokenizer": str(gone)}}}
    (run / "meta" / "metadata").write_text(json.dumps(meta))
    with pytest.raises(UserError, match=f"cannot read the tokenizer {gone}.*; {run} names it.* --tokenizer"):
        start.load_to_serve(run)
    with pytest.raises(UserError, match="cannot read the tokenizer other: No such file or directory$"):
        start.load_to_serve(run, "other")
