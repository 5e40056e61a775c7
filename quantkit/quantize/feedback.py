"""Rounding with feedback: codes that minimise the error of a weight's outputs, not of the weight.

With x the inputs of a weight W and H = E[x x'] their Gram matrix, rounding to W^ costs
tr((W - W^) H (W - W^)'). Block LDLQ (QuIP, arXiv 2307.13304, 4; QuIP#, arXiv 2402.04396, 4.1)
factors H = (U + 1) D (U + 1)' with U strictly upper in blocks of `group` columns, takes columns
from left to right and aims at

    z_k = w_k + sum over j < k of (w_j - w^_j) U_jk,

at which the cost of column k is D_k alone. Here it runs inside the formats: a super-block's scales
are searched on the columns as they have become, by the codec of the type, then its codes are chosen
one group after the other. Later passes refit the f16 scales of a row under all of H, jointly, and
go over the codes once more.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from quantkit.errors import NonFiniteError, UsageError
from quantkit.quantize import layout
from quantkit.quantize.codec import Blocks, Codec, How, Tile
from quantkit.quantize.gain import encode_rows
from quantkit.quantize.kernels import feedback as kernels
from quantkit.types import GgmlType

F32 = npt.NDArray[np.float32]
Tensor = torch.Tensor

SPAN = 256  # columns that are searched and rounded together
ROWS = 128  # rows that are treated together: what is lost on them stays in the cache
_LARGEST = 3e38
_SIGNS = {"free": kernels.FREE, "even": kernels.EVEN, "none": kernels.NONE}


@dataclass(frozen=True)
class Feedback:
    """How far rounding goes: passes after the first, and looks at a codebook per group."""

    n_passes: int = 1
    n_scans: int = 2
    ridge: float = 0.05


def supports(type_: GgmlType) -> bool:
    """Whether a type's codes can be chosen with feedback."""
    return type_ in layout.LEVELS or type_ in layout.BOOKS


class Metric:
    """What an error in a weight's columns costs at its outputs: H f32[n, n], damped, mean 1.

    `importance` f32[n] is its diagonal before damping, which weighs columns in a search for scales.
    Raises `UsageError` unless H is square and `NonFiniteError` where it holds NaN or infinity.
    """

    def __init__(self, gram: Tensor, damping: float) -> None:
        if gram.dim() != 2 or gram.shape[0] != gram.shape[1] or not len(gram):
            raise UsageError(f"a Gram matrix is square, this one is {tuple(gram.shape)}")
        diagonal = gram.diagonal()
        if not bool(torch.isfinite(gram).all()):
            raise NonFiniteError("the Gram matrix of a weight's inputs holds NaN or infinity")
        self.importance: F32 = np.ascontiguousarray(diagonal.numpy(), np.float32)
        mean = float(diagonal.double().mean())
        self.gram = (gram.double() / mean if mean > 0 else gram.clone()).float()
        self.gram.diagonal().add_(damping if mean > 0 else 1.0)
        self._factors: dict[int, tuple[Tensor, F32]] = {}
        self._descents: dict[tuple[int, int, int], tuple[F32, F32, Tensor]] = {}

    def factor(self, group: int) -> tuple[Tensor, F32]:
        """U + 1, f32[n, n], and D of every block, f32[n / group, group, group], mean diagonal 1.

        Raises `UsageError` where H is not positive definite in spite of the damping.
        """
        if group not in self._factors:
            self._factors[group] = _block_ldl(self.gram, group)
        return self._factors[group]

    def descent(self, begin: int, end: int, group: int) -> tuple[F32, F32, Tensor]:
        """(couple, metric, inverse of the blocks) to go over columns begin .. end once more."""
        key = begin, end, group
        if key not in self._descents:
            h = self.gram[begin:end, begin:end]
            n = len(h)
            blocks = _diagonal_blocks(h, group)
            inverse = torch.linalg.inv(blocks.double()).float()
            couple = (h.view(n, n // group, group).transpose(0, 1) @ inverse).transpose(0, 1)
            self._descents[key] = couple.reshape(n, n).numpy(), _normal(blocks), inverse
        return self._descents[key]


def _block_ldl(gram: Tensor, group: int) -> tuple[Tensor, F32]:
    h = gram.double().flip(0, 1)
    lower, info = torch.linalg.cholesky_ex(h)
    if int(info):
        raise UsageError(
            "the Gram matrix of a weight's inputs is not positive definite",
            hint="more damping, or more text to calibrate on",
        )
    r = lower.flip(0, 1)  # upper, H = R R'
    n = len(r)
    corner = _diagonal_blocks(r, group)
    for begin in range(0, n, group):
        end = begin + group
        r[:end, begin:end] = torch.linalg.solve_triangular(
            corner[begin // group], r[:end, begin:end], upper=True, left=False
        )
    return r.float(), _normal((corner @ corner.transpose(1, 2)).float())


def _diagonal_blocks(h: Tensor, group: int) -> Tensor:
    n = len(h) // group
    return h.view(n, group, n, group).diagonal(dim1=0, dim2=2).permute(2, 0, 1).contiguous()


def _normal(blocks: Tensor) -> F32:
    """Blocks scaled to a mean diagonal of 1: only their proportions matter."""
    size = blocks.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
    return np.ascontiguousarray((blocks / size.clamp_min(1e-30)).numpy(), np.float32)


def encode_with_feedback(
    codec: Codec, x: Tile, metric: Metric, how: How, feedback: Feedback, n_threads: int = 1
) -> Blocks:
    """Blocks u8[rows, row_bytes] of x f32[rows, n] under the metric of its inputs.

    Rows are independent; neither their number nor that of threads shows in the bytes. Raises
    `UsageError` for a type that does not support it and for a metric of other columns.
    """
    if not supports(codec.type):
        raise UsageError(f"{codec.type.name} has no codes that could be chosen with feedback")
    if x.shape[1] != len(metric.gram):
        raise UsageError(
            f"weights of {x.shape[1]} columns under a metric of {len(metric.gram)} columns"
        )
    rounder = _Rounder(codec, metric, how, feedback)
    parts = [x[begin : begin + ROWS] for begin in range(0, len(x), ROWS)] or [x]
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(n_threads) as pool:
            done = list(pool.map(rounder.encode, parts))
    finally:
        torch.set_num_threads(before)
    return np.concatenate(done)


class _Rounder:
    """One type under one metric."""

    def __init__(self, codec: Codec, metric: Metric, how: How, feedback: Feedback) -> None:
        self._codec, self._metric, self._how, self._feedback = codec, metric, how, feedback
        self._group = kernels.GROUP if codec.type in layout.BOOKS else 1
        self._upper, self._d = metric.factor(self._group)
        # Made before threads share them.
        spans = self._spans(len(metric.gram))
        self._couples = [self._upper[b:e, b:e].contiguous().numpy() for b, e in spans]
        if feedback.n_passes:
            for begin, end in spans:
                metric.descent(begin, end, self._group)

    def encode(self, x: Tile) -> Blocks:
        """Some rows, one thread."""
        x = np.ascontiguousarray(x, np.float32)
        blocks, chosen = self._first_pass(x)
        for _ in range(self._feedback.n_passes):
            blocks, chosen = self._refit(x, blocks, chosen)
            self._descend(x, blocks, chosen)
        return blocks.reshape(len(x), -1)

    def _spans(self, n: int) -> list[tuple[int, int]]:
        return [(begin, min(begin + SPAN, n)) for begin in range(0, n, SPAN)]

    def _bytes(self, n: int) -> int:
        return self._codec.type.row_bytes(n)

    def _first_pass(self, x: Tile) -> tuple[Blocks, F32]:
        rows, n = x.shape
        target, upper = torch.tensor(x), self._upper
        blocks = np.empty((rows, self._bytes(n)), np.uint8)
        lost = torch.empty(rows, n)
        chosen: F32 = np.empty((rows, n), np.float32)
        for (begin, end), couple in zip(self._spans(n), self._couples, strict=True):
            z = target[:, begin:end] + lost[:, :begin] @ upper[:begin, begin:end]
            # Beyond f32 only where weights of its size meet weights beyond f16.
            aim = z.nan_to_num_(0.0, _LARGEST, -_LARGEST).numpy()
            part = encode_rows(self._codec, aim, self._metric.importance[begin:end], self._how)
            ref = np.ascontiguousarray(x[:, begin:end])
            d = self._d[begin // self._group : end // self._group]
            part, values = self._round(part, aim, ref, couple, d, keep=False)
            blocks[:, self._bytes(begin) : self._bytes(end)] = part
            chosen[:, begin:end] = values
            lost[:, begin:end] = torch.from_numpy(ref - values)
        return blocks, chosen

    def _descend(self, x: Tile, blocks: Blocks, chosen: F32) -> None:
        """One round of coordinate descent over all columns, in place."""
        n = x.shape[1]
        gram, now = self._metric.gram, torch.from_numpy(chosen)
        error = now - torch.tensor(x)
        for begin, end in self._spans(n):
            couple, d, inverse = self._metric.descent(begin, end, self._group)
            slope = (error @ gram[:, begin:end]).view(len(x), -1, self._group)
            step = (slope.transpose(0, 1) @ inverse).transpose(0, 1)
            z = now[:, begin:end] - step.reshape(len(x), -1)
            ref = np.ascontiguousarray(chosen[:, begin:end])
            span = slice(self._bytes(begin), self._bytes(end))
            part = np.ascontiguousarray(blocks[:, span])
            part, values = self._round(part, z.numpy(), ref, couple, d, keep=True)
            blocks[:, span] = part
            chosen[:, begin:end] = values
            error[:, begin:end] += torch.from_numpy(values - ref)

    def _round(
        self, part: Blocks, z: F32, ref: F32, couple: F32, d: F32, *, keep: bool
    ) -> tuple[Blocks, F32]:
        """A span's blocks with codes chosen anew, and what they decode to."""
        type_ = self._codec.type
        values: F32 = np.empty_like(ref)
        if type_ in layout.LEVELS:
            levels = layout.LEVELS[type_]
            order = np.argsort(levels.values, kind="stable")
            scale, offset = layout.scales_of(type_, part)
            places = np.empty(ref.shape, np.uint8)
            kernels.round_levels(
                z, ref, scale, offset, levels.values[order], couple, places, values
            )
            return layout.with_codes(type_, part, order.astype(np.uint8)[places]), values
        book = layout.BOOKS[type_]
        entries, marks = layout.entries_of(type_, part)
        kernels.round_entries(
            z,
            ref,
            layout.book_scales_of(type_, part),
            (book.places, _SIGNS[book.signs], book.shifts == "per-group"),
            np.ascontiguousarray(book.levels.T).ravel(),
            d.ravel(),
            couple,
            self._feedback.n_scans,
            keep,
            entries,
            marks,
            values,
        )
        return layout.with_entries(type_, part, entries, marks), values

    def _refit(self, x: Tile, blocks: Blocks, chosen: F32) -> tuple[Blocks, F32]:
        """The f16 scales of a row by least squares under all of H, codes as they are.

        A ridge draws them to what they were, for one number per 256 weights fits noise as well.
        """
        type_ = self._codec.type
        n_scales = layout.N_SCALES.get(type_, 0)
        if not n_scales or type_.block_size < SPAN:
            return blocks, chosen
        now = torch.from_numpy(chosen)
        parts = [now]
        if n_scales == 2:
            _, offset = layout.scales_of(type_, blocks)
            low = torch.from_numpy(np.repeat(offset, layout.LEVELS[type_].sub, 1))
            parts = [now - low, low]
        slope = (now - torch.tensor(x)) @ self._metric.gram
        step = _least_squares(parts, slope, self._metric.gram, self._feedback.ridge)
        factor = (1 - step).view(len(x), -1, n_scales).numpy()
        raised = layout.rescaled(type_, blocks, factor)
        return raised, self._codec.decode(raised)


def _least_squares(parts: list[Tensor], slope: Tensor, gram: Tensor, ridge: float) -> Tensor:
    """By what shares to shorten every super-block of every part of a row: f32[rows, k].

    Parts are f32[rows, n], slope = error H. No share is beyond half, and a row whose cost that
    bound raises is left as it is.
    """
    rows, n = slope.shape
    supers, m = n // SPAN, len(parts)
    system, right = torch.zeros(rows, supers * m, supers * m), torch.empty(rows, supers * m)
    for i, basis in enumerate(parts):
        right[:, i::m] = (basis * slope).view(rows, supers, SPAN).sum(2)
        for b in range(supers):
            begin = b * SPAN
            product = basis[:, begin : begin + SPAN] @ gram[begin : begin + SPAN, begin:]
            for j, other in enumerate(parts):
                row = (product * other[:, begin:]).view(rows, supers - b, SPAN).sum(2)
                system[:, b * m + i, b * m + j :: m] = row
    system = (system.triu() + system.triu(1).transpose(1, 2)).double()
    ridged, own = system.clone(), system.diagonal(dim1=1, dim2=2)
    added = ridge * own + 1e-12 * own.amax(1, keepdim=True) + 1e-30
    ridged.diagonal(dim1=1, dim2=2).add_(added)
    lower, failed = torch.linalg.cholesky_ex(ridged)
    wanted = right.double()[:, :, None]
    step = torch.cholesky_solve(wanted, lower).clamp_(-1.0, 0.5)
    change = (step * (system @ step - 2 * wanted)).sum((1, 2))
    better = (failed == 0) & (change < 0)  # false for NaN
    return torch.where(better[:, None], step[:, :, 0], 0.0).float()
