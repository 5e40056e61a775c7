"""Imatrix files spelled byte by byte, and statistics of random sums."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from quantkit.calibrate.statistics import Statistics, Sums
from tests.builders.gguf import ARRAY, STRING, U32, array, gguf_bytes, info, kv, text

RECORDED = Path(__file__).parent / "tiny-kimi-k2.5.imatrix.gguf"  # by llama-imatrix, 60 x 512

KVS = {
    "general.type": kv("general.type", STRING, text("imatrix")),
    "imatrix.datasets": kv("imatrix.datasets", ARRAY, array(STRING, 1, text("a.txt"))),
    "imatrix.chunk_count": kv("imatrix.chunk_count", U32, struct.pack("<I", 2)),
    "imatrix.chunk_size": kv("imatrix.chunk_size", U32, struct.pack("<I", 512)),
}


def f32s(*values: float) -> bytes:
    return struct.pack(f"<{len(values)}f", *values)


def gguf_imatrix(
    tensors: Mapping[str, bytes] | None = None,
    kvs: Mapping[str, bytes | None] | None = None,
    types: Mapping[str, int] | None = None,
) -> bytes:
    """A GGUF imatrix with these tensors' f32 bytes; `kvs` replaces entries, None removes them."""
    tensors = PAIR if tensors is None else tensors
    entries = [e for e in ({**KVS, **(kvs or {})}).values() if e is not None]
    infos, data = [], b""
    for name, raw in tensors.items():
        infos.append(info(name, (len(raw) // 4,), (types or {}).get(name, 0), len(data)))
        data += raw + bytes(-len(raw) % 32)
    return gguf_bytes(entries, infos, data)


PAIR = {"a.weight.in_sum2": f32s(1, 2, 3, 4), "a.weight.counts": f32s(1024)}


def dat_entry(
    name: str | bytes = "a.weight",
    values: Sequence[float] = (1, 2),
    *,
    n_chunks: int = 2,
    length: int | None = None,
    n_values: int | None = None,
) -> bytes:
    """An entry of a legacy file; lengths are true unless given."""
    raw = name.encode() if isinstance(name, str) else name
    head = struct.pack("<i", len(raw) if length is None else length) + raw
    n = len(values) if n_values is None else n_values
    return head + struct.pack("<ii", n_chunks, n) + f32s(*values)


def dat_bytes(*entries: bytes, n: int | None = None, tail: bytes = b"") -> bytes:
    return struct.pack("<i", len(entries) if n is None else n) + b"".join(entries) + tail


def dat_tail(n_chunks: int = 2, dataset: bytes = b"a.txt", length: int | None = None) -> bytes:
    return struct.pack("<ii", n_chunks, len(dataset) if length is None else length) + dataset


def statistics(
    shapes: Mapping[str, tuple[int, int]], *, seed: int = 0, chunk_size: int = 512, n_tokens=1024
) -> Statistics:
    """Random sums of these shapes; every row saw between 1 and 4000 tokens."""
    rng = np.random.default_rng(seed)
    made = Statistics(chunk_size, n_tokens, (f"text-{seed}",))
    for name, (m, n) in shapes.items():
        counts = rng.integers(1, 4000, m).astype(np.float64)
        made.sums[name] = Sums(rng.gamma(0.5, 2, (m, n)) * counts[:, np.newaxis], counts)
    return made


def equal(a: Mapping[str, Sums], b: Mapping[str, Sums]) -> bool:
    """Same names, shapes, sums and counts."""
    return a.keys() == b.keys() and all(
        np.array_equal(a[k].sum2, b[k].sum2) and np.array_equal(a[k].counts, b[k].counts) for k in a
    )
