"""Names: which are legal, how shards are called, how hostile ones are shown."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantkit.container.names import (
    check_name,
    check_stem,
    escaped,
    parse_shard_file_name,
    shard_file_name,
    shown,
)
from quantkit.errors import GgufError


@settings(deadline=None)
@given(st.integers(1, 65535), st.data())
def test_a_shard_name_is_parsed_back(count, data):
    no = data.draw(st.integers(0, count - 1))
    name = shard_file_name("Kimi-K2.5-Q2", no, count)
    expected = None if count == 1 else ("Kimi-K2.5-Q2", no, count)
    assert parse_shard_file_name(name) == expected


@pytest.mark.parametrize(
    "name",
    [
        "model.gguf",
        "model-0001-of-0002.gguf",
        "model-00000-of-00002.gguf",
        "model-00003-of-00002.gguf",
        "model-00001-of-99999.gguf",
        "model-00001-of-00002.gguf.partial",
        "-00001-of-00002.gguf",
        "model-٠٠٠٠١-of-٠٠٠٠٢.gguf",
    ],
)
def test_other_names_are_no_shards(name):
    assert parse_shard_file_name(name) is None


@pytest.mark.parametrize(
    "stem", ["", ".", "..", "../x", "a/b", "a\\b", ".hidden", "a\nb", "a\0b", "x" * 245, "\ud800"]
)
def test_a_stem_that_is_no_file_name_is_refused(stem):
    with pytest.raises(GgufError):
        check_stem(stem)


def test_a_stem_that_names_a_shard_is_refused():
    with pytest.raises(GgufError, match="one shard"):
        check_stem("model-00001-of-00002")


@pytest.mark.parametrize(
    ("name", "message"),
    [("", "empty"), ("é" * 32, "has 64 bytes"), ("a\0", "NUL"), ("\ud800", "not Unicode")],
)
def test_an_illegal_name_is_refused(name, message):
    with pytest.raises(GgufError, match=message):
        check_name(name, max_bytes=63, where="here")


def test_a_name_may_use_all_its_bytes():
    assert check_name("é" * 31 + "a", max_bytes=63, where="") == ("é" * 31 + "a").encode()


@settings(deadline=None)
@given(st.text())
def test_escaped_text_is_printable(text):
    assert escaped(text).isprintable()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("blk.0.ffn_up.weight", "blk.0.ffn_up.weight"),
        ("キミ", "キミ"),
        ("\x1b[2J", "\\x1b[2J"),
        ("a\u202eb", "a\\u202eb"),
        ("a\nb", "a\\nb"),
        ("\ud800", "\\ud800"),
        ("x" * 121, "x" * 120 + "…"),
    ],
)
def test_hostile_text_is_shown_escaped_and_cut(text, expected):
    assert shown(text) == expected
