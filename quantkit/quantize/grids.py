"""Codebooks of the i-quants, as the `gguf` package holds them."""

from __future__ import annotations

from functools import cache

import numpy as np
import numpy.typing as npt
from gguf import quants


@cache
def grid(type_name: str) -> npt.NDArray[np.float32]:
    """Codebook of an IQ1, IQ2 or IQ3 type, f32[entries, weights per entry], read-only.

    The values are the levels that decoders multiply by the scale: 8, 25, 43 for IQ2, up to 62
    for IQ3_XXS, up to 15 for IQ3_S and -1, 0, 1 for IQ1.
    """
    codec = getattr(quants, type_name)
    codec.init_grid()
    points: npt.NDArray[np.float32] = codec.grid.reshape(codec.grid_shape).astype(np.float32)
    points.setflags(write=False)
    return points


@cache
def lanes(type_name: str) -> npt.NDArray[np.float32]:
    """`grid` transposed and flat: level j of entry n lies at `j * entries + n`."""
    flat = np.ascontiguousarray(grid(type_name).T).ravel()
    flat.setflags(write=False)
    return flat


def signs_of(bits: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """Sign bytes u8[n] -> f32[n, 8] of +-1; bit j set is minus at place j."""
    return 1 - 2 * np.unpackbits(bits.reshape(-1, 1), 1, bitorder="little").astype(np.float32)


def even_signs(ids: npt.NDArray[np.integer]) -> npt.NDArray[np.float32]:
    """Seven-bit sign ids -> f32[n, 8] of +-1, the eighth making the number of minuses even."""
    return signs_of(_EVEN[ids])


_IDS = np.arange(128, dtype=np.uint8)
_EVEN = _IDS | (np.unpackbits(_IDS[:, np.newaxis], 1).sum(1, dtype=np.uint8) & 1) << 7
