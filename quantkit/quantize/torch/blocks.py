"""Types whose blocks stand alone: Q4_0 to Q8_0, IQ4_NL, MXFP4, NVFP4, and one to two bits a weight.

The candidates of each search are those of the kernels; byte layouts are told in `kernels.legacy`,
`kernels.iq4`, `kernels.fp4` and `kernels.ternary`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from quantkit.quantize.codec import How, Importance
from quantkit.quantize.kernels import fp4, iq4, legacy, ternary
from quantkit.quantize.torch._fit import (
    error,
    fit_affine,
    pick,
    polish,
    polish_affine,
    residual,
    scan,
)
from quantkit.quantize.torch._levels import e2m1_code, e2m1_level, iq4_code, iq4_level
from quantkit.quantize.torch._ops import (
    F16_MAX,
    HUGE,
    TINY,
    Tensor,
    blocks_of,
    error_weights,
    exponent_of,
    ggml_weights,
    integers,
    inverse,
    near_f16,
    normalise,
    power,
    root_mean_squares,
    total,
    weighty_peak,
)
from quantkit.quantize.torch._pack import f16_bytes, fold, gather_bits
from quantkit.quantize.torch._run import Encoder
from quantkit.types import GgmlType


def _loaded(
    x: Tensor, importance: Importance | None, how: How, size: int, c: float = 0, span: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalised blocks, their error weights and the powers of two divided out.

    `c` and `span` are those of llama.cpp's own weights, where it has any for the type.
    """
    w = error_weights(importance, x.shape[1], size, size, x.device)
    tiles, up = normalise(blocks_of(x, size))
    if how.weighting == "ggml" and c:
        w = ggml_weights(tiles, w, root_mean_squares(x, span, c) / up)
    return tiles, w, up


def _in_rows(codes: Tensor) -> Tensor:
    """[size, rows, blocks] -> u8[all blocks, size]."""
    return codes.permute(1, 2, 0).to(torch.uint8).reshape(-1, len(codes))


def _nibbles(q: Tensor) -> Tensor:
    """Codes of 4 or 5 bits: fifth bits first, then the nibbles of elements j and j + 16."""
    return fold(q & 15, (2, 16), 4)


def _fifth_bits(q: Tensor) -> Tensor:
    return gather_bits(q >> 4, 1)


def _finished(x: Tensor, *parts: Tensor) -> Tensor:
    return torch.cat(parts, 1).reshape(len(x), -1)


def _codes(x: Tensor, d: Tensor, m: Tensor | float, low: int, high: int) -> Tensor:
    """clamp(rint((x - m) / d), low, high) - low, u8[blocks, 32]."""
    return _in_rows((x - m).mul_(inverse(d)).round_().clamp_(low, high).sub_(low))


def _scaled(low: int, high: int, searches: dict[Any, Any]) -> Encoder:
    """Q4_0 and Q5_0."""

    def encode(x: Tensor, importance: Importance | None, how: How) -> Tensor:
        if importance is None and how == legacy._HURRY:
            tiles = blocks_of(x, 32)
            d, _ = _plain(tiles, low, high, affine=False)
            scale = d
        else:
            tiles, w, up = _loaded(x, importance, how, 32, 1.0, x.shape[1])
            ks, refits = searches[how.effort]
            level = integers(low, high)
            d = polish(tiles, w, level, scan(tiles, w, level, ks), up, refits)
            scale = d * up
        q = _codes(tiles, d, 0.0, low, high)
        fifth = [_fifth_bits(q)] if high > 7 else []
        return _finished(x, f16_bytes(scale), *fifth, _nibbles(q))

    return encode


def _affine(top: int, searches: dict[Any, Any]) -> Encoder:
    """Q4_1 and Q5_1."""

    def encode(x: Tensor, importance: Importance | None, how: How) -> Tensor:
        if importance is None and how == legacy._HURRY:
            tiles = blocks_of(x, 32)
            d, m = _plain(tiles, 0, top, affine=True)
            ends = [f16_bytes(d), f16_bytes(m)]
        else:
            tiles, w, up = _loaded(x, importance, how, 32, 1.0, x.shape[1])
            tries, refits = searches[how.effort]
            start = fit_affine(tiles, w, top, tries, bounded=False)
            d, m = polish_affine(tiles, w, top, start, up, refits)
            ends = [f16_bytes(d * up), f16_bytes(m * up)]
        q = _codes(tiles, d, m, 0, top)
        fifth = [_fifth_bits(q)] if top > 15 else []
        return _finished(x, *ends, *fifth, _nibbles(q))

    return encode


def _plain(x: Tensor, low: int, high: int, affine: bool) -> tuple[Tensor, Tensor]:
    """d and m out of the extremes of each block, after one least-squares step: no search."""
    top, bottom = x.amax(0), x.amin(0)
    ends = torch.full_like(top, high), torch.full_like(top, low)
    if affine:
        d, m = top / ends[0] - bottom / ends[0], bottom
    else:
        d, m = torch.where(top > -bottom, top, bottom) / ends[1], bottom * 0
    t = (x - m) * torch.where(d.abs() > TINY, d.reciprocal(), 0.0)
    q = t.round().clamp_(low, high)
    r = t - q
    rq, qq = total(r * q), total(q * q)
    if affine:
        r1, q1 = total(r), total(q)
        det = (qq * len(x) - q1 * q1).clamp_min_(1)  # whole; 0 if all codes agree
        m = m + d * ((r1 * qq - rq * q1) / det)
        d = d + d * ((rq * len(x) - r1 * q1) / det)
    else:
        d = d + d * (rq / qq.clamp_min(TINY))
    # Weights that span more than f32 does have no d and m.
    one = torch.ones_like(d)
    return near_f16(d.nan_to_num(F16_MAX), one), near_f16(m.nan_to_num(F16_MAX), one)


def _encode_q8_0(x: Tensor, importance: Importance | None, how: How) -> Tensor:
    tiles, w, up = _loaded(x, importance, how, 32)
    d = pick(tiles, w, integers(-127, 127), up, legacy._KS8[how.effort][0])
    q = tiles.mul_(inverse(d)).round_().clamp_(-127, 127)
    return _finished(x, f16_bytes(d * up), _in_rows(q.to(torch.int8).view(torch.uint8)))


def _encode_iq4_nl(x: Tensor, importance: Importance | None, how: How) -> Tensor:
    tiles, w, up = _loaded(x, importance, how, 32, 2.0, 32)
    ks, refits = iq4._SCANS[how.effort]
    d = polish(tiles, w, iq4_level, scan(tiles, w, iq4_level, ks), up, refits)
    q = _in_rows(iq4_code(tiles.mul_(inverse(d))))
    return _finished(x, f16_bytes(d * up), _nibbles(q))


def _best_of(
    x: Tensor, w: Tensor, numbers: list[Tensor], scale_of: Callable[[Tensor], Tensor]
) -> Tensor:
    """Which number's scale loses least under E2M1 codes, for each block; the first of equals."""
    best, chosen = torch.full_like(x[0], HUGE), numbers[0]
    for number in numbers:
        lost = error(x, w, scale_of(number), e2m1_level)
        better = lost < best
        best = torch.where(better, lost, best)
        chosen = torch.where(better, number, chosen)
    return chosen


def _encode_mxfp4(x: Tensor, importance: Importance | None, how: How) -> Tensor:
    tiles, w, up = _loaded(x, importance, how, 32)
    down = exponent_of(up) - 127
    middle = exponent_of(weighty_peak(tiles, w)) - (127 + 3) + down

    def scale_of(exponent: Tensor) -> Tensor:
        return power(exponent - down + 127)

    # Within reach of normal numbers, and such that 12 of them are no infinity.
    trials = [(middle + int(k)).clamp_(-126, 124) for k in fp4._MX_OFFSETS[how.effort]]
    exponent = _best_of(tiles, w, trials, scale_of)
    q = e2m1_code(tiles.mul_(inverse(scale_of(exponent))))
    return _finished(x, _in_rows((exponent + 128)[None]), _nibbles(_in_rows(q)))


def _ue4m3_below(v: Tensor) -> Tensor:
    """The largest scale code, i32, whose value is not above `v`, for 0 <= v."""
    v = v.clamp_max(448)
    return torch.where(v < 2**-6, (v * 2**9).int(), (v.view(torch.int32) >> 20) - 960)


def _encode_nvfp4(x: Tensor, importance: Importance | None, how: How) -> Tensor:
    tiles, w, up = _loaded(x, importance, how, 16)
    values = torch.from_numpy(fp4._UE4M3 * np.float32(0.5)).to(x.device)
    middle = _ue4m3_below(weighty_peak(tiles, w) * up * float(np.float32(1 / 6)))

    def scale_of(code: Tensor) -> Tensor:
        return values[code] / up

    trials = [(middle + int(k)).clamp_(0, 126) for k in fp4._NV_OFFSETS[how.effort]]
    code = _best_of(tiles, w, trials, scale_of)
    q = _in_rows(e2m1_code(tiles.mul_(inverse(scale_of(code)))))
    scales = code.to(torch.uint8).reshape(-1, 4)
    return _finished(x, scales, fold(q, (2, 8), 4).reshape(-1, 32))


def _ternary_scale(tiles: Tensor, w: Tensor, up: Tensor, high: int, search: Any) -> Tensor:
    """The best f16 scale: multiples of the peak and of the mean magnitude, refitted, polished."""
    of_peak, of_mean, refits = search
    level = integers(-1, high)
    peak = weighty_peak(tiles, w)
    mean = total(w * tiles.abs()) / total(w)
    best, scale = torch.full_like(peak, HUGE), mean
    trials = [(peak, f) for f in of_peak] + [(mean, f) for f in of_mean]
    for base, factor in trials:
        d = base * float(factor)
        rr, rq, qq = residual(tiles, w, d, inverse(d), level)
        qq = qq.clamp_min_(TINY)
        after = rr - rq * rq / qq
        better = after < best
        best = torch.where(better, after, best)
        scale = torch.where(better, d + rq / qq, scale)
    return polish(tiles, w, level, scale, up, refits)


def _encode_tq1_0(x: Tensor, importance: Importance | None, how: How) -> Tensor:
    tiles, w, up = _loaded(x, importance, how, 256)
    d = _ternary_scale(tiles, w, up, 1, ternary._TERNARY[how.effort])
    t = _in_rows(tiles.mul_(inverse(d)).round_().clamp_(-1, 1).add_(1)).int()
    digits = [t[:, :160].reshape(-1, 5, 32), t[:, 160:240].reshape(-1, 5, 16)]
    digits.append(t[:, 240:].reshape(-1, 4, 4))
    powers = torch.tensor([81, 27, 9, 3, 1], dtype=torch.int32, device=x.device)[:, None]
    # A byte is the fraction of 256 that decoding multiplies up.
    parts = [((p * powers[: p.shape[1]]).sum(1) * 256 + 242) // 243 for p in digits]
    return _finished(x, torch.cat(parts, 1).to(torch.uint8), f16_bytes(d * up))


def _encode_tq2_0(x: Tensor, importance: Importance | None, how: How) -> Tensor:
    tiles, w, up = _loaded(x, importance, how, 256)
    d = _ternary_scale(tiles, w, up, 2, ternary._TWO_BITS[how.effort])
    q = _codes(tiles, d, 0.0, -1, 2)
    return _finished(x, fold(q, (2, 4, 32), 2), f16_bytes(d * up))


def _encode_q2_0(x: Tensor, importance: Importance | None, how: How) -> Tensor:
    tiles, w, up = _loaded(x, importance, how, 64)
    ks, refits = ternary._STEPS[how.effort]
    level = integers(-1, 2)
    d = polish(tiles, w, level, scan(tiles, w, level, ks), up, refits)
    return _finished(x, f16_bytes(d * up), gather_bits(_codes(tiles, d, 0.0, -1, 2), 2))


def _encode_q1_0(x: Tensor, importance: Importance | None, how: How) -> Tensor:
    """The best scale under signs is the weighted mean magnitude."""
    tiles, w, up = _loaded(x, importance, how, 128)
    mean = total(w * tiles.abs()) / total(w)
    bits = gather_bits(_in_rows(tiles >= 0), 1)
    return _finished(x, f16_bytes(near_f16(mean, up) * up), bits)


ENCODERS: dict[GgmlType, Encoder] = {
    GgmlType.Q4_0: _scaled(-8, 7, legacy._KS4),
    GgmlType.Q5_0: _scaled(-16, 15, legacy._KS5),
    GgmlType.Q4_1: _affine(15, legacy._TRIES4),
    GgmlType.Q5_1: _affine(31, legacy._TRIES5),
    GgmlType.Q8_0: _encode_q8_0,
    GgmlType.IQ4_NL: _encode_iq4_nl,
    GgmlType.MXFP4: _encode_mxfp4,
    GgmlType.NVFP4: _encode_nvfp4,
    GgmlType.TQ1_0: _encode_tq1_0,
    GgmlType.TQ2_0: _encode_tq2_0,
    GgmlType.Q2_0: _encode_q2_0,
    GgmlType.Q1_0: _encode_q1_0,
}
