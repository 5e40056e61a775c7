"""Every level that stored blocks could decode to: all their codes set to each value in turn."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from quantkit.types import GgmlType
from tests.quantize.ggml import ggml_decode

# Where the codes lie in a block, and the byte that sets every code of that region to `c`.
# Types with codes in two regions list the low bits first.
_NIBBLES = tuple(c * 0x11 for c in range(16))
_PAIRS = tuple(c * 0x55 for c in range(4))
_BITS = (0x00, 0xFF)
_BYTES = tuple(range(256))
# All five digits 0, 1 or 2: ceil(256 V / 243) with V = 0, 121, 242.
_TRITS = (0, 128, 255)
_REGIONS: dict[GgmlType, tuple[tuple[slice, tuple[int, ...]], ...]] = {
    GgmlType.Q4_0: ((slice(2, 18), _NIBBLES),),
    GgmlType.Q4_1: ((slice(4, 20), _NIBBLES),),
    GgmlType.Q5_0: ((slice(6, 22), _NIBBLES), (slice(2, 6), _BITS)),
    GgmlType.Q5_1: ((slice(8, 24), _NIBBLES), (slice(4, 8), _BITS)),
    GgmlType.Q8_0: ((slice(2, 34), _BYTES),),
    GgmlType.Q2_K: ((slice(16, 80), _PAIRS),),
    GgmlType.Q3_K: ((slice(32, 96), _PAIRS), (slice(0, 32), _BITS)),
    GgmlType.Q4_K: ((slice(16, 144), _NIBBLES),),
    GgmlType.Q5_K: ((slice(48, 176), _NIBBLES), (slice(16, 48), _BITS)),
    GgmlType.Q6_K: ((slice(0, 128), _NIBBLES), (slice(128, 192), _PAIRS)),
    GgmlType.IQ4_NL: ((slice(2, 18), _NIBBLES),),
    GgmlType.IQ4_XS: ((slice(8, 136), _NIBBLES),),
    GgmlType.MXFP4: ((slice(1, 17), _NIBBLES),),
    GgmlType.NVFP4: ((slice(4, 36), _NIBBLES),),
    GgmlType.TQ1_0: ((slice(0, 52), _TRITS),),
    GgmlType.TQ2_0: ((slice(0, 64), _PAIRS),),
    GgmlType.Q1_0: ((slice(2, 18), _BITS),),
    GgmlType.Q2_0: ((slice(2, 18), _PAIRS),),
}


def decoded_levels(blocks: npt.NDArray[np.uint8], type_: GgmlType) -> npt.NDArray[np.float32]:
    """f32[levels, rows, cols]: what each weight would be under each code."""
    variants = [blocks.reshape(-1, type_.block_bytes)]
    for region, fills in _REGIONS[type_]:
        filled = []
        for variant in variants:
            for byte in fills:
                copy = variant.copy()
                copy[:, region] = byte
                filled.append(copy)
        variants = filled
    return np.stack([ggml_decode(v.reshape(blocks.shape), type_) for v in variants])
