"""What the torch searches share: layout, sums, and scales as they will be stored.

Blocks lie transposed, as in the kernels' tiles: dimension 0 counts the weights of a block, the
last two are rows and blocks per row, so that every operation runs over neighbouring memory. Error
weights without a row dimension of their own are broadcast over the rows.

Only operations that IEEE 754 rounds correctly touch floats, each in a kernel of its own, and sums
are trees of fixed shape. So the codes of a row depend neither on the rows beside it nor on the
chunk it is in. Where entries of a codebook are tried by products of matrices (`_codebook`), that
is up to the device's library: there, candidates equal but for rounding may change places.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from quantkit.quantize.codec import Importance

Tensor = torch.Tensor
Level = Callable[[Tensor], Tensor]  # the level nearest to each value; may overwrite them

SUPER = 256
F16_MAX = 65504.0
TINY = 1e-30
HUGE = 3e38
_ROOT_MAX = 1e15  # of a mean square in units of a block's peak; its square is still finite


def total(t: Tensor) -> Tensor:
    """Sum over dimension 0, a power of two, by adding halves."""
    while t.shape[0] > 1:
        half = t.shape[0] // 2
        t = t[:half] + t[half:]
    return t[0]


def over(k: float, t: Tensor) -> Tensor:
    """k / t, rounded once."""
    return torch.full_like(t, k).div_(t)


def inverse(d: Tensor) -> Tensor:
    """1 / d, and 0 for 0."""
    return torch.where(d == 0, 0.0, d.reciprocal())


def reciprocal(k: np.float32) -> float:
    """1 / k in f32, as a kernel computes it."""
    return float(np.float32(1) / k)


def power(exponent: Tensor) -> Tensor:
    """2^(exponent - 127) for i32 exponents in 1..254."""
    return (exponent << 23).view(torch.float32)


def exponent_of(peak: Tensor) -> Tensor:
    """Biased exponents, i32, of f32 >= 0."""
    return peak.view(torch.int32) >> 23


def near_f16(d: Tensor, up: Tensor) -> Tensor:
    """The f16 nearest to `d * up`, divided by `up` again: scales as they will be stored."""
    return (d * up).clamp_(-F16_MAX, F16_MAX).half().float().div_(up)


def integers(low: float, high: float) -> Level:
    """The levels low..high, whole numbers."""
    return lambda t: t.round_().clamp_(low, high)


def blocks_of(x: Tensor, size: int) -> Tensor:
    """f32[rows, cols] -> f32[size, rows, blocks]."""
    return x.reshape(len(x), -1, size).permute(2, 0, 1).contiguous()


def supers_of(x: Tensor, size: int) -> Tensor:
    """f32[rows, cols] -> f32[size, sub-blocks, rows, super-blocks]."""
    return x.reshape(len(x), -1, SUPER // size, size).permute(3, 2, 0, 1).contiguous()


def error_weights(
    importance: Importance | None, cols: int, size: int, span: int, device: torch.device
) -> Tensor:
    """Error weights [size, (sub-blocks,) 1, blocks] out of the importance of `cols` columns.

    Every `span` weights that share a scale are brought to a maximum of 1; those without any
    importance get uniform weights, for they must be encoded all the same. Sub-blocks have a
    dimension where `span` exceeds `size`.
    """
    w = np.ones(cols, np.float32) if importance is None else importance
    spans = w.reshape(-1, span)
    peaks = spans.max(axis=1, keepdims=True)
    spans = np.where(peaks > 0, spans / np.where(peaks > 0, peaks, np.float32(1)), np.float32(1))
    if span > size:
        tiles = spans.reshape(-1, span // size, size).transpose(2, 1, 0)[:, :, np.newaxis]
    else:
        tiles = spans.T[:, np.newaxis]
    return torch.from_numpy(np.ascontiguousarray(tiles)).to(device)


def normalise(x: Tensor, dims: tuple[int, ...] = (0,)) -> tuple[Tensor, Tensor]:
    """`x` over a power of two to peaks in [1, 4) over `dims`; gives (x, powers).

    Blocks below 2^-60 count as zero: their scale would be far below the smallest f16.
    """
    peak = x.abs().amax(dims)
    exponent = exponent_of(peak).clamp_(67, 253)
    return x * power(254 - exponent), power(exponent)


def weighty_peak(x: Tensor, w: Tensor) -> Tensor:
    """The largest magnitude of each block among weights that count, or of all if none does."""
    magnitude = x.abs()
    dead = magnitude.amax(0)
    peak = torch.where(w > 0, magnitude, 0.0).amax(0)
    return torch.where(peak > 0, peak, dead).clamp_min_(TINY)


def root_mean_squares(x: Tensor, span: int, c: float) -> Tensor:
    """sqrt(c mean(x^2)) of every `span` columns, f32[rows, spans]."""
    squares = x.reshape(len(x), -1, span).permute(2, 0, 1).double().square()
    width = 1 << (span - 1).bit_length()
    if width > span:  # a row, which need not be a power of two wide
        squares = torch.cat([squares, squares.new_zeros(width - span, *squares.shape[1:])])
    return (total(squares) * (c / span)).sqrt().clamp_max(HUGE).float()


def ggml_weights(x: Tensor, w: Tensor, rms: Tensor) -> Tensor:
    """llama.cpp's weights q sqrt(c mean(x^2) + x^2); `rms` in the units of the normalised `x`."""
    floor = rms.clamp_max(_ROOT_MAX).square()
    return (x * x).add_(floor).sqrt_().mul_(w)
