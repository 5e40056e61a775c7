"""The manifest: what it may say, and how a tensor's digest is made of its chunks."""

from __future__ import annotations

import hashlib
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantkit.container.layout import TensorEntry, lay_out
from quantkit.errors import GgufError
from quantkit.types import GgmlType
from quantkit.write.manifest import (
    MAX_MANIFEST_BYTES,
    chunk_ranges,
    dump_manifest,
    load_manifest,
    manifest_path,
    tensor_digest,
)
from tests.builders.gguf import write_manifest, write_shards

TENSORS = [TensorEntry(f"t{i}", (4, 64), GgmlType.Q8_0) for i in range(4)]


@pytest.fixture
def made(tmp_path):
    layouts = lay_out("m", {}, TENSORS, max_shard_bytes=None, max_shard_tensors=2)
    data = write_shards(tmp_path, layouts)
    manifest = write_manifest(tmp_path, "m", layouts, data, n_slabs=2)
    return manifest_path(tmp_path, "m"), manifest


def test_what_is_dumped_is_loaded(made):
    path, manifest = made
    assert load_manifest(path) == manifest
    assert path.read_bytes() == dump_manifest(manifest)


def test_a_digest_is_that_of_its_chunks_digests():
    chunks = [hashlib.sha256(part).digest() for part in (b"ab", b"c")]
    assert tensor_digest(chunks) == hashlib.sha256(chunks[0] + chunks[1]).hexdigest()
    assert tensor_digest([b"".join(chunks)]) == tensor_digest(chunks)


def test_chunks_are_cut_anew_in_every_slab():
    assert list(chunk_ranges(20, 2, 4)) == [(0, 4), (4, 8), (8, 10), (10, 14), (14, 18), (18, 20)]


@settings(deadline=None)
@given(st.integers(1, 50), st.integers(1, 8), st.integers(1, 100))
def test_chunks_cover_a_tensor_without_gap_or_overlap(slab_bytes, n_slabs, chunk_bytes):
    ranges = list(chunk_ranges(slab_bytes * n_slabs, n_slabs, chunk_bytes))
    covered = [byte for begin, end in ranges for byte in range(begin, end)]
    assert covered == list(range(slab_bytes * n_slabs))
    assert all(end - begin <= chunk_bytes for begin, end in ranges)


def edit(path, *keys_and_value):
    """Replace one value, addressed by keys and indices, in the manifest file."""
    *keys, last, value = keys_and_value
    content = json.loads(path.read_bytes())
    target = content
    for key in keys:
        target = target[key]
    target[last] = value
    path.write_text(json.dumps(content))


TENSOR = ("shards", 0, "tensors", 0)


@pytest.mark.parametrize(
    "change",
    [
        ("format_version", 2),
        ("format_version", "1"),
        ("created", "yesterday"),
        ("created", "2026-01-01T00:00:00"),
        ("unknown", 1),
        ("plan", "0" * 63),
        ("source", "name", 5),
        ("recipe", "text", "x" * ((1 << 20) + 1)),
        ("shards", []),
        ("shards", 0, "file", "../m.gguf"),
        ("shards", 0, "file", "/etc/m.gguf"),
        ("shards", 0, "file", "a\\m.gguf"),
        ("shards", 0, "file", "a\0.gguf"),
        ("shards", 0, "file", "..gguf"),
        ("shards", 0, "file", "m.safetensors"),
        ("shards", 0, "file", "m-00002-of-00002.gguf"),
        ("shards", 0, "n_bytes", 600),
        ("shards", 0, "n_bytes", -1),
        ("shards", 0, "n_bytes", 1e3),
        ("shards", 0, "n_bytes", True),
        ("shards", 0, "n_bytes", 1 << 70),
        ("shards", 0, "header_sha256", "0" * 63),
        ("shards", 0, "header_sha256", "G" * 64),
        (*TENSOR, "name", ""),
        (*TENSOR, "name", "n" * 64),
        (*TENSOR, "name", "t1"),
        (*TENSOR, "type", "Q9_9"),
        (*TENSOR, "begin", 1 << 20),
        (*TENSOR, "begin", -32),
        ("shards", 0, "tensors", 1, "begin", 0),
        (*TENSOR, "n_bytes", 0),
        (*TENSOR, "n_slabs", 0),
        (*TENSOR, "n_slabs", 3),
        (*TENSOR, "n_slabs", 272),
        (*TENSOR, "chunk_bytes", 0),
        (*TENSOR, "chunk_bytes", 33),
        (*TENSOR, "sha256", None),
    ],
    ids=str,
)
def test_a_manifest_that_says_what_cannot_be_is_refused(made, change):
    path, _ = made
    edit(path, *change)
    with pytest.raises(GgufError, match="not a manifest of this version") as error:
        load_manifest(path)
    assert error.value.where == str(path)


@pytest.mark.parametrize(
    "content",
    [b"", b"[]", b"null", b"{", b"\xff", b"[" * 100_000, b'{"a":' * 100_000, b'{"a": NaN}'],
    ids=["empty", "list", "null", "open", "utf-8", "nested list", "nested object", "nan"],
)
def test_what_is_no_manifest_is_refused(made, content):
    path, _ = made
    path.write_bytes(content)
    with pytest.raises(GgufError, match="not a manifest"):
        load_manifest(path)


def test_more_chunks_than_can_be_worth_checking_are_refused(made):
    path, _ = made
    n_rows = 1 << 21
    for key, value in {"n_bytes": 34 * n_rows, "n_slabs": 1, "chunk_bytes": 34}.items():
        edit(path, *TENSOR, key, value)
    edit(path, "shards", 0, "n_bytes", 1 << 40)
    with pytest.raises(GgufError, match="more than 1048576 chunks"):
        load_manifest(path)


def test_a_manifest_larger_than_any_is_not_read(made):
    path, _ = made
    with path.open("r+b") as file:
        file.truncate(MAX_MANIFEST_BYTES + 1)
    with pytest.raises(GgufError, match="larger than"):
        load_manifest(path)


def test_a_message_does_not_repeat_control_characters(made):
    path, _ = made
    edit(path, "\x1b[31m", 1)
    with pytest.raises(GgufError) as error:
        load_manifest(path)
    assert "\x1b" not in str(error.value)
    assert "\\x1b[31m" in str(error.value)
