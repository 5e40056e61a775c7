"""The best entries, signs and shifts of i-quants, by trying all of them.

For a scale s and levels g, sum w (x - s g)^2 = sum w x^2 - s (b - s a) with a = sum w g^2 and
b = 2 sum w x g. Weights that share a byte of signs or a shift are chosen together: a byte of signs
covers one entry of 8 or two of 4 weights, a shift up to four entries.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt

from quantkit.types import GgmlType
from tests.quantize.naive.iq import FORMS, SUPER, codebook, minuses

F64 = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Lines:
    """What a group saves, s (b - s a): b f64[patterns, entries], a alike or f64[1, entries].

    Option k of the choice that the group is part of asks for pattern `of_option[k]`.
    """

    a: F64
    b: F64
    of_option: npt.NDArray[np.intp]

    def saved(self, s: float) -> F64:
        """b - s a, f64[patterns, entries]."""
        return self.b - s * self.a

    def most(self, s: float) -> F64:
        """The most that b - s a can be under each option."""
        best: F64 = self.saved(s).max(axis=1)[self.of_option]
        return best


def together(type_: GgmlType) -> int:
    """How many weights share a byte of signs or a shift."""
    return FORMS[type_].shift_span or 8


@cache
def _sign_patterns(sign_bits: int, places: int) -> list[tuple[F64, npt.NDArray[np.intp]]]:
    """For each group under a byte of signs: distinct signs, and which of them each byte means."""
    signs = np.stack([minuses(n, sign_bits) for n in range(1 << sign_bits)])
    found = []
    for at in range(0, 8, places):
        distinct, of_byte = np.unique(signs[:, at : at + places], axis=0, return_inverse=True)
        found.append((distinct, of_byte.ravel()))
    return found


def choices(x: F64, w: F64, type_: GgmlType) -> Iterator[list[Lines]]:
    """For each choice of a super-block, the lines of its groups."""
    form = FORMS[type_]
    points = codebook(type_)
    for at in range(0, SUPER, together(type_)):
        groups = []
        for i in range(together(type_) // form.places):
            here = slice(at + i * form.places, at + (i + 1) * form.places)
            u = 2 * w[here] * x[here]
            if form.shift_span:
                shifted = np.stack([points + 0.125, points - 0.125])
                groups.append(Lines(shifted**2 @ w[here], shifted @ u, np.arange(2)))
            else:
                signs, of_byte = _sign_patterns(form.sign_bits, form.places)[i]
                b = np.einsum("pj,ej->pe", signs * u, points)
                groups.append(Lines((points**2 @ w[here])[np.newaxis], b, of_byte))
        yield groups


def best_numbers(x: F64, w: F64, scales: F64, type_: GgmlType) -> tuple[dict[str, list[int]], F64]:
    """Entries, signs and shifts of least error at the blocks' scales, and the errors by choice."""
    span = together(type_)
    entries: list[int] = []
    options: list[int] = []
    errors = []
    for k, groups in enumerate(choices(x, w, type_)):
        s = scales[k * span // FORMS[type_].block]
        most = sum(lines.most(s) for lines in groups)
        option = int(np.argmax(most))
        options.append(option)
        entries += [int(lines.saved(s)[lines.of_option[option]].argmax()) for lines in groups]
        here = slice(k * span, (k + 1) * span)
        errors.append((w[here] * x[here] ** 2).sum() - s * np.max(most))
    field = "shift" if FORMS[type_].shift_span else "sign"
    return {"entry": entries, field: options}, np.array(errors)


def least_error(x: F64, w: F64, d: float, type_: GgmlType) -> float:
    """A lower bound of a super-block's error whatever its scales, entries, signs and shifts.

    v(s), the most that b - s a can be, summed over a block, is convex, so lines between samples
    never lie below it. The scale runs over 0.4 to 2.5 times `d`, in steps of 0.5 % through `d`.
    """
    form = FORMS[type_]
    s = d * form.unit * np.geomspace(0.4, 2.5 * (2 * form.max_l + 1), 300)
    v = np.zeros((SUPER // form.block, s.size))
    for k, groups in enumerate(choices(x, w, type_)):
        if form.places == 8 and form.sign_bits:
            # The signs of largest b are best at any scale, for they do not change a.
            b = groups[0].b.max(axis=0, keepdims=True)
            groups[0] = Lines(groups[0].a, b, np.zeros(1, np.intp))
        best = [np.max(sum(lines.most(at) for lines in groups)) for at in s]
        v[k * together(type_) // form.block] += best
    odd = 2 * np.arange(form.max_l + 1) + 1
    most = 0.0
    for trial in d * np.geomspace(0.4, 2.5, 369):
        at = trial * form.unit * odd
        most = max(most, sum((at * np.interp(at, s, block)).max() for block in v))
    return float((w * x**2).sum() - most)
