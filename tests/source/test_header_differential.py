"""The header reader against the `safetensors` package: same verdict, same bytes.

Where the package accepts a file and quantkit does not, the reason must be one of DIFFERENCES.
There is no difference in the other direction.
"""

from __future__ import annotations

import json
from math import prod

import hypothesis.strategies as st
import pytest
import safetensors
from hypothesis import given, settings

from quantkit.errors import SourceError
from quantkit.source.header import DTYPE_BITS, parse_header
from tests.builders.safetensors import dtype_bits, file_bytes
from tests.source.hostile import HOSTILE

# Part of quantkit's message -> why the package's leniency is not shared.
DIFFERENCES = {
    "does not begin with '{'": "the format asks for it; the package lets white space pass",
    "occurs twice": "the package keeps the last of two tensors with the same name",
    "strings to strings": "the package takes null for no metadata",
    "does not print": "names that hide or forge what a terminal shows",
    "and nothing else": "unknown keys, and entries spelled as lists",
    "unknown dtype": "a dtype spelled as an object",
    "at most 16": "no tensor has more dimensions",
    "integers from 0 to 2^63 - 1": "the package takes an unsigned dimension beside a zero",
    "overflows": "rows of an empty tensor must stay countable",
}

plain_names = st.text("abw.0_ é", min_size=1, max_size=6)
names = plain_names | st.text(st.characters(codec="utf-8"), max_size=6)
junk = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 2**65) | st.floats() | names,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=2),
    max_leaves=4,
)


@st.composite
def sound_headers(draw, names=names):
    """A header whose tensors tile `n_bytes` of data, in any order of names."""
    entries, position = {}, 0
    for name in draw(st.lists(names, max_size=3, unique=True)):
        dtype = draw(st.sampled_from(sorted(DTYPE_BITS)))
        shape = draw(st.lists(st.integers(0, 3), max_size=3))
        if prod(shape) * dtype_bits(dtype) % 8:
            shape = [*shape, 4]
        n_bytes = prod(shape) * dtype_bits(dtype) // 8
        offsets = [position, position + n_bytes]
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
        position += n_bytes
    order = draw(st.permutations(sorted(entries)))
    header = {name: entries[name] for name in order}
    if draw(st.booleans()):
        header["__metadata__"] = draw(st.dictionaries(names, names, max_size=2))
    return header, position


@st.composite
def broken_headers(draw):
    """A sound header with one value replaced, or a key dropped or added, somewhere."""
    header, n_bytes = draw(sound_headers())
    spots = [header]
    for entry in header.values():
        spots += [entry, *(value for value in entry.values() if isinstance(value, list))]
    spot = draw(st.sampled_from(spots))
    keys = list(spot) if isinstance(spot, dict) else list(range(len(spot)))
    action = draw(st.sampled_from(["replace", "nudge", "drop", "add"] if keys else ["add"]))
    if action == "add":
        spot.append(draw(junk)) if isinstance(spot, list) else spot.update(
            {draw(names): draw(junk)}
        )
        return header, n_bytes
    key = draw(st.sampled_from(keys))
    if action == "drop":
        del spot[key]
    elif action == "nudge" and type(spot[key]) is int:
        spot[key] += draw(st.integers(-2, 2))
    else:
        spot[key] = draw(junk)
    return header, n_bytes


@st.composite
def scarred_texts(draw):
    """A sound header's text with a few bytes overwritten, removed or inserted."""
    header, n_bytes = draw(sound_headers())
    text = bytearray(json.dumps(header).encode())
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(text)))
        new = draw(st.sampled_from([b"", b'"', b"{", b"}", b",", b"0", b"-", b".", b" ", b"\\u00"]))
        text[at : at + draw(st.integers(0, 2))] = new
    return bytes(text), n_bytes


def package_verdict(content):
    try:
        tensors = safetensors.deserialize(content)
    except safetensors.SafetensorError:
        return None
    return {name: (t["dtype"], tuple(t["shape"]), bytes(t["data"])) for name, t in tensors}


def our_verdict(content):
    n_header = int.from_bytes(content[:8], "little")
    refs = parse_header(content[8 : 8 + n_header], len(content), "model.safetensors")
    return {ref.name: (ref.dtype, ref.shape, content[ref.begin : ref.end]) for ref in refs}


def with_data(text, n_bytes):
    """A file whose data bytes name their position: equal slices are slices of one place."""
    return file_bytes(text, (bytes(range(256)) * (n_bytes // 256 + 1))[:n_bytes])


def assert_same_verdict(text, n_bytes):
    content = with_data(text, n_bytes)
    expected = package_verdict(content)
    try:
        ours = our_verdict(content)
    except SourceError as error:
        known = any(part in error.message for part in DIFFERENCES)
        assert expected is None or known, error.message
    else:
        assert ours == expected


@settings(max_examples=400, deadline=None)
@given(sound_headers(plain_names))
def test_what_a_sound_tool_would_write_is_read_the_same(case):
    header, n_bytes = case
    content = with_data(json.dumps(header), n_bytes)
    expected = package_verdict(content)
    assert expected is not None
    assert our_verdict(content) == expected


@settings(max_examples=800, deadline=None)
@given(broken_headers())
def test_a_header_with_one_wrong_value_is_judged_the_same(case):
    header, n_bytes = case
    assert_same_verdict(json.dumps(header).encode(), n_bytes)


@settings(max_examples=800, deadline=None)
@given(scarred_texts())
def test_a_header_with_damaged_bytes_is_judged_the_same(case):
    assert_same_verdict(*case)


@pytest.mark.parametrize("name", HOSTILE)
def test_the_package_refuses_it_too_or_the_difference_is_known(name):
    content, message = HOSTILE[name]
    if package_verdict(content) is not None:
        assert any(part in message or message in part for part in DIFFERENCES), message
