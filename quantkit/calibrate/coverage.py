"""What the quantiser may rely on: the importance of every column, and how many tokens back it.

Routing starves some experts, and the mean over seven tokens is noise that a search would fit to.
So an expert that saw n tokens counts as if it had seen kappa more of a kind that is well known:

    importance = n / (n + kappa) * own mean + kappa / (n + kappa) * target

The target is the expert's own mean over all tokens of a subsample, where the statistics have one
(`Statistics.priors`, made for down projections: their inputs are the expert's own hidden units,
which mean nothing to another expert). Otherwise it is the mean over the tokens of all experts,
which suits gate and up projections: all experts of a layer read the same hidden state.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

from quantkit.calibrate.statistics import (
    F64,
    LazySums,
    Statistics,
    Sums,
    shape_of,
    shapes_of,
)
from quantkit.container.kv import boolean
from quantkit.container.names import shown
from quantkit.errors import GgufError, NonFiniteError

KAPPA = 64.0
"""Tokens at which an expert's own mean and the target weigh the same.

The best weight of two estimates goes by their variances: kappa = v / d, where v is the variance of
one token's squared input and d the squared distance of an expert's mean from the target, both
relative to the squared mean. v is 2 for Gaussian inputs and more for heavy tails; d is a few
hundredths between the gate inputs of trained experts. That makes kappa 50 to 100, and because
importance is a weight and no result, what matters is its order of magnitude.
"""

FLOOR = 1e-4
"""Least importance of a column, relative to the mean over its row.

A column that was never active would weigh nothing: a search could put any error there, and a block
of such columns would have no scale. All floors of a row together are at most 1e-4 of its total,
too little to draw precision away from columns that were active.
"""

FILLED = "quantkit.imatrix.filled"
"""Metadata of statistics that `filled` made: blended once, and not to be blended again."""

THRESHOLDS = (32, 256)  # tokens below which an expert is listed as seldom seen

_Mask = npt.NDArray[np.bool_]

_LAYER = re.compile(r"blk\.(\d{1,6})\.")
_F32 = np.finfo(np.float32)


class Origin(StrEnum):
    """Where most of a row's importance comes from."""

    OWN = "own"
    PRIOR = "own on all tokens"
    POOLED = "all experts"
    NONE = "nothing"


@dataclass(frozen=True, slots=True)
class SlabImportance:
    """`values` f32[m, n], positive: one row for each matrix of a tensor; None if nothing is known.

    `origins` has one entry a row, also without values; `note` says in a sentence what was made up
    for or is missing, and is empty where there is nothing to say.
    """

    values: npt.NDArray[np.float32] | None
    origins: tuple[Origin, ...]
    note: str


def importance(
    statistics: Statistics, name: str, shape: Sequence[int], *, kappa: float = KAPPA
) -> SlabImportance:
    """What to weigh the errors in each column of tensor `name` with.

    `shape` is in checkpoint order: [rows, columns], or [m, rows, columns] for m experts or heads.
    Statistics that `filled` made are taken as they are. Raises `GgufError` where the statistics
    are those of another shape.
    """
    check_shape(statistics, name, shape)
    m, n = prod(shape[:-2]), shape[-1]
    if FILLED in statistics.kvs:
        kappa = 0.0
    return _importance(name, statistics.sums.get(name), statistics.priors.get(name), m, n, kappa)


def check_shape(statistics: Statistics, name: str, shape: Sequence[int]) -> None:
    """Raise `GgufError` where there are statistics of another shape; no value is read."""
    m, n = prod(shape[:-2]), shape[-1]
    for table in (statistics.sums, statistics.priors):
        rows, columns = shape_of(table, name) or (m, n)
        if (rows, columns) not in ((m, n), (1, m * n)):
            raise GgufError(
                f"statistics of {rows} × {columns} values, the tensor takes {m} × {n}",
                where=f"tensor {shown(name)}",
                hint="the imatrix was made from another model",
            )


def _importance(
    name: str, sums: Sums | None, prior: Sums | None, m: int, n: int, kappa: float
) -> SlabImportance:
    if sums is None and prior is None:
        return SlabImportance(None, (Origin.NONE,) * m, "no statistics")
    own = sums or Sums(np.zeros((m, n)), np.zeros(m))
    if len(own.counts) < m:  # one count for all: heads, or the experts of a .dat file
        mean, seen = _undivided(own, m, n)
        weight = seen.astype(np.float64)
        tokens = weight
    else:
        mean = own.mean()
        seen = _nonzero(mean)
        weight = np.where(seen, own.counts / np.maximum(own.counts + kappa, 1e-300), 0.0)
        tokens = own.counts
    target = _Target.of(mean, tokens, prior)
    if not (target.pooled.any() or target.known.any()):
        return SlabImportance(None, (Origin.NONE,) * m, "its inputs were always 0")
    if m == 1 and prior is None:
        weight[:] = 1.0  # the target is its own mean
    values = np.empty((m, n), np.float32)
    for row, w in enumerate(weight):  # in one go it would take several times the memory
        values[row] = _floored(w * mean[row] + (1 - w) * target.of_row(row), name)
    origins = tuple(
        Origin.OWN if w >= 0.5 else Origin.PRIOR if known else Origin.POOLED
        for w, known in zip(weight, target.known, strict=True)
    )
    return SlabImportance(values, origins, _note(origins, own.counts, kappa))


def _undivided(sums: Sums, m: int, n: int) -> tuple[F64, _Mask]:
    """Means f64[m, n] of a row that holds m matrices' columns, and which of them saw a token."""
    mean = sums.mean().reshape(m, n)
    # A .dat file has ones for an expert without tokens.
    return mean, _nonzero(mean) & (mean != 1.0).any(axis=1)


def _nonzero(rows: F64) -> _Mask:
    mask: _Mask = rows.max(axis=1) > 0
    return mask


@dataclass(frozen=True, slots=True)
class _Target:
    """What rows are drawn towards: their own prior where `known` bool[m], else `pooled` f64[n]."""

    pooled: F64
    prior: F64 | None
    known: _Mask

    @classmethod
    def of(cls, mean: F64, tokens: F64, prior: Sums | None) -> _Target:
        """`tokens` f64[m] weighs the rows of `mean` f64[m, n]."""
        pooled = tokens @ mean / max(tokens.sum(), 1.0)
        if prior is None:
            return cls(pooled, None, np.zeros(len(mean), np.bool_))
        prior_mean = prior.mean().reshape(mean.shape)
        known = _nonzero(prior_mean)
        if not pooled.any():
            pooled = prior_mean.sum(axis=0) / max(known.sum(), 1)
        return cls(pooled, prior_mean, known)

    def of_row(self, row: int) -> F64:
        """f64[n]."""
        return self.prior[row] if self.prior is not None and self.known[row] else self.pooled


def _floored(row: F64, name: str) -> F64:
    values = np.maximum(row, max(FLOOR * row.mean(), _F32.tiny))
    if not values.max() <= _F32.max:
        raise NonFiniteError("an importance beyond f32", where=f"tensor {shown(name)}")
    return values


def _note(origins: tuple[Origin, ...], counts: F64, kappa: float) -> str:
    borrowed = Counter(origin for origin in origins if origin is not Origin.OWN)
    if not borrowed:
        return ""
    unseen = f"{int((counts == 0).sum())} of them none, " if len(counts) == len(origins) else ""
    return (
        f"{borrowed.total()} of {len(origins)} matrices saw fewer than {kappa:g} tokens or only"
        f" zeros, {unseen}importance mostly from "
        + ", ".join(f"{origin} ({n})" for origin, n in sorted(borrowed.items()))
    )


@dataclass(frozen=True, slots=True)
class LayerCoverage:
    """Tokens routed to each expert of a layer, and where each tensor's importance comes from."""

    layer: int
    counts: tuple[int, ...]
    origins: dict[str, Counter[str]]

    def n_below(self, n_tokens: int) -> int:
        """Experts that saw fewer tokens."""
        return sum(count < n_tokens for count in self.counts)


@dataclass(frozen=True, slots=True)
class Coverage:
    """How well a text reaches the experts of a model.

    `undivided` are expert tensors whose statistics do not tell one expert's tokens from another's
    (made by a .dat file); `empty` are weights that no token reached.
    """

    kappa: float
    layers: tuple[LayerCoverage, ...]
    undivided: tuple[str, ...]
    empty: tuple[str, ...]

    @property
    def n_experts(self) -> int:
        """Experts of all layers."""
        return sum(len(layer.counts) for layer in self.layers)

    def share_below(self, n_tokens: int) -> float:
        """Share of all experts that saw fewer tokens, 0 to 1."""
        return sum(layer.n_below(n_tokens) for layer in self.layers) / max(1, self.n_experts)

    def as_json(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "kappa": self.kappa,
            "n_experts": self.n_experts,
            "share_unseen": self.share_below(1),
            **{f"share_below_{t}": self.share_below(t) for t in THRESHOLDS},
            "layers": [
                {
                    "layer": layer.layer,
                    "counts": list(layer.counts),
                    "n_unseen": layer.n_below(1),
                    **{f"n_below_{t}": layer.n_below(t) for t in THRESHOLDS},
                    "importance_from": {n: dict(c) for n, c in layer.origins.items()},
                }
                for layer in self.layers
            ],
            "undivided": list(self.undivided),
            "empty": list(self.empty),
        }

    def rows(self) -> list[tuple[str, ...]]:
        """A table: a row of headings, then one for each layer."""
        head = ("layer", "experts", "least", "median", "most", "unseen")
        rows = [(*head, *(f"< {t}" for t in THRESHOLDS), "importance mostly from")]
        for layer in self.layers:
            counts = np.array(layer.counts)
            figures = (len(counts), counts.min(), int(np.median(counts)), counts.max())
            below = (layer.n_below(t) for t in (1, *THRESHOLDS))
            made = "; ".join(
                f"{shown(name)}: " + ", ".join(f"{n} {o}" for o, n in sorted(kinds.items()))
                for name, kinds in layer.origins.items()
                if set(kinds) != {Origin.OWN}
            )
            cells = (layer.layer, *figures, *below)
            rows.append((*map(str, cells), made or Origin.OWN.value))
        return rows


def coverage(statistics: Statistics, *, kappa: float = KAPPA) -> Coverage:
    """Tokens per expert and layer, and what `importance` makes of the experts seen too seldom.

    The counts of a layer are those of its tensor that saw least; all are alike unless parts of
    different runs were merged.
    """
    counts: dict[int, F64] = {}
    origins: dict[int, dict[str, Counter[str]]] = {}
    empty = []
    for name, (m, n) in sorted(shapes_of(statistics.sums).items()):
        sums = statistics.sums[name]
        if sums.n_tokens == 0:
            empty.append(name)
        layer = _LAYER.match(name)
        if m == 1 or layer is None:
            continue
        at = int(layer[1])
        least = counts.get(at, sums.counts)
        counts[at] = np.minimum(least, sums.counts) if len(least) == m else least
        used = 0.0 if FILLED in statistics.kvs else kappa
        found = _importance(name, sums, statistics.priors.get(name), m, n, used).origins
        origins.setdefault(at, {})[name.removeprefix(layer[0])] = Counter(found)
    layers = (
        LayerCoverage(at, tuple(int(c) for c in counts[at]), origins[at]) for at in sorted(counts)
    )
    return Coverage(kappa, tuple(layers), undivided(statistics), tuple(empty))


def undivided(statistics: Statistics) -> tuple[str, ...]:
    """Expert tensors whose statistics do not tell one expert's tokens from another's."""
    shapes = shapes_of(statistics.sums)
    return tuple(sorted(name for name, (m, _) in shapes.items() if "_exps." in name and m == 1))


def filled(statistics: Statistics, *, kappa: float = KAPPA) -> tuple[Statistics, tuple[str, ...]]:
    """Statistics whose means are what `importance` says, for a quantiser that does not blend.

    Every row counts one token at least, so llama-quantize, which takes ones for a row without
    tokens, sees none. Weights about which nothing is known are left out; their names come second.
    Sums are made when they are asked for.
    """
    shapes = {**shapes_of(statistics.priors), **shapes_of(statistics.sums)}

    def values(name: str) -> npt.NDArray[np.float32] | None:
        m, n = shapes[name]
        return importance(statistics, name, (m, 1, n), kappa=kappa).values

    def make(name: str) -> Sums:
        found = values(name)
        if found is None:
            raise KeyError(name)
        own = statistics.sums.get(name)
        counts = np.maximum(1.0 if own is None else own.counts, np.ones(len(found)))
        sum2 = found.astype(np.float64)
        sum2 *= counts[:, np.newaxis]
        return Sums(sum2, counts)

    missing = {name for name in sorted(shapes) if values(name) is None}
    made = Statistics(
        statistics.chunk_size,
        statistics.n_tokens,
        statistics.datasets,
        LazySums({name: shapes[name] for name in shapes if name not in missing}, make),
        kvs={**statistics.kvs, FILLED: boolean(True)},
    )
    return made, tuple(sorted(missing))
