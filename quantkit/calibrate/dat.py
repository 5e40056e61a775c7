"""Importance statistics in llama.cpp's legacy form, `.dat`.

Little endian: i32 entries; each i32 length, name, i32 chunks, i32 values, f32 mean * chunks; then,
optionally, i32 chunk count, i32 length, data set. It knows neither experts nor counts: a weight is
one row, and an expert without a token has a mean of exactly 1.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path

import numpy as np

from quantkit.calibrate.statistics import LazySums, Shape, Statistics, Sums
from quantkit.calibrate.storage import MAX_VALUES, OpenFile, as_f32, check_sums, new_file
from quantkit.container.names import MAX_TENSOR_NAME_BYTES, check_name, escaped, shown
from quantkit.errors import GgufError, UsageError

_I32 = struct.Struct("<i")
_MIN_ENTRY = 4 + 1 + 4 + 4 + 4  # length, name, chunks, number of values, value
_MAX_ENTRIES = 1 << 13  # as many as a GGUF file may have pairs of tensors
_I32_MAX = 2**31 - 1


def read_dat(file: OpenFile, chunk_size: int) -> Statistics:
    """See `read_imatrix`."""
    return _DatReader(file).read(chunk_size)


def write_dat(path: str | Path, statistics: Statistics) -> tuple[str, ...]:
    """Write the legacy form; returns the weights left out because no token reached them.

    Counts are lost, and priors. Raises as `write_imatrix` does.
    """
    path = Path(path)
    table = statistics.sums
    known = [name for name in sorted(table) if table[name].n_tokens > 0]
    if not known:
        raise UsageError("there are no statistics to write", where=escaped(str(path)))
    dataset = statistics.datasets[-1].encode() if statistics.datasets else b""
    with new_file(path, 0) as write:
        at = 0

        def append(data: bytes | memoryview) -> None:
            nonlocal at
            write(data, at)
            at += len(data)

        append(_i32_bytes(len(known)))
        for name in known:
            for part in _dat_entry(name, table[name], statistics.chunk_size):
                append(part)
        append(_i32_bytes(statistics.n_chunks) + _i32_bytes(len(dataset)) + dataset)
    return tuple(sorted(table.keys() - set(known)))


def _dat_entry(name: str, sums: Sums, chunk_size: int) -> Iterator[bytes | memoryview]:
    where = f"tensor {shown(name)}"
    raw = check_name(name, max_bytes=MAX_TENSOR_NAME_BYTES, where=where)
    n_chunks = -(-int(sums.counts.max()) // chunk_size)  # a part is one, too
    mean = sums.mean()
    mean[sums.counts == 0] = 1.0  # what llama-imatrix writes for an expert without tokens
    values = as_f32(mean * n_chunks, where=where)
    yield _i32_bytes(len(raw)) + raw + _i32_bytes(n_chunks) + _i32_bytes(values.size)
    yield values.data.cast("B")


def _i32_bytes(value: int) -> bytes:
    if value > _I32_MAX:
        raise GgufError(f"{value} is too large a number for a .dat file", hint="write a .gguf file")
    return _I32.pack(value)


class _DatReader:
    """The legacy form; every length is checked against the bytes left before it is used."""

    def __init__(self, file: OpenFile) -> None:
        self._file = file
        self._at = 0
        self._where = file.where

    def read(self, chunk_size: int) -> Statistics:
        n_entries = self._i32()
        if not 1 <= n_entries <= _MAX_ENTRIES or n_entries * _MIN_ENTRY > self._left:
            raise self._fail(
                "neither a GGUF file nor a legacy imatrix",
                hint="give the file that llama-imatrix or quantkit wrote",
            )
        values: dict[str, tuple[int, int]] = {}  # where they begin, and of how many chunks
        shapes: dict[str, Shape] = {}
        for index in range(n_entries):
            self._where = f"{self._file.where}, entry {index + 1} of {n_entries}"
            name, n_values, *place = self._entry()
            if name in values:
                raise self._fail("two entries have this name")
            shapes[name], values[name] = (1, n_values), (place[0], place[1])
        self._where = self._file.where
        sums = LazySums(shapes, partial(_read_dat, self._file, shapes, values, chunk_size))
        statistics = Statistics(chunk_size, sums=sums)
        n_chunks = self._i32() if self._left else max(chunks for _, chunks in values.values())
        statistics.n_tokens = n_chunks * chunk_size
        if n_chunks < 0:
            raise self._fail("a negative number of chunks")
        if self._left:
            dataset = self._bytes(self._i32()).decode(errors="replace")
            statistics.datasets = (dataset,) if dataset else ()
        if self._left:
            raise self._fail(f"{self._left} bytes behind the end")
        return statistics

    def _entry(self) -> tuple[str, int, int, int]:
        """Name, number of values, where they begin, chunks."""
        length = self._i32()
        if not 0 < length <= MAX_TENSOR_NAME_BYTES:
            raise self._fail(f"a name of {length} bytes, 1 to {MAX_TENSOR_NAME_BYTES} are allowed")
        try:
            name = self._bytes(length).decode()
        except UnicodeDecodeError as error:
            raise self._fail("its name is not UTF-8") from error
        check_name(name, max_bytes=MAX_TENSOR_NAME_BYTES, where=self._where)
        self._where = f"{self._file.where}, tensor {shown(name)}"
        n_chunks, n_values = self._i32(), self._i32()
        if n_chunks < 1 or n_values < 1:
            raise self._fail(f"{n_values} values of {n_chunks} chunks are no statistics")
        begin = self._at
        self._skip(4 * n_values)
        if n_values > MAX_VALUES:
            raise self._fail(f"{n_values} values are too many for a weight")
        return name, n_values, begin, n_chunks

    @property
    def _left(self) -> int:
        return self._file.n_bytes - self._at

    def _i32(self) -> int:
        (value,) = _I32.unpack(self._bytes(4))
        return int(value)

    def _bytes(self, n: int) -> bytearray:
        begin = self._at
        self._skip(n)
        return self._file.bytes(begin, n, self._where)

    def _skip(self, n: int) -> None:
        if not 0 <= n <= self._left:
            raise self._fail(f"the file ends early: {n} bytes expected, {self._left} are left")
        self._at += n

    def _fail(self, message: str, hint: str = "") -> GgufError:
        return GgufError(message, where=self._where, hint=hint)


def _read_dat(
    file: OpenFile,
    shapes: Mapping[str, Shape],
    values: Mapping[str, tuple[int, int]],
    chunk_size: int,
    name: str,
) -> Sums:
    at = f"{file.where}, tensor {shown(name)}"
    begin, n_chunks = values[name]
    sum2 = file.f32s(begin, shapes[name][1], at)
    # mean * chunks, times the tokens of a chunk: the sum over all tokens
    sums = Sums(sum2[np.newaxis] * chunk_size, np.array([float(n_chunks * chunk_size)]))
    check_sums(sums, at)
    return sums
