"""Files of arrays that are taken up again or not at all.

A line of JSON that says all that the rest depends on (with the arrays' names, types and shapes),
the arrays, and a CRC-32 of all that. Who reads knows what the line has to be and compares it, so
nothing in such a file is ever interpreted.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from quantkit.run import fs

Arrays = dict[str, npt.NDArray[Any]]
Shape = tuple[str, str, Sequence[int]]  # name, numpy's type, shape

_PIECE = 64 << 20
_MAX_HEAD = 1 << 20


def shapes_of(arrays: Mapping[str, npt.NDArray[Any]]) -> list[Shape]:
    """What the first line says of arrays."""
    return [(name, array.dtype.str, array.shape) for name, array in arrays.items()]


def first_line(said: Mapping[str, Any], arrays: Sequence[Shape]) -> bytes:
    """The line that such a file begins with."""
    return json.dumps({**said, "arrays": arrays}).encode() + b"\n"


def write_state(path: Path, pieces: Iterable[bytes | memoryview]) -> None:
    """Write the first line, the arrays and their sum, whole or not at all.

    It is not flushed to the device: a file that a crash leaves in part is not whole.
    """
    partial = fs.partial_of(path)
    fs.make_folder(path.parent)
    fd = fs.open_sized(partial, 0)
    at = crc = 0
    try:
        for piece in pieces:
            fs.write_at(fd, piece, at, partial)
            at, crc = at + len(piece), zlib.crc32(piece, crc)
        fs.write_at(fd, crc.to_bytes(4, "little"), at, partial)
    finally:
        os.close(fd)
    fs.publish(path)


@contextmanager
def whole_state(
    path: Path, lines: Iterable[bytes], n_bytes: int
) -> Iterator[tuple[int, BinaryIO] | None]:
    """(which of the lines a file begins with, the file behind it), None for any other file.

    `n_bytes` are those between the line and the sum.
    """
    if not path.is_file():
        yield None
        return
    with path.open("rb") as file:
        head = file.readline(_MAX_HEAD)
        which = next((k for k, line in enumerate(lines) if head == line), None)
        if which is None or not _is_whole(file, len(head) + n_bytes):
            yield None
            return
        file.seek(len(head))
        yield which, file


def read_arrays(file: BinaryIO, like: Mapping[str, npt.NDArray[Any]]) -> Arrays:
    """The next arrays of a whole file, of the types and shapes of others."""
    return {
        name: np.fromfile(file, array.dtype, array.size).reshape(array.shape)
        for name, array in like.items()
    }


def _is_whole(file: BinaryIO, n_bytes: int) -> bool:
    """Whether a file is `n_bytes` and their CRC-32."""
    if file.seek(0, os.SEEK_END) != n_bytes + 4:
        return False
    file.seek(0)
    crc = 0
    for begin in range(0, n_bytes, _PIECE):
        crc = zlib.crc32(file.read(min(_PIECE, n_bytes - begin)), crc)
    return file.read() == crc.to_bytes(4, "little")
