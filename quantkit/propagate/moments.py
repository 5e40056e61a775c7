"""What two runs of a model tell of a weight's inputs: second moments, with a part held back.

The teacher runs with the weights as they are, the student with those quantised so far. For inputs
x and x~ of a weight and what they add to, residuals r and r~, all that rounding and retargeting
want are sums over tokens of x~ x~', (x - x~) x~' and (r - r~) x~'.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

Tensor = torch.Tensor


@dataclass(frozen=True)
class Sums:
    """Sums over tokens, for each of `m` matrices with inputs of their own.

    gram, drift f32[m, n, n]; residual f32[m, n_out, n], or None for weights that write no residual;
    n_tokens counts tokens, weight is the sum of their weights f64[m].
    """

    gram: Tensor
    drift: Tensor
    residual: Tensor | None
    weight: Tensor
    n_tokens: int

    def __add__(self, other: Sums) -> Sums:
        residual = None if self.residual is None else self.residual + _some(other.residual)
        return Sums(
            self.gram + other.gram,
            self.drift + other.drift,
            residual,
            self.weight + other.weight,
            self.n_tokens + other.n_tokens,
        )

    def of(self, matrix: int) -> Sums:
        """The sums of one of the matrices alone."""
        one = slice(matrix, matrix + 1)
        residual = None if self.residual is None else self.residual[one]
        return Sums(self.gram[one], self.drift[one], residual, self.weight[one], self.n_tokens)


class Moments:
    """Collects `Sums` in two folds: what is fitted, and what is held back to judge the fit."""

    def __init__(
        self, n_matrices: int, n: int, n_out: int = 0, *, device: torch.device | None = None
    ) -> None:
        self._folds = [
            [
                torch.zeros(n_matrices, n, n, device=device),
                torch.zeros(n_matrices, n, n, device=device),
                torch.zeros(n_matrices, n_out, n, device=device),
                torch.zeros(n_matrices, dtype=torch.float64),
            ]
            for _ in range(2)
        ]
        self._n_tokens = [0, 0]
        self._writes = n_out > 0

    @property
    def width(self) -> int:
        """Columns of each matrix."""
        return int(self._folds[0][0].shape[-1])

    @property
    def device(self) -> torch.device:
        """Where the sums are."""
        return self._folds[0][0].device

    def add(
        self,
        held: Tensor,
        x: Tensor,
        student: Tensor,
        residual: Tensor | None = None,
        weight: Tensor | None = None,
    ) -> None:
        """Tokens of a block: x, student f32[n_tok, m, n], residual f32[n_tok, n_out] teacher less
        student, weight f32[n_tok]; held bool[n_tok] tells the fold.
        """
        held = held.to(x.device)
        for fold, (gram, drift, written, total) in enumerate(self._folds):
            index = torch.nonzero(held == bool(fold)).ravel()
            if not len(index):
                continue
            s = student[index].transpose(0, 1)
            d = x[index].transpose(0, 1) - s
            w = s.new_ones(len(index)) if weight is None else weight.to(x.device)[index]
            right = s * w[:, None]
            torch.baddbmm(gram, right.transpose(1, 2), s, out=gram)
            torch.baddbmm(drift, d.transpose(1, 2), right, out=drift)
            if residual is not None:
                r = residual.to(x.device)[index].expand(len(s), -1, -1)
                torch.baddbmm(written, r.transpose(1, 2), right, out=written)
            total.add_(float(w.double().sum()))
            self._n_tokens[fold] += len(index)

    def fitted(self, matrix: int | None = None) -> Sums:
        """Sums over tokens that are not held back, of all matrices or of one."""
        return self._sums(0, matrix)

    def held(self, matrix: int | None = None) -> Sums:
        """Sums over tokens that are."""
        return self._sums(1, matrix)

    def all(self, matrix: int | None = None) -> Sums:
        """Both."""
        return self.fitted(matrix) + self.held(matrix)

    def gram(self, matrix: int) -> tuple[Tensor, float, int]:
        """Sum over all tokens f32[n, n] of one matrix alone, their weight, and their number."""
        (gram, *_, weight), (held, *_, more) = self._folds
        total = float(weight[matrix] + more[matrix])
        return gram[matrix] + held[matrix], total, sum(self._n_tokens)

    def _sums(self, fold: int, matrix: int | None) -> Sums:
        gram, drift, written, total = self._folds[fold]
        residual = written if self._writes else None
        sums = Sums(gram, drift, residual, total, self._n_tokens[fold])
        return sums if matrix is None else sums.of(matrix)


def _some(tensor: Tensor | None) -> Tensor:
    if tensor is None:
        raise ValueError("sums of a weight that writes a residual and of one that does not")
    return tensor
