"""What the header reader accepts and, one rule at a time, what it refuses."""

# ruff: noqa: UP031  (JSON is full of braces)

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import pytest

from quantkit.errors import SourceError
from quantkit.source.header import DTYPE_BITS, MAX_HEADER_BYTES, parse_header, read_header
from quantkit.types import TensorRef
from tests.builders.safetensors import dtype_bits, file_bytes, write_safetensors
from tests.source.hostile import HOSTILE, TWO


def parse_bytes(content: bytes) -> list[TensorRef]:
    raw = read_header(lambda at, n: content[at : at + n], len(content), "model.safetensors")
    return parse_header(raw, len(content), "model.safetensors")


def parse_file(path: Path) -> list[TensorRef]:
    def read(at: int, n_bytes: int) -> bytes:
        with path.open("rb") as file:
            file.seek(at)
            return file.read(n_bytes)

    size = path.stat().st_size
    return parse_header(read_header(read, size, path.name), size, path.name)


@pytest.mark.parametrize("name", HOSTILE)
def test_reader_refuses(name):
    content, message = HOSTILE[name]
    tracemalloc.start()
    with pytest.raises(SourceError) as caught:
        parse_bytes(content)
    _, n_peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert message in str(caught.value)
    assert "model.safetensors" in str(caught.value)
    assert n_peak < 2**20 + 64 * len(content)


def test_the_error_of_a_tensor_names_it():
    with pytest.raises(SourceError, match=r"^model\.safetensors: t: F32 \[2\] takes 64 bits"):
        parse_bytes(file_bytes('{"t":%s}' % TWO.replace("U8", "F32"), b"ab"))


def test_offsets_are_absolute_and_tensors_come_in_the_order_of_their_bytes():
    header = (
        '{"__metadata__":{"format":"pt"},'
        '"b":{"dtype":"BF16","shape":[2,1],"data_offsets":[3,7]},'
        '"a":{"dtype":"U8","shape":[3],"data_offsets":[0,3]}}  '
    )
    begin = 8 + len(header)
    assert parse_bytes(file_bytes(header, b"aaabbbb")) == [
        TensorRef("a", "U8", (3,), "model.safetensors", begin, begin + 3),
        TensorRef("b", "BF16", (2, 1), "model.safetensors", begin + 3, begin + 7),
    ]


@pytest.mark.parametrize(
    ("header", "data"),
    [
        ("{}", b""),
        ("{}\n \t", b""),
        ('{"__metadata__":{}}', b""),
        ('{"s":{"dtype":"F32","shape":[],"data_offsets":[0,4]}}', b"1234"),
        ('{"f":{"dtype":"F4","shape":[2,3],"data_offsets":[0,3]}}', b"123"),
        ('{"g":{"dtype":"F6_E2M3","shape":[4],"data_offsets":[0,3]}}', b"123"),
        ('{"a-b":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}', b"1"),
        ('{"gewöhnlich 重み":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}', b"1"),
        (
            '{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},'
            '"empty":{"dtype":"F32","shape":[5,0],"data_offsets":[1,1]},'
            '"b":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}}',
            b"12",
        ),
    ],
)
def test_reader_accepts(header, data):
    n_tensors = len(json.loads(header).keys() - {"__metadata__"})
    assert len(parse_bytes(file_bytes(header, data))) == n_tensors


@pytest.mark.parametrize("dtype", DTYPE_BITS)
def test_every_dtype_has_the_size_its_name_says(dtype, tmp_path):
    path = tmp_path / "model.safetensors"
    write_safetensors(path, {"t": (dtype, (8,), None)})
    (ref,) = parse_file(path)
    assert ref.n_bytes == dtype_bits(dtype)


def test_a_tensor_beyond_four_gigabytes_is_addressed(tmp_path):
    path = tmp_path / "model.safetensors"
    shape = (5, 2**30)
    write_safetensors(path, {"big": ("U8", shape, None), "last": ("F32", (1,), b"last")})
    big, last = parse_file(path)
    assert big.n_bytes == 5 * 2**30
    with path.open("rb") as file:
        file.seek(last.begin)
        assert file.read() == b"last"


def test_a_header_of_the_largest_size_is_read():
    assert parse_bytes(file_bytes(b"{}" + b" " * (MAX_HEADER_BYTES - 2))) == []
