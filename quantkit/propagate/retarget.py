"""What a weight should aim at when its inputs are no longer what they were.

With inputs x of the full-precision run and x~ of the run so far quantised, and residuals r and r~
that the weight's output is added to, the least mean square of

    x W' + rho (r - r~) - x~ W*'        (rho only for weights that write the residual)

is at W* = W + [alpha W sum (x - x~) x~' + rho sum (r - r~) x~'] (sum x~ x~' + lambda)^-1, alpha = 1
(GPTAQ, arXiv 2504.02692, 3; LoaQ, arXiv 2509.06297, for the residual). Fitted on few tokens that
is worse than nothing. So alpha, rho and lambda are what does best on tokens held back, the two
strengths in closed form, and nothing is retargeted where even that does not help.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from quantkit.propagate.moments import Moments, Sums

Tensor = torch.Tensor

LAMBDAS = (0.02, 0.1, 0.5)  # in units of the mean diagonal
_N_SAMPLE = 128  # rows that strengths are chosen on
_AT_ONCE = 1024  # rows that are solved for together


@dataclass(frozen=True)
class Strengths:
    """How strongly a weight follows what its inputs and its residual have become."""

    alpha: float = 0.0
    rho: float = 0.0
    ridge: float = 0.0
    share: float = 0.0  # of the error at held-back tokens that it removes


class Solver:
    """Least squares over some sums; what weights with the same inputs share is solved once."""

    def __init__(self, sums: Sums) -> None:
        self.sums = sums
        self._drifts: dict[float, Tensor] = {}

    def drift(self, ridge: float) -> Tensor:
        """sum (x - x~) x~' (sum x~ x~' + lambda)^-1, f32[n, n]."""
        if ridge not in self._drifts:
            (self._drifts[ridge],) = _solved(self.sums, ridge, [self.sums.drift[0]])
        return self._drifts[ridge]

    def steps(self, ridge: float, rows: Tensor, numbers: Tensor) -> list[Tensor]:
        """What alpha and, for writers, rho stand before: f32[k, n] each, of rows `numbers`."""
        residual = self.sums.residual
        if residual is None:
            return [rows @ self.drift(ridge)]
        return _solved(self.sums, ridge, [rows @ self.sums.drift[0], residual[0][numbers]])

    def wanted(self, rows: Tensor, numbers: Tensor) -> Tensor:
        """What both together should add to the outputs, in moments with x~: f32[k, n]."""
        wanted = rows @ self.sums.drift[0]
        return wanted if self.sums.residual is None else wanted + self.sums.residual[0][numbers]


class Folds:
    """Solvers for one of the matrices of some moments: fitted, held back, and both together."""

    def __init__(self, moments: Moments, matrix: int) -> None:
        self.fitted = Solver(moments.fitted(matrix))
        self.held = Solver(moments.held(matrix))
        self.all = Solver(moments.all(matrix))


class Retarget:
    """The new aim of one weight [rows, n]."""

    def __init__(self, folds: Folds, sample: Tensor, sampled: Tensor) -> None:
        """`sample` f32[k, n] are the weight's rows number `sampled` i64[k]."""
        self._solver, self.strengths = folds.all, Strengths()
        if folds.fitted.sums.n_tokens and folds.held.sums.n_tokens:
            options = (_judged(folds, ridge, sample, sampled) for ridge in LAMBDAS)
            self.strengths = max(options, key=lambda s: s.share)

    def __call__(self, w: Tensor, begin: int) -> Tensor:
        """New rows for rows `begin ..` of the weight, f32[k, n]."""
        s = self.strengths
        if s.share <= 0:
            return w
        steps = self._solver.steps(s.ridge, w, torch.arange(begin, begin + len(w)))
        for strength, step in zip((s.alpha, s.rho), steps, strict=False):
            w = w + strength * step
        return w


def sampled_rows(n_rows: int) -> Tensor:
    """Rows that stand for all of a weight's, i64[k]."""
    return torch.linspace(0, n_rows - 1, min(n_rows, _N_SAMPLE), dtype=torch.float64).long()


def _solved(sums: Sums, ridge: float, rights: list[Tensor]) -> list[Tensor]:
    """Each of f32[k, n] times the inverse of the damped Gram matrix; zeros where it has none."""
    gram = sums.gram[0].double()
    gram.diagonal().add_(ridge * float(gram.diagonal().mean()) + 1e-30)
    lower, info = torch.linalg.cholesky_ex(gram)
    if int(info):
        return [torch.zeros_like(right) for right in rights]
    del gram
    return [_divided(right, lower) for right in rights]


def _divided(right: Tensor, lower: Tensor) -> Tensor:
    """f32[k, n] times the inverse of L L', some rows at a time: in f64 they take their space."""
    solved = torch.empty_like(right)
    for begin in range(0, len(right), _AT_ONCE):
        rows = right[begin : begin + _AT_ONCE].double().T
        solved[begin : begin + _AT_ONCE] = torch.cholesky_solve(rows, lower).T
    return solved


def _judged(folds: Folds, ridge: float, sample: Tensor, sampled: Tensor) -> Strengths:
    """The best strengths for tokens held back, 0 to 1, of what was fitted on the others."""
    steps = folds.fitted.steps(ridge, sample, sampled)
    wanted = folds.held.wanted(sample, sampled)
    gram = folds.held.sums.gram[0]
    images = [step @ gram for step in steps]
    a = [[float((i * s).sum(dtype=torch.float64)) for s in steps] for i in images]
    b = [float((s * wanted).sum(dtype=torch.float64)) for s in steps]
    chosen = [0.0] * len(steps)
    for _ in range(50):  # coordinate descent within the box; two unknowns at most
        for k in range(len(steps)):
            others = sum(a[k][m] * chosen[m] for m in range(len(steps)) if m != k)
            if a[k][k] > 0:
                chosen[k] = min(max((b[k] - others) / a[k][k], 0.0), 1.0)
    saved = sum(
        chosen[k] * (2 * b[k] - sum(a[k][m] * chosen[m] for m in range(len(steps))))
        for k in range(len(steps))
    )
    scale = float((sample @ gram * sample).sum(dtype=torch.float64)) or 1.0
    rho = chosen[1] if len(chosen) > 1 else 0.0
    return Strengths(chosen[0], rho, ridge, saved / scale)
