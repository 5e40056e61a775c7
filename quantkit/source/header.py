"""Strict reader of safetensors headers.

A file is a u64 length N, N bytes of JSON, and the tensors' bytes. Nothing in the header is believed
before it is checked: the tensors must tile the data exactly, without holes, overlaps or rest, and
each must be as long as its shape and dtype say. What the `safetensors` package accepts and this
reader refuses is listed in `tests/source/test_header_differential.py`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from math import prod
from operator import attrgetter
from typing import Any

from quantkit.errors import SourceError
from quantkit.run.json_size import parsed_bytes
from quantkit.types import TensorRef

MAX_HEADER_BYTES = 25_000_000  # the Hub's limit; the format's own is four times that
_MAX_PARSED_BYTES = 192 << 20  # 130,000 tensors in one file
MAX_DIMS = 16
MAX_INTEGER = 2**63 - 1

# Bits per element of every dtype of the format (safetensors 0.8).
DTYPE_BITS: dict[str, int] = {
    "BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "U32": 32, "I32": 32, "U64": 64, "I64": 64,
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "F16": 16, "BF16": 16, "F32": 32, "F64": 64, "C64": 64,
}  # fmt: skip
_KEYS = frozenset(("dtype", "shape", "data_offsets"))
_HINT = "the file is damaged or not safetensors; download it again"


def read_header(read: Callable[[int, int], bytes], n_file_bytes: int, file: str) -> bytes:
    """The JSON of a file's header, its length checked before anything is allocated.

    `read(offset, n_bytes)` gives exactly the bytes asked for, which are always inside the file.
    """
    if n_file_bytes < 8:
        raise SourceError("is shorter than the 8 bytes of a header length", where=file, hint=_HINT)
    n_header = int.from_bytes(read(0, 8), "little")
    if n_header > MAX_HEADER_BYTES:
        raise SourceError(
            f"header of {n_header:,} bytes; at most {MAX_HEADER_BYTES:,} are allowed",
            where=file,
            hint=_HINT,
        )
    if 8 + n_header > n_file_bytes:
        raise SourceError(
            f"header of {n_header:,} bytes in a file of {n_file_bytes:,}", where=file, hint=_HINT
        )
    return read(8, n_header)


def parse_header(raw: bytes, n_file_bytes: int, file: str) -> list[TensorRef]:
    """Tensors of a header in the order of their bytes, with offsets absolute in the file.

    `raw` is the JSON without the length before it. Raises `SourceError` for everything that is
    not exactly one way of cutting the file's data into whole tensors.
    """
    members = _load(raw, file)
    _check_metadata(members.pop("__metadata__", {}), file)
    data_begin = 8 + len(raw)
    refs = [_tensor(name, entry, data_begin, file) for name, entry in members.items()]
    refs.sort(key=attrgetter("begin", "end"))
    position = data_begin
    for ref in refs:
        if ref.begin != position:
            kind = "overlaps the tensor before it" if ref.begin < position else "leaves a hole"
            raise SourceError(
                f"data begins at {ref.begin}, expected {position}: {kind}",
                where=f"{file}: {ref.name}",
                hint=_HINT,
            )
        position = ref.end
    if position != n_file_bytes:
        raise SourceError(
            f"tensors end at byte {position:,}, the file at {n_file_bytes:,}",
            where=file,
            hint=_HINT,
        )
    return refs


def _load(raw: bytes, file: str) -> dict[str, Any]:
    if raw[:1] != b"{":
        raise SourceError("the header does not begin with '{'", where=file, hint=_HINT)
    if parsed_bytes(raw) > _MAX_PARSED_BYTES:
        raise SourceError("the header takes too much memory", where=file, hint=_HINT)
    try:
        # A hook per integer doubles the time, and hardly any header holds a minus sign.
        parse_int = _integer if b"-" in raw else int
        value = json.loads(raw.decode(), object_pairs_hook=_members, parse_int=parse_int)
    except RecursionError:
        raise SourceError("the header is nested too deeply", where=file, hint=_HINT) from None
    except UnicodeDecodeError as error:
        raise SourceError(
            f"the header is not UTF-8 at byte {error.start}", where=file, hint=_HINT
        ) from None
    except ValueError as error:
        raise SourceError(f"header: {str(error)[:200]}", where=file, hint=_HINT) from None
    members: dict[str, Any] = value  # the text begins with '{'
    return members


def _members(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        raise ValueError("a name occurs twice in the same object")
    return members


def _integer(digits: str) -> int | float:
    """JSON's -0 is no offset, and neither is any other negative number: both become floats."""
    return float(digits) if digits[0] == "-" else int(digits)


def _check_metadata(metadata: Any, file: str) -> None:
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise SourceError("__metadata__ must map strings to strings", where=file, hint=_HINT)
    try:
        "".join((*metadata.keys(), *metadata.values())).encode()
    except UnicodeEncodeError:
        raise SourceError("__metadata__ holds half a surrogate", where=file, hint=_HINT) from None


def _tensor(name: str, entry: Any, data_begin: int, file: str) -> TensorRef:
    if not name or not name.isprintable():
        raise SourceError(
            f"the tensor name {name[:80]!r} is empty or does not print", where=file, hint=_HINT
        )
    try:
        _check_entry(entry)
    except ValueError as error:
        raise SourceError(str(error), where=f"{file}: {name[:400]}", hint=_HINT) from None
    begin, end = entry["data_offsets"]
    return TensorRef(
        name, entry["dtype"], tuple(entry["shape"]), file, data_begin + begin, data_begin + end
    )


def _check_entry(entry: Any) -> None:
    """Raise ValueError unless a tensor's entry is whole and its size follows from its shape."""
    if type(entry) is not dict or entry.keys() != _KEYS:
        raise ValueError("the entry must hold dtype, shape and data_offsets and nothing else")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    n_bits = DTYPE_BITS.get(dtype, 0) if type(dtype) is str else 0
    if n_bits == 0:
        raise ValueError(f"unknown dtype {dtype[:40] if type(dtype) is str else type(dtype)!r}")
    if type(shape) is not list or len(shape) > MAX_DIMS:
        raise ValueError(f"the shape must be a list of at most {MAX_DIMS} integers")
    if type(offsets) is not list or len(offsets) != 2:
        raise ValueError("data_offsets must be a list of two integers")
    for n in shape:
        if type(n) is not int or n > MAX_INTEGER:
            raise ValueError("the shape must hold integers from 0 to 2^63 - 1")
        n_bits *= n
    for n in offsets:
        if type(n) is not int or n > MAX_INTEGER:
            raise ValueError("data_offsets must be integers from 0 to 2^63 - 1")
    # An empty tensor may not hide dimensions that no loop over its rows would survive.
    if n_bits == 0 and prod(n for n in shape if n) > MAX_INTEGER // 64:
        raise ValueError(f"the empty shape {shape} overflows")
    if n_bits != 8 * (offsets[1] - offsets[0]):
        raise ValueError(
            f"{dtype} {shape} takes {n_bits} bits, data_offsets {offsets} give another size"
        )
