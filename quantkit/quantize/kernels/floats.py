"""F32, F16 and BF16: no search, only rounding to nearest even.

What lies beyond the range of the narrower type becomes its largest finite value, never infinity.
"""

from __future__ import annotations

import numpy as np

from quantkit.quantize.codec import Blocks, Codec, How, Importance, Tile
from quantkit.quantize.kernels._common import f16_bits, kernel
from quantkit.types import GgmlType


@kernel
def _to_f16(x: np.ndarray, out: np.ndarray) -> None:
    top = np.float32(65504.0)
    for i in range(x.size):
        out[i] = f16_bits(max(min(x[i], top), -top))


@kernel
def _to_bf16(bits: np.ndarray, out: np.ndarray) -> None:
    for i in range(bits.size):
        odd = (bits[i] >> np.uint32(16)) & np.uint32(1)
        rounded = (bits[i] + np.uint32(0x7FFF) + odd) >> np.uint32(16)
        # Only the last values before infinity round to it.
        infinite = (rounded & np.uint32(0x7FFF)) == np.uint32(0x7F80)
        out[i] = rounded - np.uint32(infinite)


def _encode_f32(x: Tile, importance: Importance | None, how: How) -> Blocks:
    return x.copy().view(np.uint8)


def _encode_f16(x: Tile, importance: Importance | None, how: How) -> Blocks:
    out = np.empty(x.shape, np.uint16)
    _to_f16(x.reshape(-1), out.reshape(-1))
    return out.view(np.uint8)


def _encode_bf16(x: Tile, importance: Importance | None, how: How) -> Blocks:
    out = np.empty(x.shape, np.uint16)
    _to_bf16(x.reshape(-1).view(np.uint32), out.reshape(-1))
    return out.view(np.uint8)


def _decode_f32(blocks: Blocks) -> Tile:
    return np.ascontiguousarray(blocks).view(np.float32).copy()


def _decode_f16(blocks: Blocks) -> Tile:
    return np.ascontiguousarray(blocks).view(np.float16).astype(np.float32)


def _decode_bf16(blocks: Blocks) -> Tile:
    high = np.ascontiguousarray(blocks).view(np.uint16).astype(np.uint32)
    return (high << np.uint32(16)).view(np.float32)


CODECS = (
    Codec(GgmlType.F32, _encode_f32, _decode_f32),
    Codec(GgmlType.F16, _encode_f16, _decode_f16),
    Codec(GgmlType.BF16, _encode_bf16, _decode_bf16),
)
