"""IQ1_S to IQ3_S: a codebook entry per group of weights, a small multiplier l per block.

The search plans are those of the kernels; byte layouts are told in `kernels.iq1`, `iq2` and `iq3`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from quantkit.quantize.codec import Effort, How, Importance
from quantkit.quantize.kernels import iq1, iq2, iq3
from quantkit.quantize.kernels._codebook_super import CodebookCode
from quantkit.quantize.kernels._codebook_super import Plan as CodebookPlan
from quantkit.quantize.kernels._three_level_super import ThreeLevelCode
from quantkit.quantize.torch import _codebook as exhaustive
from quantkit.quantize.torch import _three_level as outward
from quantkit.quantize.torch._ops import Tensor, blocks_of
from quantkit.quantize.torch._pack import f16_bytes, gather_bits, words
from quantkit.quantize.torch._run import Encoder
from quantkit.types import GgmlType

Pack = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def _rows_first(t: Tensor) -> Tensor:
    """[n, rows, super-blocks] -> i64[all super-blocks, n]."""
    return t.permute(1, 2, 0).reshape(-1, len(t)).long()


def _u8(t: Tensor) -> Tensor:
    return t.to(torch.uint8)


def _signs_and_l(signs: Tensor, multiplier: Tensor) -> Tensor:
    """u8[n, 8, 4]: four 7-bit signs, and l in the top 4 bits."""
    sevens = (signs & 127).reshape(-1, 8, 4)
    word = multiplier << 28
    for k in range(4):
        word = word | sevens[..., k] << (7 * k)
    return words(word, 4).reshape(-1, 8, 4)


def _iq2_xxs(d: Tensor, multiplier: Tensor, entries: Tensor, signs: Tensor) -> Tensor:
    pairs = torch.cat([_u8(entries).reshape(-1, 8, 4), _signs_and_l(signs, multiplier)], 2)
    return torch.cat([f16_bytes(d), pairs.reshape(-1, 64)], 1)


def _iq2_xs(d: Tensor, multiplier: Tensor, entries: Tensor, signs: Tensor) -> Tensor:
    scales = gather_bits(_u8(multiplier), 4)
    return torch.cat([f16_bytes(d), words(entries | (signs & 127) << 9, 2), scales], 1)


def _iq2_s(d: Tensor, multiplier: Tensor, entries: Tensor, signs: Tensor) -> Tensor:
    high = gather_bits(_u8(entries >> 8), 2)
    low = _u8(entries & 255)
    return torch.cat([f16_bytes(d), low, _u8(signs), high, gather_bits(_u8(multiplier), 4)], 1)


def _iq3_xxs(d: Tensor, multiplier: Tensor, entries: Tensor, signs: Tensor) -> Tensor:
    return torch.cat([f16_bytes(d), _u8(entries), _signs_and_l(signs, multiplier).flatten(1)], 1)


def _iq3_s(d: Tensor, multiplier: Tensor, entries: Tensor, signs: Tensor) -> Tensor:
    high = gather_bits(_u8(entries >> 8), 1)
    low = _u8(entries & 255)
    return torch.cat([f16_bytes(d), low, high, _u8(signs), gather_bits(_u8(multiplier), 4)], 1)


def _iq1_s(d: Tensor, multiplier: Tensor, entries: Tensor, minus: Tensor) -> Tensor:
    high = (entries >> 8).reshape(-1, 8, 4)
    word = multiplier << 12 | minus[:, ::4] << 15
    for k in range(4):
        word = word | high[..., k] << (3 * k)
    return torch.cat([f16_bytes(d), _u8(entries & 255), words(word, 2)], 1)


def _iq1_m(d: Tensor, multiplier: Tensor, entries: Tensor, minus: Tensor) -> Tensor:
    threes = multiplier.reshape(-1, 4, 4)
    bits = d.half().view(torch.int16).long()
    word = torch.stack([bits >> (4 * k) & 15 for k in range(4)], 1) << 12
    for k in range(4):
        word = word | threes[..., k] << (3 * k)
    qh = gather_bits(_u8(entries >> 8 | minus << 3), 4)
    return torch.cat([_u8(entries & 255), qh, words(word, 2)], 1)


def _exhaustive(code: CodebookCode, plans: dict[Effort, CodebookPlan], pack: Pack) -> Encoder:
    def encode(x: Tensor, importance: Importance | None, how: How) -> Tensor:
        d, *rest = exhaustive.search(code, x, importance, how, plans[how.effort])
        return pack(d.reshape(-1), *map(_rows_first, rest)).reshape(len(x), -1)

    return encode


def _outward(code: ThreeLevelCode, pack: Pack) -> Encoder:
    def encode(x: Tensor, importance: Importance | None, how: How) -> Tensor:
        d, *rest = outward.search(code, x, importance, how, iq1._PLANS[how.effort])
        return pack(d.reshape(-1), *map(_rows_first, rest)).reshape(len(x), -1)

    return encode


def _encode_iq2_s(x: Tensor, importance: Importance | None, how: How) -> Tensor:
    if how.effort not in iq2._OUTWARD_PLANS:
        return _exhaustive(iq2._IQ2_S, iq2._PLANS, _iq2_s)(x, importance, how)
    plan = iq2._OUTWARD_PLANS[how.effort]
    d, multiplier, entries, _ = outward.search(iq2._IQ2_S_OUTWARD, x, importance, how, plan)
    signs = exhaustive.sign_bytes(blocks_of(x, 256))
    parts = map(_rows_first, (multiplier, entries, signs))
    return _iq2_s(d.reshape(-1), *parts).reshape(len(x), -1)


ENCODERS: dict[GgmlType, Encoder] = {
    GgmlType.IQ1_S: _outward(iq1._IQ1_S, _iq1_s),
    GgmlType.IQ1_M: _outward(iq1._IQ1_M, _iq1_m),
    GgmlType.IQ2_XXS: _exhaustive(iq2._IQ2_XXS, iq2._PLANS, _iq2_xxs),
    GgmlType.IQ2_XS: _exhaustive(iq2._IQ2_XS, iq2._PLANS, _iq2_xs),
    GgmlType.IQ2_S: _encode_iq2_s,
    GgmlType.IQ3_XXS: _exhaustive(iq3._IQ3_XXS, iq3._PLANS, _iq3_xxs),
    GgmlType.IQ3_S: _exhaustive(iq3._IQ3_S, iq3._PLANS, _iq3_s),
}
