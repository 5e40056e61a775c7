"""Q2_K to Q6_K and IQ4_XS: super-blocks of 256 with integer sub-scales.

The search plans are those of the kernels; byte layouts are told in `kernels.q_k` and `kernels.iq4`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from quantkit.quantize.codec import How, Importance
from quantkit.quantize.kernels import iq4, q_k
from quantkit.quantize.torch._levels import iq4_code, iq4_level
from quantkit.quantize.torch._ops import (
    SUPER,
    Tensor,
    error_weights,
    ggml_weights,
    integers,
    inverse,
    normalise,
    root_mean_squares,
    supers_of,
)
from quantkit.quantize.torch._pack import f16_bytes, fold, gather_bits
from quantkit.quantize.torch._run import Encoder
from quantkit.quantize.torch._super import face_down, search_affine, search_scaled
from quantkit.types import GgmlType


def _loaded(
    x: Tensor, importance: Importance | None, how: How, size: int, c: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalised super-blocks, their error weights and the powers of two divided out."""
    w = error_weights(importance, x.shape[1], size, SUPER, x.device)
    tiles, up = normalise(supers_of(x, size), (0, 1))
    if how.weighting == "ggml" and c:
        w = ggml_weights(tiles, w, root_mean_squares(x, SUPER, c) / up)
    return tiles, w, up


def _in_rows(codes: Tensor) -> Tensor:
    """[size, sub-blocks, rows, super-blocks] -> u8[blocks, 256], weight by weight."""
    return codes.permute(2, 3, 1, 0).to(torch.uint8).reshape(-1, SUPER)


def _sub_scales(s: Tensor) -> Tensor:
    """[sub-blocks, rows, super-blocks] -> u8[blocks, sub-blocks]."""
    return s.permute(1, 2, 0).to(torch.uint8).reshape(-1, len(s))


def _q2_k(q: Tensor, s: Tensor, m: Tensor, d: Tensor, dmin: Tensor) -> Tensor:
    return torch.cat([s | m << 4, fold(q, (2, 4, 32), 2), d, dmin], 1)


def _q4_k(q: Tensor, s: Tensor, m: Tensor, d: Tensor, dmin: Tensor) -> Tensor:
    low_s, high_s, low_m, high_m = s[:, :4], s[:, 4:], m[:, :4], m[:, 4:]
    scales = [
        low_s | high_s >> 4 << 6,
        low_m | high_m >> 4 << 6,
        high_s & 15 | (high_m & 15) << 4,
    ]
    return torch.cat([d, dmin, *scales, fold(q & 15, (4, 2, 32), 4)], 1)


def _q5_k(q: Tensor, s: Tensor, m: Tensor, d: Tensor, dmin: Tensor) -> Tensor:
    block = _q4_k(q, s, m, d, dmin)
    return torch.cat([block[:, :16], fold(q >> 4, (8, 32), 1), block[:, 16:]], 1)


def _q3_k(q: Tensor, s: Tensor, d: Tensor) -> Tensor:
    s = s + 32
    scales = [fold(s & 15, (2, 8), 4), fold(s >> 4, (4, 4), 2)]
    return torch.cat([fold(q >> 2, (8, 32), 1), fold(q & 3, (2, 4, 32), 2), *scales, d], 1)


def _q6_k(q: Tensor, s: Tensor, d: Tensor) -> Tensor:
    return torch.cat([fold(q & 15, (2, 2, 64), 4), fold(q >> 4, (2, 4, 32), 2), s, d], 1)


def _iq4_xs(q: Tensor, s: Tensor, d: Tensor) -> Tensor:
    s = s + 32
    scales = [gather_bits(s >> 4, 2), gather_bits(s & 15, 4)]
    return torch.cat([d, *scales, fold(q, (8, 2, 16), 4)], 1)


def _affine(top: int, limit: int, c: float, pack: Callable[..., Tensor]) -> Encoder:
    size = 16 if limit == 15 else 32

    def encode(x: Tensor, importance: Importance | None, how: How) -> Tensor:
        tiles, w, up = _loaded(x, importance, how, size, c)
        sign = face_down(tiles)
        tiles = tiles.mul_(sign)
        plan = q_k._affine_plan(top, how.effort, importance is not None)
        d, dmin, s, m = search_affine(tiles, w, up, top, limit, plan)
        q = tiles.add_(dmin * m).mul_(inverse(d * s)).round_().clamp_(0, top)
        ends = [f16_bytes(v * up * sign) for v in (d, dmin)]
        return pack(_in_rows(q), _sub_scales(s), _sub_scales(m), *ends).reshape(len(x), -1)

    return encode


def _scaled(steps: int, limit: int, c: float, pack: Callable[..., Tensor]) -> Encoder:
    def encode(x: Tensor, importance: Importance | None, how: How) -> Tensor:
        tiles, w, up = _loaded(x, importance, how, 16, c)
        plan = q_k._scaled_plan(steps, how.effort, importance is not None)
        level = integers(-steps, steps - 1)
        d, s = search_scaled(tiles, w, up, level, (-limit, limit - 1), plan)
        q = level(tiles.mul_(inverse(d * s))).add_(steps)
        whole = _sub_scales(s.to(torch.int8).view(torch.uint8))
        return pack(_in_rows(q), whole, f16_bytes(d * up)).reshape(len(x), -1)

    return encode


def _encode_iq4_xs(x: Tensor, importance: Importance | None, how: How) -> Tensor:
    tiles, w, up = _loaded(x, importance, how, 32, 2.0)
    d, s = search_scaled(tiles, w, up, iq4_level, (-32, 31), iq4._PLANS[how.effort])
    q = iq4_code(tiles.mul_(inverse(d * s)))
    whole = _sub_scales(s.to(torch.int8).view(torch.uint8))
    return _iq4_xs(_in_rows(q), whole, f16_bytes(d * up)).reshape(len(x), -1)


ENCODERS: dict[GgmlType, Encoder] = {
    GgmlType.Q2_K: _affine(3, 15, 1.0, _q2_k),
    GgmlType.Q4_K: _affine(15, 63, 2.0, _q4_k),
    GgmlType.Q5_K: _affine(31, 63, 2.0, _q5_k),
    GgmlType.Q3_K: _scaled(4, 32, 2.0, _q3_k),
    GgmlType.Q6_K: _scaled(32, 128, 0.0, _q6_k),
    GgmlType.IQ4_XS: _encode_iq4_xs,
}
