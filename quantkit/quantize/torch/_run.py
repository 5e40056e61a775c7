"""Tiles to the device and blocks back, as many rows at a time as its memory should hold."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from quantkit.errors import UsageError
from quantkit.quantize.codec import Blocks, How, Importance, Tile
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

    Raises `UsageError` for a device that torch does not have.
    """
    device = _device(name)

    def encode(x: Tile, importance: Importance | None, how: How) -> Blocks:
        rows, cols = x.shape
        out = np.empty((rows, type_.row_bytes(cols)), np.uint8)
        chunk = CHUNK_CPU if device.type == "cpu" else CHUNK_GPU
        height = max(1, chunk // max(1, cols))
        with torch.inference_mode():
            for begin in range(0, rows if cols else 0, height):
                part = np.ascontiguousarray(x[begin : begin + height], np.float32)
                if not part.flags.writeable:  # torch has no read-only tensors
                    part = part.copy()
                blocks = encoder(torch.from_numpy(part).to(device), importance, how)
                out[begin : begin + height] = blocks.cpu().numpy()
        return out

    return encode


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).cpu()
    except (RuntimeError, AssertionError) as error:
        raise UsageError(
            f"torch has no device {name!r} ({str(error).splitlines()[0]})",
            hint="a device that torch sees: cuda, cuda:1, ..., or cpu",
        ) from None
    return device
