"""Safetensors files that break one rule each, as literal bytes."""

# ruff: noqa: UP031  (JSON is full of braces)

from __future__ import annotations

from tests.builders.safetensors import file_bytes

TWO = '{"dtype":"U8","shape":[2],"data_offsets":[0,2]}'  # the entry of a sound two-byte tensor


def _one(entry: str, data: bytes = b"ab") -> bytes:
    return file_bytes('{"t":%s}' % entry, data)


def _entry(dtype: str = '"U8"', shape: str = "[2]", offsets: str = "[0,2]") -> bytes:
    return _one('{"dtype":%s,"shape":%s,"data_offsets":%s}' % (dtype, shape, offsets))


def _named(name: str) -> bytes:
    return file_bytes('{"%s":%s}' % (name, TWO), b"ab")


def _two(first: str, second: str) -> bytes:
    entry = '{"dtype":"U8","shape":[2],"data_offsets":%s}'
    return file_bytes('{"a":%s,"b":%s}' % (entry % first, entry % second), b"abcd")


# name: (file, part of the message)
HOSTILE: dict[str, tuple[bytes, str]] = {
    # the length and the text
    "empty file": (b"", "shorter than the 8 bytes"),
    "seven bytes": (b"\0" * 7, "shorter than the 8 bytes"),
    "no header": (b"\0" * 8, "does not begin with"),
    "header past the end": (b"\x03" + b"\0" * 7 + b"{}", "header of 3 bytes in a file of 10"),
    "header over the cap": ((10**8 + 1).to_bytes(8, "little") + b"{}", "at most 25,000,000"),
    "header of 2^64 - 1 bytes": (b"\xff" * 8 + b"{}", "at most 25,000,000"),
    "not UTF-8": (file_bytes(b'{"a\xff":1}'), "not UTF-8 at byte 3"),
    "UTF-16": (file_bytes("{}".encode("utf-16")), "does not begin with"),
    "UTF-16 without a mark": (file_bytes("{}".encode("utf-16-le")), "header:"),
    "byte order mark": (file_bytes(b"\xef\xbb\xbf{}"), "does not begin with"),
    "leading space": (file_bytes(" {}"), "does not begin with"),
    "a list": (file_bytes("[]"), "does not begin with"),
    "unclosed": (file_bytes('{"t":'), "header:"),
    "text after the object": (file_bytes("{}{}"), "header:"),
    "NUL padding": (file_bytes("{}\0\0"), "header:"),
    "trailing comma": (file_bytes("{%s,}" % '"t":1'), "header:"),
    "nested 100,000 deep": (file_bytes('{"t":' + "[" * 100_000), "nested too deeply"),
    "number of 5,000 digits": (_entry(offsets="[0,%s]" % ("9" * 5000)), "header:"),
    # names
    "name twice": (file_bytes('{"t":%s,"t":%s}' % (TWO, TWO), b"ab"), "occurs twice"),
    "name twice, once escaped": (
        file_bytes('{"t":%s,"\\u0074":%s}' % (TWO, TWO), b"ab"),
        "occurs twice",
    ),
    "empty name": (_named(""), "does not print"),
    "NUL in a name": (_named("a\\u0000b"), "does not print"),
    "escape sequence in a name": (_named("a\\u001b[31m"), "does not print"),
    "bidi mark in a name": (_named("a\u202eb"), "does not print"),
    "half a surrogate in a name": (_named("a\\ud800"), "does not print"),
    # the entry
    "entry is null": (_one("null"), "nothing else"),
    "entry is a list": (_one('["U8",[2],[0,2]]'), "nothing else"),
    "no dtype": (_one('{"shape":[2],"data_offsets":[0,2]}'), "nothing else"),
    "unknown key": (_one(TWO[:-1] + ',"strides":[1]}'), "nothing else"),
    "key twice": (_one(TWO[:-1] + ',"dtype":"U8"}'), "occurs twice"),
    # dtype
    "unknown dtype": (_entry(dtype='"U9"'), "unknown dtype 'U9'"),
    "dtype in lower case": (_entry(dtype='"u8"'), "unknown dtype 'u8'"),
    "dtype is a number": (_entry(dtype="8"), "unknown dtype"),
    "dtype is an object": (_entry(dtype='{"U8":null}'), "unknown dtype"),
    # shape
    "shape is a number": (_entry(shape="2"), "list of at most 16"),
    "shape of 17 dimensions": (_entry(shape=str([1] * 16 + [2])), "list of at most 16"),
    "negative dimension": (_entry(shape="[-2]"), "integers from 0"),
    "two negative dimensions": (_entry(shape="[-1,-2]"), "integers from 0"),
    "float dimension": (_entry(shape="[2.0]"), "integers from 0"),
    "true as a dimension": (_entry(shape="[true,2]"), "integers from 0"),
    "string as a dimension": (_entry(shape='["2"]'), "integers from 0"),
    "NaN as a dimension": (_entry(shape="[NaN]"), "integers from 0"),
    "Infinity as a dimension": (_entry(shape="[Infinity]"), "integers from 0"),
    "1e400 as a dimension": (_entry(shape="[1e400]"), "integers from 0"),
    "dimension of 2^63": (_entry(shape="[9223372036854775808]"), "integers from 0"),
    "shape wraps to 2 in 64 bits": (_entry(shape="[9223372036854775807,2,2]"), "bits"),
    "empty shape that overflows": (
        _entry(shape="[0,4611686018427387904,4]", offsets="[0,0]"),
        "overflows",
    ),
    # offsets
    "one offset": (_entry(offsets="[0]"), "list of two"),
    "three offsets": (_entry(offsets="[0,1,2]"), "list of two"),
    "offsets are an object": (_entry(offsets='{"begin":0}'), "list of two"),
    "negative offset": (_entry(offsets="[-2,0]"), "data_offsets must be"),
    "minus zero": (_entry(offsets="[-0,2]"), "data_offsets must be"),
    "float offset": (_entry(offsets="[0,2.0]"), "data_offsets must be"),
    "true as an offset": (_entry(shape="[1]", offsets="[0,true]"), "data_offsets must be"),
    "offset of 2^64": (_entry(offsets="[0,18446744073709551616]"), "data_offsets must be"),
    "end before begin": (_entry(offsets="[2,0]"), "another size"),
    "one byte short": (_entry(offsets="[0,1]"), "another size"),
    "half a byte": (_one('{"dtype":"F4","shape":[3],"data_offsets":[0,2]}'), "another size"),
    # the tiling
    "hole before the first": (_two("[1,3]", "[3,5]"), "leaves a hole"),
    "hole between": (_two("[0,2]", "[3,5]"), "leaves a hole"),
    "overlap": (_two("[0,2]", "[1,3]"), "overlaps"),
    "two tensors in one place": (_two("[0,2]", "[0,2]"), "overlaps"),
    "empty tensor inside another": (
        file_bytes('{"a":%s,"z":{"dtype":"U8","shape":[0],"data_offsets":[1,1]}}' % TWO, b"ab"),
        "overlaps",
    ),
    "rest after the last": (_one(TWO, b"abc"), "the file at"),
    "data cut short": (_one(TWO, b"a"), "the file at"),
    "data but no tensor": (file_bytes("{}", b"a"), "the file at"),
    # __metadata__
    "metadata is null": (file_bytes('{"__metadata__":null}'), "strings to strings"),
    "metadata is a list": (file_bytes('{"__metadata__":[]}'), "strings to strings"),
    "metadata holds a number": (file_bytes('{"__metadata__":{"a":1}}'), "strings to strings"),
    "metadata holds an object": (file_bytes('{"__metadata__":{"a":{}}}'), "strings to strings"),
    "metadata twice": (file_bytes('{"__metadata__":{},"__metadata__":{}}'), "occurs twice"),
    "metadata key twice": (
        file_bytes('{"__metadata__":{"a":"1","a":"2"}}'),
        "occurs twice",
    ),
    "half a surrogate in metadata": (
        file_bytes('{"__metadata__":{"a":"\\ud800"}}'),
        "half a surrogate",
    ),
}
