"""Typed metadata values: small constructors, and the bytes of a key with its value."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from math import isfinite
from typing import Any

from quantkit.container.names import MAX_KEY_BYTES, check_name, shown
from quantkit.errors import GgufError
from quantkit.types import Kv, KvType

# struct codes of the fixed-size types, little endian without padding
CODES: dict[KvType, str] = {
    KvType.U8: "B",
    KvType.I8: "b",
    KvType.U16: "H",
    KvType.I16: "h",
    KvType.U32: "I",
    KvType.I32: "i",
    KvType.F32: "f",
    KvType.BOOL: "B",
    KvType.U64: "Q",
    KvType.I64: "q",
    KvType.F64: "d",
}
_PYTHON_TYPES: dict[KvType, set[type]] = {
    KvType.F32: {float, int},
    KvType.F64: {float, int},
    KvType.BOOL: {bool},
    KvType.STRING: {str},
}
_LENGTH = struct.Struct("<Q")


def u16(value: int) -> Kv:
    """An unsigned 16-bit integer."""
    return Kv(KvType.U16, value)


def u32(value: int) -> Kv:
    """An unsigned 32-bit integer, the type that llama.cpp wants for counts and sizes."""
    return Kv(KvType.U32, value)


def i32(value: int) -> Kv:
    """A signed 32-bit integer."""
    return Kv(KvType.I32, value)


def f32(value: float) -> Kv:
    """The nearest 32-bit float, so that what is read back equals what was made."""
    return Kv(KvType.F32, _nearest_f32(value))


def boolean(value: bool) -> Kv:
    """A truth value."""
    return Kv(KvType.BOOL, value)


def string(value: str) -> Kv:
    """A text; it may be empty and may hold NUL."""
    return Kv(KvType.STRING, value)


def strings(values: Sequence[str]) -> Kv:
    """An array of texts."""
    return Kv(KvType.ARRAY, list(values), KvType.STRING)


def i32s(values: Sequence[int]) -> Kv:
    """An array of signed 32-bit integers."""
    return Kv(KvType.ARRAY, list(values), KvType.I32)


def u32s(values: Sequence[int]) -> Kv:
    """An array of unsigned 32-bit integers."""
    return Kv(KvType.ARRAY, list(values), KvType.U32)


def f32s(values: Sequence[float]) -> Kv:
    """An array of nearest 32-bit floats."""
    return Kv(KvType.ARRAY, [_nearest_f32(value) for value in values], KvType.F32)


def encode_kv(key: str, kv: Kv) -> bytes:
    """The bytes of one metadata entry: key, type, value.

    Values are taken literally: a bool is no integer, an integer outside its type's range, a float
    that overflows, NaN and infinity are refused with the key in the message (`GgufError`).
    """
    where = f"KV {shown(key)}"
    name = check_name(key, max_bytes=MAX_KEY_BYTES, where=where)
    head = _LENGTH.pack(len(name)) + name + struct.pack("<i", kv.type)
    if kv.type is not KvType.ARRAY:
        if kv.item is not None:
            raise GgufError(f"a {kv.type.name} has no item type", where=where)
        return head + _encode_items(kv.type, [kv.value], where)
    if kv.item is None or kv.item is KvType.ARRAY:
        raise GgufError("an array needs an item type that is not itself an array", where=where)
    if not isinstance(kv.value, list | tuple):
        raise GgufError(f"expected a list, got {type(kv.value).__name__}", where=where)
    n_items = _LENGTH.pack(len(kv.value))
    return head + struct.pack("<i", kv.item) + n_items + _encode_items(kv.item, kv.value, where)


def _encode_items(type_: KvType, values: Sequence[Any], where: str) -> bytes:
    wanted = _PYTHON_TYPES.get(type_, {int})
    strange = set(map(type, values)) - wanted
    if strange:
        got = ", ".join(sorted(t.__name__ for t in strange))
        raise GgufError(f"expected {type_.name}, got {got}", where=where)
    if type_ is KvType.STRING:
        return _encode_strings(values, where)
    if wanted == {float, int} and not all(map(_is_finite, values)):
        raise GgufError("NaN and infinity are no metadata", where=where)
    try:
        return struct.pack(f"<{len(values)}{CODES[type_]}", *values)
    except (struct.error, OverflowError) as error:
        raise GgufError(f"a value does not fit {type_.name}: {error}", where=where) from error


def _encode_strings(values: Sequence[str], where: str) -> bytes:
    parts: list[bytes] = []
    try:
        for value in values:
            raw = value.encode()
            parts.append(_LENGTH.pack(len(raw)))
            parts.append(raw)
    except UnicodeEncodeError as error:
        raise GgufError(f"string {len(parts) // 2} is not Unicode text", where=where) from error
    return b"".join(parts)


def _nearest_f32(value: float) -> float:
    if type(value) not in (float, int):
        raise GgufError(f"expected a number, got {type(value).__name__}")
    try:
        rounded: float = struct.unpack("<f", struct.pack("<f", value))[0]
    except (struct.error, OverflowError) as error:
        raise GgufError("a number does not fit F32") from error
    return rounded


def _is_finite(value: float) -> bool:
    # An integer beyond the range of a double is reported as one that does not fit.
    return isinstance(value, int) or isfinite(value)
