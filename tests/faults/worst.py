"""The largest files that the readers' caps let through, each of what costs its reader most."""

from __future__ import annotations

import struct
from collections.abc import Callable

from quantkit.container.reader import (
    MAX_HEADER_BYTES,
    MAX_ITEMS,
    MAX_KVS,
    MAX_STRINGS,
    MAX_TENSORS,
)
from quantkit.source.folder import MAX_PARSED_BYTES
from quantkit.source.index import MAX_INDEX_BYTES
from quantkit.source.index import MAX_TENSORS as MAX_INDEXED
from tests.builders.gguf import ARRAY, I64, STRING, U32, U64, array, gguf_bytes, info, kv, text
from tests.builders.safetensors import file_bytes

PACKED = kv("general.alignment", U32, struct.pack("<I", 1))
WIDE = "\U0001f600"


def _tensors(name: Callable[[int], str]) -> bytes:
    infos = [info(name(k), (1,), 24, k) for k in range(MAX_TENSORS)]
    return gguf_bytes([PACKED], infos, b"\0" * MAX_TENSORS, alignment=1)


def _array(item: int, one: bytes) -> bytes:
    most = MAX_STRINGS if item == STRING else MAX_ITEMS
    n = min(most, (MAX_HEADER_BYTES - 100) // len(one))
    return gguf_bytes([kv("a", ARRAY, array(item, n, one * n))])


def _strings_and_tensors() -> bytes:
    infos = [info(f"{k:063x}", (1,), 24, k) for k in range(MAX_TENSORS)]
    one = text(WIDE)
    n = min(MAX_STRINGS, (MAX_HEADER_BYTES - sum(map(len, infos)) - 200) // len(one))
    strings = kv("a", ARRAY, array(STRING, n, one * n))
    return gguf_bytes([PACKED, strings], infos, b"\0" * MAX_TENSORS, alignment=1)


def _arrays() -> bytes:
    n = MAX_STRINGS // MAX_KVS
    return gguf_bytes(
        [kv(f"{k:x}", ARRAY, array(STRING, n, text("a") * n)) for k in range(MAX_KVS)]
    )


def _keys() -> bytes:
    length = MAX_HEADER_BYTES // MAX_KVS - 30
    return gguf_bytes([kv(f"{k:05d}".ljust(length, "k"), U64, b"\0" * 8) for k in range(MAX_KVS)])


GGUF: dict[str, Callable[[], bytes]] = {
    "tensors of long names": lambda: _tensors(lambda k: f"{k:063x}"),
    "tensors of wide names": lambda: _tensors(lambda k: f"{k:08x}" + WIDE * 13),
    "wide strings": lambda: _array(STRING, text(WIDE)),
    "large numbers": lambda: _array(I64, struct.pack("<q", 1 << 60)),
    "strings and tensors": _strings_and_tensors,
    "arrays": _arrays,
    "long keys": _keys,
    "a text with one wide letter": lambda: gguf_bytes(
        [kv("a", STRING, text("e" * (MAX_HEADER_BYTES - 300) + WIDE))]
    ),
    "a text of control characters": lambda: gguf_bytes(
        [kv("a", STRING, text("\1" * (MAX_HEADER_BYTES - 300)))]
    ),
}


def _header(n: int, name: str) -> bytes:
    one = f'"{name}":{{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}'
    return file_bytes("{" + ",".join(one % k for k in range(n)) + "}")


SAFETENSORS: dict[str, Callable[[], bytes]] = {
    "short names": lambda: _header(173_000, "%x"),
    "long names": lambda: _header(157_000, "%x" + "n" * 60),
    "wide names": lambda: _header(124_000, "%x" + WIDE * 4),
}


def _index(name: str, file: str) -> str:
    one = f'"{name}":"{file}"'
    length = len((one % (100_000, 10_000)).encode()) + 1
    swells = 2 if one.isascii() else 8  # as `parsed_bytes` has it
    n = min(MAX_INDEXED, MAX_INDEX_BYTES // length, MAX_PARSED_BYTES // (swells * length + 170))
    return '{"weight_map":{' + ",".join(one % (k, k % 4_000) for k in range(n)) + "}}"


INDEX: dict[str, Callable[[], str]] = {
    "as many tensors as Kimi K3": lambda: _index(
        "language_model.model.layers.%d.block_sparse_moe.experts.w1.weight_packed",
        "model-%05d.safetensors",
    ),
    "long files": lambda: _index("%d", "f" * 90 + "%d.safetensors"),
    "wide names": lambda: _index("%d" + WIDE * 4, "%d.safetensors"),
}
