"""What the checkpoint-making scripts share: safetensors files written piece by piece."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

# Bytes per element, in the order in which the safetensors package ranks types.
DTYPE_BYTES = {"F8_E4M3": 1, "F16": 2, "BF16": 2, "I32": 4, "F32": 4}
_RANK = {dtype: i for i, dtype in enumerate(DTYPE_BYTES)}


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor to be stored: `dtype` as safetensors spells it, `shape` rows first."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def n_bytes(self) -> int:
        """Stored size."""
        return DTYPE_BYTES[self.dtype] * prod(self.shape)


def write_checkpoint(
    folder: Path,
    shards: list[list[Entry]],
    data: Callable[[Entry], bytes | memoryview | None],
    shard_name: str = "model-{:05d}-of-{:05d}.safetensors",
) -> None:
    """Write shards and, for more than one, their index; `data` returning None leaves a hole.

    One tensor's data is in memory at a time. Tensors lie in the order that the safetensors
    package gives them: larger types first, then by name.
    """
    folder.mkdir(parents=True, exist_ok=True)
    weight_map: dict[str, str] = {}
    for number, entries in enumerate(shards, start=1):
        name = "model.safetensors" if len(shards) == 1 else shard_name.format(number, len(shards))
        _write_shard(folder / name, entries, data)
        weight_map |= {entry.name: name for entry in entries}
    if len(shards) > 1:
        total = sum(entry.n_bytes for entries in shards for entry in entries)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(folder / "model.safetensors.index.json", index)


def _write_shard(
    path: Path, entries: list[Entry], data: Callable[[Entry], bytes | memoryview | None]
) -> None:
    ordered = sorted(entries, key=lambda entry: (-_RANK[entry.dtype], entry.name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for entry in ordered:
        end = offset + entry.n_bytes
        header[entry.name] = {
            "dtype": entry.dtype,
            "shape": list(entry.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for entry in ordered:
            content = data(entry)
            if content is None:
                file.seek(entry.n_bytes, 1)
            elif (written := file.write(content)) != entry.n_bytes:
                raise ValueError(f"{entry.name}: expected {entry.n_bytes} bytes, got {written}")
        file.truncate(8 + len(text) + offset)


def split_by_size(entries: Iterable[Entry], max_bytes: int) -> list[list[Entry]]:
    """Consecutive entries in groups of at most `max_bytes`, each with one entry at least."""
    groups: list[list[Entry]] = []
    room = 0
    for entry in entries:
        if not groups or entry.n_bytes > room:
            groups.append([])
            room = max_bytes
        groups[-1].append(entry)
        room -= entry.n_bytes
    return groups


def to_bf16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """BF16 bits of finite f32 values, rounded to nearest even."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded: NDArray[np.uint32] = bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)
    return (rounded >> 16).astype(np.uint16)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented UTF-8 JSON."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def byte_letters() -> list[str]:
    """GPT-2's printable letter for each byte value, [256]."""
    plain = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = (chr(256 + i) for i in range(256))
    return [chr(byte) if byte in plain else next(others) for byte in range(256)]
