"""Stored tensors: what a weight is made of, and bounded reads of parts of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from importlib import import_module
from math import prod
from typing import Any, Protocol, TypeGuard

import numpy as np
import numpy.typing as npt

from quantkit.errors import NonFiniteError, SourceError, UnsupportedError
from quantkit.types import TensorRef

Tensors = Mapping[str, TensorRef]
Bytes = npt.NDArray[np.uint8]
Tile = npt.NDArray[np.float32]
Reader = Callable[[TensorRef, int, int], Bytes]


class Source(Protocol):
    """What readers need of a checkpoint."""

    tensors: dict[str, TensorRef]
    shapes_checked: set[str]

    def pread(self, ref: TensorRef, offset: int, n_bytes: int) -> Bytes:
        """Bytes of a tensor, in an array of the caller's own."""


FLOATS = ("F32", "F16", "BF16")
_NUMPY: dict[str, type[np.generic]] = {
    "F32": np.uint32,
    "F16": np.uint16,
    "BF16": np.uint16,
    "I32": np.uint32,
    "I64": np.int64,
    "I8": np.uint8,
    "U8": np.uint8,
    "F8_E4M3": np.uint8,
    "F8_E8M0": np.uint8,
}
# The exponent that only NaN and infinity have, in the bits of each float.
_NONFINITE = {"F32": 0x7F800000, "F16": 0x7C00, "BF16": 0x7F80, "F8_E4M3": 0x7F, "F8_E8M0": 0xFF}
_STRIP_BYTES = 1 << 20
_ROW_BYTES = 128 << 10  # what is read in the time that one more read takes
_BROKEN = "download the file again; if its checksum is right, the model itself is broken"
REMEDY = "docs/source-formats.md lists what is read; or convert from the unquantised checkpoint"


@cache
def kernels() -> Any:
    """The numba kernels, imported only where weights are read: planning needs none."""
    return import_module("quantkit.source.expand")


def where(ref: TensorRef) -> str:
    """A tensor as errors name it."""
    return f"{ref.file}: {ref.name}"


def unsupported(ref: TensorRef, reason: str) -> UnsupportedError:
    """A tensor in a form that is not known."""
    return UnsupportedError(reason, where=where(ref), hint=REMEDY)


def contradiction(ref: TensorRef, reason: str) -> SourceError:
    """A tensor that does not go with the rest."""
    return SourceError(reason, where=where(ref), hint=_BROKEN)


def part(owner: TensorRef, name: str, tensors: Tensors) -> TensorRef:
    """The stored tensor `name`, without which `owner` means nothing."""
    found = tensors.get(name)
    if found is None:
        raise SourceError(f"{name} is missing", where=where(owner))
    return found


def check_shape(ref: TensorRef, owner: TensorRef, *expected: tuple[int, ...]) -> None:
    """Refuse a part of `owner` that has none of the `expected` shapes."""
    if ref.shape not in expected:
        shapes = " or ".join(str(list(shape)) for shape in expected)
        raise contradiction(
            ref,
            f"has the shape {list(ref.shape)}, expected {shapes} beside {owner.name} "
            f"{list(owner.shape)}",
        )


def check_dtype(ref: TensorRef, *expected: str) -> None:
    """Refuse a part of another dtype."""
    if ref.dtype not in expected:
        raise unsupported(ref, f"is {ref.dtype}, expected {' or '.join(expected)}")


def check_scale(ref: TensorRef) -> None:
    """Refuse scales that are no floats of 16 or 32 bits."""
    if ref.dtype not in FLOATS:
        raise unsupported(ref, f"is a scale in {ref.dtype}, expected BF16, F16 or F32")


def check_matrix(ref: TensorRef) -> None:
    """Refuse a tensor that is no matrix, nor a stack of them, with rows and columns."""
    if len(ref.shape) < 2 or 0 in ref.shape:
        raise contradiction(ref, f"has the shape {list(ref.shape)}")


def read_elements(source: Source, ref: TensorRef, begin: int, end: int) -> npt.NDArray[Any]:
    """Elements `begin .. end` of a tensor, flattened; floats as the integers of their bits."""
    dtype = np.dtype(_NUMPY[ref.dtype])
    return source.pread(ref, begin * dtype.itemsize, (end - begin) * dtype.itemsize).view(dtype)


def read_rows(source: Source, ref: TensorRef, begin: int, end: int) -> npt.NDArray[Any]:
    """Rows of a tensor, leading axes flattened, as `read_elements` gives them."""
    n_cols = ref.shape[-1] if ref.shape else 1
    return read_elements(source, ref, begin * n_cols, end * n_cols).reshape(end - begin, n_cols)


def read_columns(source: Source, ref: TensorRef, begin: int, end: int) -> npt.NDArray[Any]:
    """Columns `begin .. end` of a matrix, [rows, end - begin].

    Where rows are short, whole rows are read in strips of at most 1 MiB and cut; where they are
    long, the piece of each row alone.
    """
    n_rows, n_cols = ref.shape
    dtype = np.dtype(_NUMPY[ref.dtype])
    out = np.empty((n_rows, end - begin), dtype)
    if n_cols * dtype.itemsize > _ROW_BYTES:
        for row in range(n_rows):
            out[row] = read_elements(source, ref, row * n_cols + begin, row * n_cols + end)
        return out
    height = max(1, _STRIP_BYTES // (n_cols * dtype.itemsize))
    for first in range(0, n_rows, height):
        last = min(first + height, n_rows)
        out[first:last] = read_rows(source, ref, first, last)[:, begin:end]
    return out


def as_floats(
    ref: TensorRef,
    stored: npt.NDArray[Any],
    place: int,
    largest: float = 1,
    width: int | None = None,
) -> Tile:
    """Stored floats as f32, exactly, in the shape of `stored`.

    U8 is taken as F8_E8M0, the exponent e of 2^(e - 127). Raises `NonFiniteError` for NaN,
    infinity, and where the value times `largest` would overflow f32. `place` and `width` say
    where the values are from; see `nonfinite`.
    """
    dtype = "F8_E8M0" if ref.dtype == "U8" else ref.dtype
    flat = stored.ravel()
    mask = _NONFINITE[dtype]
    values = _decoded(dtype, flat)
    if values is None:
        raise nonfinite(ref, (flat & mask) == mask, place, "NaN or infinity", width)
    if largest != 1:
        too_large = np.abs(values) > np.finfo(np.float32).max / np.float32(largest)
        if too_large.any():
            raise nonfinite(ref, too_large, place, "a scale that overflows f32", width)
    return values.reshape(stored.shape)


def _decoded(dtype: str, flat: npt.NDArray[Any]) -> Tile | None:
    """Values of floats, or None if one of them is not finite."""
    if dtype == "F32":
        return flat.view(np.float32) if kernels().all_finite(flat) else None
    if dtype in ("F8_E4M3", "F8_E8M0"):
        mask = _NONFINITE[dtype]
        return None if ((flat & mask) == mask).any() else _small_floats(dtype)[flat]
    values = np.empty(flat.shape, np.float32)
    sound = (
        kernels().expand_f16(flat, values)
        if dtype == "F16"
        else kernels().expand_bf16(flat, values.view(np.uint32))
    )
    return values if sound else None


@cache
def _small_floats(dtype: str) -> Tile:
    """The 256 values of a float of eight bits; codes that are NaN have some finite value here."""
    if dtype == "F8_E8M0":
        exponents = np.minimum(np.arange(256), 254) - 127
        return np.asarray(np.ldexp(np.ones(256, np.float32), exponents), np.float32)
    code = np.arange(256)
    exponent, fraction = code >> 3 & 15, code & 7
    normal = np.ldexp(8.0 + fraction, exponent - 10)
    values = np.where(exponent == 0, fraction * 2.0**-9, normal) * np.where(code < 128, 1, -1)
    return values.astype(np.float32)


def read_floats(
    source: Source, ref: TensorRef, begin: int, end: int, n_cols: int, largest: float = 1
) -> Tile:
    """Rows `begin .. end` of a tensor of floats seen as rows of `n_cols`; see `as_floats`."""
    stored = read_elements(source, ref, begin * n_cols, end * n_cols)
    return as_floats(ref, stored.reshape(end - begin, n_cols), begin * n_cols, largest)


def nonfinite(
    ref: TensorRef, bad: npt.NDArray[np.bool_], place: int, what: str, width: int | None = None
) -> NonFiniteError:
    """The error for values that are not finite, `bad` of those read.

    `place` is the index in the flattened tensor of the first that was read; what was read is one
    piece, or pieces of `width` from one row after the other.
    """
    n_cols = ref.shape[-1] if ref.shape else 1
    down, across = divmod(int(bad.argmax()), width or bad.size)
    row, col = divmod(place + down * n_cols + across, n_cols)
    return NonFiniteError(
        f"holds {what} at [{row}, {col}], and {int(bad.sum()) - 1} more in this tile",
        where=where(ref),
        hint=_BROKEN,
    )


def n_elements(ref: TensorRef) -> int:
    """Elements of a tensor; 1 for a scalar."""
    return prod(ref.shape)


def is_size(value: Any) -> TypeGuard[int]:
    """Whether a value of config.json is a positive integer that no tensor exceeds."""
    return type(value) is int and 0 < value < 1 << 31
