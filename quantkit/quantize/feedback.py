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
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from quantkit.errors import NonFiniteError, UsageError
from quantkit.quantize import _on_host, layout
from quantkit.quantize.codec import Blocks, Codec, How, Tile
from quantkit.quantize.gain import encode_rows
from quantkit.quantize.kernels import feedback as kernels
from quantkit.quantize.layout import supports
from quantkit.quantize.torch import feedback as _on_device

F32 = npt.NDArray[np.float32]
Tensor = torch.Tensor

SPAN = 256  # columns that are searched and rounded together
ROWS = 128  # rows that are treated together: what is lost on them stays in the cache
ROWS_ON_DEVICE = 4096  # enough to keep a GPU busy
_LARGEST = 3e38
_SIGNS = {"free": kernels.FREE, "even": kernels.EVEN, "none": kernels.NONE}


@dataclass(frozen=True)
class Feedback:
    """How far rounding goes: passes after the first, and looks at a codebook per group."""

    n_passes: int = 1
    n_scans: int = 2
    ridge: float = 0.05


class Metric:
    """What an error in a weight's columns costs at its outputs: H f32[n, n], damped, mean 1.

    What is rounded under it is rounded on the device that `gram` is on: by numba's kernels on the
    CPU, by torch elsewhere. `importance` f32[n] is its diagonal before damping, which weighs
    columns in a search for scales.

    Raises `UsageError` unless H is square and `NonFiniteError` where it holds NaN or infinity.
    """

    def __init__(self, gram: Tensor, damping: float) -> None:
        if gram.dim() != 2 or gram.shape[0] != gram.shape[1] or not len(gram):
            raise UsageError(f"a Gram matrix is square, this one is {tuple(gram.shape)}")
        diagonal = gram.diagonal()
        if not bool(torch.isfinite(gram).all()):
            raise NonFiniteError("the Gram matrix of a weight's inputs holds NaN or infinity")
        self.importance: F32 = np.ascontiguousarray(diagonal.cpu().numpy(), np.float32)
        mean = float(diagonal.double().mean())
        self.gram = (gram.double() / mean if mean > 0 else gram.clone()).float()
        self.gram.diagonal().add_(damping if mean > 0 else 1.0)
        self._ldl: tuple[Tensor, Tensor] | None = None
        self._factors: dict[int, tuple[Tensor, Tensor]] = {}
        self._descents: dict[tuple[int, int, int], tuple[Tensor, Tensor, Tensor]] = {}

    def factor(self, group: int) -> tuple[Tensor, Tensor]:
        """U + 1, f32[n, n], and D of every block, f32[n / group, group, group], mean diagonal 1.

        Raises `UsageError` where H is not positive definite in spite of the damping.
        """
        if group not in self._factors:
            if self._ldl is None:
                self._ldl = _ldl(self.gram)
            self._factors[group] = _in_blocks(*self._ldl, group)
        return self._factors[group]

    def descent(self, begin: int, end: int, group: int) -> tuple[Tensor, Tensor, Tensor]:
        """(couple, metric, inverse of the blocks) to go over columns begin .. end once more."""
        key = begin, end, group
        if key not in self._descents:
            h = self.gram[begin:end, begin:end]
            n = len(h)
            blocks = _diagonal_blocks(h, group)
            inverse = torch.linalg.inv(blocks.double()).float()
            couple = (h.view(n, n // group, group).transpose(0, 1) @ inverse).transpose(0, 1)
            self._descents[key] = couple.reshape(n, n), _normal(blocks), inverse
        return self._descents[key]


def _ldl(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Unit upper V f32[n, n] and d f64[n] of H = V diag(d) V'."""
    turned = gram.flip(0, 1).double()
    lower, info = torch.linalg.cholesky_ex(turned)
    del turned
    if int(info):
        raise UsageError(
            "the Gram matrix of a weight's inputs is not positive definite",
            hint="more damping, or more text to calibrate on",
        )
    size = lower.diagonal().clone()
    return lower.div_(size).float().flip(0, 1), size.flip(0).square()


def _in_blocks(upper: Tensor, d: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """V diag(d) V' as (U + 1) D (U + 1)' with blocks of `group` columns."""
    if group == 1:
        return upper, upper.new_ones(len(d), 1, 1)
    n = len(d)
    corner = _diagonal_blocks(upper, group).double()
    blocks = corner * d.view(-1, 1, group) @ corner.transpose(1, 2)
    one = torch.eye(group, dtype=torch.float64, device=d.device).expand_as(corner)
    inverse = torch.linalg.solve_triangular(corner, one, upper=True, unitriangular=True).float()
    whole = (upper.view(n, n // group, group).transpose(0, 1) @ inverse).transpose(0, 1)
    return whole.reshape(n, n), _normal(blocks.float())


def _diagonal_blocks(h: Tensor, group: int) -> Tensor:
    n = len(h) // group
    return h.view(n, group, n, group).diagonal(dim1=0, dim2=2).permute(2, 0, 1).contiguous()


def _normal(blocks: Tensor) -> Tensor:
    """Blocks scaled to a mean diagonal of 1: only their proportions matter."""
    size = blocks.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
    return (blocks / size.clamp_min(1e-30)).contiguous()


def encode_with_feedback(
    codec: Codec, x: Tile, metric: Metric, how: How, feedback: Feedback, n_threads: int = 1
) -> Blocks:
    """Blocks u8[rows, row_bytes] of x f32[rows, n] under the metric of its inputs.

    Rows are independent; on a CPU neither their number nor that of threads shows in the bytes.
    Raises `UsageError` for a type that does not support it and for a metric of other columns.
    """
    if not supports(codec.type):
        raise UsageError(f"{codec.type.name} has no codes that could be chosen with feedback")
    if x.shape[1] != len(metric.gram):
        raise UsageError(
            f"weights of {x.shape[1]} columns under a metric of {len(metric.gram)} columns"
        )
    if not len(x):
        return np.empty((0, codec.type.row_bytes(x.shape[1])), np.uint8)
    rounder = _Rounder(codec, metric, how, feedback)
    on_host = metric.gram.device.type == "cpu"
    height = ROWS if on_host else ROWS_ON_DEVICE
    parts = [x[begin : begin + height] for begin in range(0, len(x), height)]
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(n_threads if on_host else 1) as pool:
            done = list(pool.map(rounder.encode, parts))
    finally:
        torch.set_num_threads(before)
    return np.concatenate(done)


def _kernels_of(device: torch.device) -> Any:
    return _on_host if device.type == "cpu" else _on_device


class _Rounder:
    """One type under one metric."""

    def __init__(self, codec: Codec, metric: Metric, how: How, feedback: Feedback) -> None:
        self._codec, self._metric, self._how, self._feedback = codec, metric, how, feedback
        self._device = metric.gram.device
        self._kernels = _kernels_of(self._device)
        self._group = kernels.GROUP if codec.type in layout.BOOKS else 1
        self._upper, self._d = metric.factor(self._group)
        # Made before threads share them.
        spans = self._spans(len(metric.gram))
        self._couples = [self._upper[b:e, b:e].contiguous() for b, e in spans]
        if feedback.n_passes:
            for begin, end in spans:
                metric.descent(begin, end, self._group)

    def encode(self, x: Tile) -> Blocks:
        """Some rows, one thread."""
        target = torch.tensor(x, dtype=torch.float32, device=self._device).contiguous()
        blocks, chosen = self._first_pass(target)
        for _ in range(self._feedback.n_passes):
            blocks, chosen = self._refit(target, blocks, chosen)
            self._descend(target, blocks, chosen)
        return blocks.reshape(len(x), -1)

    def _spans(self, n: int) -> list[tuple[int, int]]:
        return [(begin, min(begin + SPAN, n)) for begin in range(0, n, SPAN)]

    def _bytes(self, n: int) -> int:
        return self._codec.type.row_bytes(n)

    def _there(self, a: npt.NDArray[Any]) -> Tensor:
        """A copy of an array, on the device."""
        return torch.tensor(a, device=self._device)

    def _first_pass(self, target: Tensor) -> tuple[Blocks, Tensor]:
        rows, n = target.shape
        upper = self._upper
        blocks = np.empty((rows, self._bytes(n)), np.uint8)
        lost, chosen = torch.empty_like(target), torch.empty_like(target)
        for (begin, end), couple in zip(self._spans(n), self._couples, strict=True):
            z = target[:, begin:end] + lost[:, :begin] @ upper[:begin, begin:end]
            # Beyond f32 only where weights of its size meet weights beyond f16.
            z.nan_to_num_(0.0, _LARGEST, -_LARGEST)
            importance = self._metric.importance[begin:end]
            part = encode_rows(self._codec, z.cpu().numpy(), importance, self._how)
            ref = target[:, begin:end].contiguous()
            d = self._d[begin // self._group : end // self._group]
            part, values = self._round(part, z, ref, couple, d, keep=False)
            blocks[:, self._bytes(begin) : self._bytes(end)] = part
            chosen[:, begin:end] = values
            lost[:, begin:end] = ref - values
        return blocks, chosen

    def _descend(self, target: Tensor, blocks: Blocks, chosen: Tensor) -> None:
        """One round of coordinate descent over all columns, in place."""
        rows, n = target.shape
        error = chosen - target
        for begin, end in self._spans(n):
            couple, d, inverse = self._metric.descent(begin, end, self._group)
            slope = (error @ self._metric.gram[:, begin:end]).view(rows, -1, self._group)
            step = (slope.transpose(0, 1) @ inverse).transpose(0, 1)
            ref = chosen[:, begin:end].contiguous()
            z = ref - step.reshape(rows, -1)
            span = slice(self._bytes(begin), self._bytes(end))
            part = np.ascontiguousarray(blocks[:, span])
            part, values = self._round(part, z, ref, couple, d, keep=True)
            blocks[:, span] = part
            chosen[:, begin:end] = values
            error[:, begin:end] += values - ref

    def _round(
        self, part: Blocks, z: Tensor, ref: Tensor, couple: Tensor, d: Tensor, *, keep: bool
    ) -> tuple[Blocks, Tensor]:
        """A span's blocks with codes chosen anew, and what they decode to."""
        type_, there = self._codec.type, self._there
        if type_ in layout.LEVELS:
            levels = layout.LEVELS[type_]
            order = np.argsort(levels.values, kind="stable")
            scale, offset = layout.scales_of(type_, part)
            places, values = self._kernels.round_levels(
                z, ref, there(scale), there(offset), there(levels.values[order]), couple
            )
            codes = order.astype(np.uint8)[places.cpu().numpy()]
            return layout.with_codes(type_, part, codes), values
        book = layout.BOOKS[type_]
        old_entries, old_marks = layout.entries_of(type_, part)
        entries, marks = there(old_entries.astype(np.int32)), there(old_marks)
        values = self._kernels.round_entries(
            z,
            ref,
            there(layout.book_scales_of(type_, part)),
            (book.places, _SIGNS[book.signs], book.shifts == "per-group"),
            there(book.levels),
            d,
            couple,
            self._feedback.n_scans,
            keep,
            entries,
            marks,
        )
        found = entries.cpu().numpy().astype(np.uint16), marks.cpu().numpy()
        return layout.with_entries(type_, part, *found), values

    def _refit(self, target: Tensor, blocks: Blocks, now: Tensor) -> tuple[Blocks, Tensor]:
        """The f16 scales of a row by least squares under all of H, codes as they are.

        A ridge draws them to what they were, for one number per 256 weights fits noise as well.
        """
        type_ = self._codec.type
        n_scales = layout.N_SCALES.get(type_, 0)
        if not n_scales or type_.block_size < SPAN:
            return blocks, now
        parts = [now]
        if n_scales == 2:
            _, offset = layout.scales_of(type_, blocks)
            low = self._there(np.repeat(offset, layout.LEVELS[type_].sub, 1))
            parts = [now - low, low]
        slope = (now - target) @ self._metric.gram
        step = _least_squares(parts, slope, self._metric.gram, self._feedback.ridge)
        factor = (1 - step).view(len(target), -1, n_scales).cpu().numpy()
        raised = layout.rescaled(type_, blocks, factor)
        return raised, self._there(self._codec.decode(raised))


def _least_squares(parts: list[Tensor], slope: Tensor, gram: Tensor, ridge: float) -> Tensor:
    """By what shares to shorten every super-block of every part of a row: f32[rows, k].

    Parts are f32[rows, n], slope = error H. No share is beyond half, and a row whose cost that
    bound raises is left as it is.
    """
    rows, n = slope.shape
    supers, m = n // SPAN, len(parts)
    system, right = slope.new_zeros(rows, supers * m, supers * m), slope.new_empty(rows, supers * m)
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
