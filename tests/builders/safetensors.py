"""Safetensors files and checkpoints for tests, byte for byte, independent of quantkit and HF.

A tensor is `(dtype, shape, data)`: data as bytes, as an array whose bytes are taken, or None for
zeros that take no room on disk (a hole of a sparse file), so that tests can have checkpoints of
any size. Nothing is checked: the same builders make hostile files.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

Tensor = tuple[str, tuple[int, ...], Any]
Tensors = Mapping[str, Tensor]

_BITS = {"BOOL": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}


def file_bytes(header: str | bytes, data: bytes = b"") -> bytes:
    """A file with exactly this header text, whatever it says."""
    raw = header.encode() if isinstance(header, str) else header
    return len(raw).to_bytes(8, "little") + raw + data


def dtype_bits(dtype: str) -> int:
    """Bits per element, as the name says (F32, C64, F8_E4M3, ...)."""
    if dtype.startswith("F8"):
        return 8
    return _BITS.get(dtype) or int("".join(filter(str.isdigit, dtype)))


def write_safetensors(path: Path, tensors: Tensors, metadata: dict[str, str] | None = None) -> None:
    """One safetensors file with the tensors in the order given."""
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    position = 0
    for name, (dtype, shape, data) in tensors.items():
        n_bytes = prod(shape) * dtype_bits(dtype) // 8 if data is None else len(_raw(data))
        offsets = [position, position + n_bytes]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": offsets}
        position += n_bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    begin = 8 + len(text)
    with path.open("wb") as file:
        file.write(file_bytes(text))
        for name, (_, _, data) in tensors.items():
            if data is not None:
                file.seek(begin + header[name]["data_offsets"][0])
                file.write(_raw(data))
        file.truncate(begin + position)


def write_checkpoint(
    folder: Path,
    shards: Mapping[str, Tensors],
    config: Mapping[str, Any],
    index: bool = True,
) -> Path:
    """A folder with config.json, shards and, unless `index` is false, the index; the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    for file, tensors in shards.items():
        write_safetensors(folder / file, tensors)
    if index:
        write_index(folder, {name: file for file, tensors in shards.items() for name in tensors})
    return folder


def write_index(folder: Path, weight_map: Mapping[str, Any]) -> None:
    """model.safetensors.index.json with this weight_map."""
    index = {"metadata": {"total_size": 0}, "weight_map": dict(weight_map)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def bf16_bits(values: Any) -> np.ndarray[Any, Any]:
    """f32 values cut to BF16, as u16 bits; exact where the value is a BF16."""
    return (np.asarray(values, np.float32).view(np.uint32) >> 16).astype(np.uint16)


def bf16(values: Any) -> Tensor:
    """A BF16 tensor of values that are cut to BF16."""
    array = np.asarray(values, np.float32)
    return "BF16", array.shape, bf16_bits(array)


def f32(values: Any) -> Tensor:
    """An F32 tensor."""
    array = np.asarray(values, np.float32)
    return "F32", array.shape, array


def int4(name: str, levels: Any, scale: Any, shape_dtype: str = "I32") -> dict[str, Tensor]:
    """The three tensors of a compressed-tensors INT4 weight called `name` (`X.weight`).

    `levels` -8..7 [..., cols], `scale` [..., cols / 32] whose values are cut to BF16.
    """
    nibbles = (np.asarray(levels) + 8).astype(np.uint32)
    words = nibbles.reshape(*nibbles.shape[:-1], -1, 8) << np.arange(0, 32, 4, dtype=np.uint32)
    packed = np.bitwise_or.reduce(words, axis=-1)
    shape = np.array(nibbles.shape, {"I32": np.int32, "I64": np.int64}[shape_dtype])
    return {
        f"{name}_packed": ("I32", packed.shape, packed),
        f"{name}_scale": bf16(scale),
        f"{name}_shape": (shape_dtype, shape.shape, shape),
    }


def int4_config(**weights: Any) -> dict[str, Any]:
    """A `quantization_config` as Kimi's, with some arguments of the weights replaced."""
    arguments = {
        "type": "int",
        "num_bits": 4,
        "group_size": 32,
        "strategy": "group",
        "symmetric": True,
        "actorder": None,
        "dynamic": False,
    }
    group = {"targets": ["Linear"], "weights": {**arguments, **weights}}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": group},
    }


def _raw(data: Any) -> bytes:
    return data if isinstance(data, bytes) else np.ascontiguousarray(data).tobytes()
