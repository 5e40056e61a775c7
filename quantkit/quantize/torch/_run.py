"""Tiles to the device and blocks back, as many rows at a time as its memory should hold."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from quantkit.quantize.codec import Blocks, How, Importance, Tile
from quantkit.quantize.torch._lanes import encode_here, encode_in_lane
from quantkit.quantize.torch.devices import device_of
from quantkit.types import GgmlType

# f32[rows, cols] on the device, importance, how -> u8[rows, row_bytes] on the device.
Encoder = Callable[[torch.Tensor, Importance | None, How], torch.Tensor]

# Weights that are searched at once: enough to keep a GPU busy, and about what a CPU's caches hold.
CHUNK_GPU = 1 << 21
CHUNK_CPU = 1 << 18


def on_device(
    encoder: Encoder, type_: GgmlType, name: str
) -> Callable[[Tile, Importance | None, How], Blocks]:
    """`Codec.encode` by an encoder on the device of that name.

    On a CUDA device at most `LANES` chunks are searched at once, by however many threads; they have
    32 MiB of pinned memory together. Raises `UsageError` for a device that torch does not have.
    """
    device = device_of(name)
    through = encode_in_lane if device.type == "cuda" else encode_here

    def encode(x: Tile, importance: Importance | None, how: How) -> Blocks:
        rows, cols = x.shape
        out = np.empty((rows, type_.row_bytes(cols)), np.uint8)
        chunk = CHUNK_CPU if device.type == "cpu" else CHUNK_GPU
        height = max(1, chunk // max(1, cols))

        def search(part: torch.Tensor) -> torch.Tensor:
            return encoder(part, importance, how)

        with torch.inference_mode():
            for begin in range(0, rows if cols else 0, height):
                end = min(begin + height, rows)
                through(device, x[begin:end], search, out[begin:end])
        return out

    return encode
