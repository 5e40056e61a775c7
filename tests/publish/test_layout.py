"""Where files go, which are refused, and digests that are computed once."""

from __future__ import annotations

import hashlib
import json

import pytest

from quantkit.errors import OutputError
from quantkit.publish.digests import CACHE, git_oid, known_sha256, sha256_of
from quantkit.publish.layout import Item, check_items, label_of, path_in_repo


def item(path: str, n_bytes: int = 1) -> Item:
    return Item(path, b"", n_bytes, "0" * 64, "batch")


@pytest.mark.parametrize(
    ("stem", "recipe", "label"),
    [
        ("Kimi-K2.5-UD-TQ1_0", "UD-TQ1_0", "UD-TQ1_0"),
        ("Q4_X", "Q4_X", "Q4_X"),
        ("named-by-hand", "Q4_X", "named-by-hand"),
    ],
)
def test_a_quant_is_called_by_its_recipe(stem, recipe, label):
    assert label_of(stem, recipe) == label


def test_shards_have_a_folder_and_a_single_file_has_none():
    assert path_in_repo("M-Q-00001-of-00002.gguf", "Q", 2) == "Q/M-Q-00001-of-00002.gguf"
    assert path_in_repo("M-Q.gguf", "Q", 1) == "M-Q.gguf"


@pytest.mark.parametrize(
    ("items", "words"),
    [
        ([item("a.gguf", 50_000_000_000)], "files below 50.00 GB"),
        ([item("a.gguf"), item("a.gguf")], "two files"),
        ([item("a/x.gguf"), item("A/x.gguf")], "two files"),
        ([item("a.gguf", 0)], "is empty"),
    ],
)
def test_what_the_hub_could_not_keep_is_refused(items, words):
    with pytest.raises(OutputError, match=words):
        check_items(items)


def test_just_below_the_limit_is_fine():
    check_items([item("a.gguf", 49_999_999_999), item("b.gguf")])


def test_a_digest_is_computed_once(tmp_path):
    path, read = tmp_path / "x.gguf", []
    path.write_bytes(b"abc" * 1000)
    digest = hashlib.sha256(b"abc" * 1000).hexdigest()
    assert sha256_of(path, read.append) == digest
    assert sha256_of(path, read.append) == digest
    assert sum(read) == 3000
    assert known_sha256(path) == digest


def test_a_changed_file_is_read_again(tmp_path):
    path = tmp_path / "x.gguf"
    path.write_bytes(b"one")
    sha256_of(path)
    path.write_bytes(b"two")
    assert known_sha256(path) is None
    assert sha256_of(path) == hashlib.sha256(b"two").hexdigest()


@pytest.mark.parametrize(
    "kept",
    [b"", b"[]", b"{", b'{"x.gguf": 1}', b'{"x.gguf": {"stamp": [1], "sha256": "0"}}', b"\xff"],
)
def test_whatever_lies_in_the_place_of_kept_digests_does_no_harm(tmp_path, kept):
    path = tmp_path / "x.gguf"
    path.write_bytes(b"one")
    (tmp_path / CACHE).write_bytes(kept)
    assert sha256_of(path) == hashlib.sha256(b"one").hexdigest()
    assert "x.gguf" in json.loads((tmp_path / CACHE).read_bytes())


def test_gits_id_is_gits():
    assert git_oid(b"hello\n") == "ce013625030ba8dba906f756967f9e9ca394464a"
