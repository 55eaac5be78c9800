"""Sources and targets in an object store, emulated in this process; and sources in any other file system of fsspec."""

from __future__ import annotations

import uuid

import boto3
import jax
import numpy as np
import pytest
from moto.server import ThreadedMotoServer

import kimi_jax
from kimi_jax.checkpoint import paths
from kimi_jax.checkpoint.convert import from_hf
from kimi_jax.checkpoint.export import to_hf
from kimi_jax.checkpoint.inspect import inspect
from kimi_jax.checkpoint.verify import verify
from kimi_jax.errors import UserError
from tests.checkpoint.examples import FP8_CONFIG, quantised, random_tensors, save_hf


@pytest.fixture(scope="module")
def bucket():
    """An S3 service on a port of its own, found by the usual variables."""
    server = ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        for name, value in {"ACCESS_KEY_ID": "a", "SECRET_ACCESS_KEY": "b", "REGION": "us-east-1"}.items():
            patch.setenv(f"AWS_{name}", value)
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        boto3.client("s3").create_bucket(Bucket="bucket")
        yield "s3://bucket"
    server.stop()


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = save_hf(tmp_path_factory.mktemp("source") / "hf", quantised(random_tensors()), **FP8_CONFIG)
    (folder / "tiktoken.model").write_text("x")
    return folder


@pytest.fixture(scope="module")
def digest(tmp_path_factory, source):
    return from_hf(source, tmp_path_factory.mktemp("local") / "t", "fp8")["digest"]


def upload(source, url: str) -> str:
    for file in source.iterdir():
        paths.write_bytes(paths.join(url, file.name), file.read_bytes())
    return url


def assert_same(found, expected):
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), found, expected)


def test_a_source_in_memory(tmp_path, source, digest):
    url = upload(source, f"memory://{uuid.uuid4().hex}")
    assert from_hf(url, tmp_path / "t", "fp8")["digest"] == digest
    assert_same(kimi_jax.load(url)[1], kimi_jax.load(source)[1])


def test_from_bucket_to_bucket(bucket, source, digest):
    url, target = upload(source, f"{bucket}/hf"), f"{bucket}/there/t"
    assert not from_hf(url, target, "fp8", (0, 2))["finished"]
    with pytest.raises(UserError, match="complete checkpoint"):
        kimi_jax.load(target)
    assert from_hf(url, target, "fp8", (1, 2), workers=4)["digest"] == digest
    assert from_hf(url, target, "fp8")["digest"] == digest  # it is there already
    assert set(paths.names(target)) == {"hf", "meta", "state"}
    assert set(paths.names(paths.join(target, "hf"))) == {"config.json", "tiktoken.model"}
    assert_same(kimi_jax.load(target)[1], kimi_jax.load(source)[1])


def test_a_bucket_resumes(bucket, source, digest, monkeypatch):
    from kimi_jax.checkpoint.arrays import Arrays

    target, original, left = f"{bucket}/resumed", Arrays.write_chunk, iter(range(50))

    def write(*args):
        if next(left, None) is None:
            raise UserError("stopped")
        original(*args)

    monkeypatch.setattr(Arrays, "write_chunk", write)
    with pytest.raises(UserError, match="stopped"):
        from_hf(source, target, "fp8", workers=1)
    monkeypatch.undo()
    found = from_hf(source, target, "fp8")
    assert (found["chunks_resumed"], found["digest"]) == (50, digest)


def test_of_several_creators_one_hears_true(bucket, tmp_path):
    for folder in (bucket, tmp_path, f"memory://{uuid.uuid4().hex}"):
        path = paths.join(folder, "once")
        assert paths.create(path, "first") and not paths.create(path, "second")
        assert paths.read_text(path) == "first"


def test_what_is_missing_is_named(bucket, tmp_path):
    with pytest.raises(UserError, match="cannot read s3://bucket/nothing/config.json"):
        from_hf(f"{bucket}/nothing", tmp_path / "t", "bf16")
    with pytest.raises(UserError, match="there is no s3://bucket/nothing"):
        kimi_jax.load(f"{bucket}/nothing")


def test_out_of_a_bucket(bucket, source, tmp_path):
    """What was converted there is inspected, compared and exported from there."""
    target = f"{bucket}/out"
    from_hf(source, target, "fp8")
    assert inspect(target).kind == "converted checkpoint"
    to_hf(target, tmp_path / "back")
    assert verify(target, source).same and verify(tmp_path / "back", upload(source, f"{bucket}/hf2"), digest=True).same
