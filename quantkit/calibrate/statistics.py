"""Sums of squared inputs per weight and column, and how many tokens they stand for.

The mean of the squares, sum2 / count, is what the field calls the imatrix: an error in a column of
a weight costs in proportion to it. Sums and counts are kept rather than means, so that parts made
on different texts or machines add up to exactly what one run would have given.

Weights go by their full GGUF name. Richer statistics, such as Gram matrices, belong beside these
under the same names.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from quantkit.container.names import shown
from quantkit.errors import GgufError, NonFiniteError, QuantkitError
from quantkit.types import Kv

F64 = npt.NDArray[np.float64]

_LAYER = re.compile(r"blk\.(\d{1,6})\.")

N_CTX = 512  # tokens per chunk where nobody says otherwise, llama-imatrix's default


@dataclass(frozen=True, slots=True)
class Sums:
    """`sum2` f64[m, n]: squared inputs of column n, summed over `counts` f64[m] tokens.

    m is the number of experts of a routed expert tensor, whose counts are the tokens routed to
    each, and 1 for every other weight. A weight with a matrix per attention head has m = 1 and
    n = heads x columns, because all heads see all tokens.
    """

    sum2: F64
    counts: F64

    def mean(self) -> F64:
        """f64[m, n]; rows that saw no token are 0."""
        return self.sum2 / np.maximum(self.counts, 1.0)[:, np.newaxis]

    @property
    def n_tokens(self) -> float:
        """Tokens of all rows together."""
        return float(self.counts.sum())


Shape = tuple[int, int]


class LazySums(Mapping[str, Sums]):
    """Sums made by `make` whenever they are asked for, and not kept; `shapes` [m, n] are known.

    The statistics of a large model are gigabytes. Whatever goes through them takes one weight after
    the other.
    """

    def __init__(self, shapes: Mapping[str, Shape], make: Callable[[str], Sums]) -> None:
        self.shapes = dict(shapes)
        self._make = make

    def __getitem__(self, name: str) -> Sums:
        if name not in self.shapes:
            raise KeyError(name)
        return self._make(name)

    def __contains__(self, name: object) -> bool:
        return name in self.shapes

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


def shape_of(table: Mapping[str, Sums], name: str) -> Shape | None:
    """[m, n] of a weight, None where the table has none of that name; no value is read."""
    if isinstance(table, LazySums):
        return table.shapes.get(name)
    sums = table.get(name)
    return None if sums is None else (len(sums.counts), sums.sum2.shape[1])


def shapes_of(table: Mapping[str, Sums]) -> dict[str, Shape]:
    """[m, n] of every weight; no value is read for it."""
    if isinstance(table, LazySums):
        return dict(table.shapes)
    return {name: (len(sums.counts), sums.sum2.shape[1]) for name, sums in table.items()}


@dataclass(slots=True)
class Statistics:
    """The statistics of a model: `sums` by weight name, and what they were collected on.

    `priors` holds, for experts that routing may starve, sums over all tokens of a subsample, put
    through every expert whether routed to it or not. `kvs` are metadata that travel with the file.
    """

    chunk_size: int = N_CTX
    n_tokens: int = 0
    datasets: tuple[str, ...] = ()
    sums: Mapping[str, Sums] = field(default_factory=dict)
    priors: Mapping[str, Sums] = field(default_factory=dict)
    kvs: dict[str, Kv] = field(default_factory=dict)

    @property
    def n_chunks(self) -> int:
        """Whole chunks that were read."""
        return self.n_tokens // self.chunk_size

    def mean(self, name: str) -> F64:
        """Mean squares f64[m, n] of a weight; rows with a count of 0 are 0."""
        return self.sums[name].mean()

    def check(self) -> None:
        """Read every value once, so that a damaged file is refused before it is relied on."""
        for table in (self.sums, self.priors):
            for name in table:
                _ = table[name]


def add(
    table: dict[str, Sums],
    name: str,
    sum2: npt.ArrayLike,
    count: float,
    *,
    row: int = 0,
    n_rows: int = 1,
) -> None:
    """Add `sum2` [n], the squares of `count` inputs, to row `row` of `n_rows` of a weight.

    Raises `NonFiniteError` naming the column for NaN or infinity.
    """
    where = f"tensor {shown(name)}"
    added = np.asarray(sum2, np.float64)
    check_finite(added[np.newaxis], where=where)
    fits = added.ndim == 1 and added.size and 0 <= row < n_rows and count >= 0
    if not fits or bool((added < 0).any()):
        raise QuantkitError(
            f"row {row} of {n_rows}, {count} tokens and values {added.shape} are no sum of squares",
            where=where,
        )
    if name not in table:
        table[name] = Sums(np.zeros((n_rows, len(added))), np.zeros(n_rows))
    sums = table[name]
    if sums.sum2.shape != (n_rows, len(added)):
        raise _differs(name, sums.sum2.shape, (n_rows, len(added)))
    sums.sum2[row] += added
    sums.counts[row] += count


def merged(parts: Sequence[Statistics]) -> Statistics:
    """The sums and counts of all parts together; neither order nor grouping matters.

    They are added when they are asked for, so parts must stay as they are. The chunk size becomes
    the largest of all, and metadata stay where all agree. Raises `GgufError`, naming the weight,
    where shapes differ.
    """
    first, *others = parts
    return Statistics(
        max(part.chunk_size for part in parts),
        sum(part.n_tokens for part in parts),
        tuple(dict.fromkeys(name for part in parts for name in part.datasets)),
        added([part.sums for part in parts]),
        added([part.priors for part in parts]),
        {
            key: kv
            for key, kv in first.kvs.items()
            if all(other.kvs.get(key) == kv for other in others)
        },
    )


def added(tables: Sequence[Mapping[str, Sums]]) -> LazySums:
    """The sums and counts of tables together; see `merged`."""
    shapes: dict[str, Shape] = {}
    for table in tables:
        for name, shape in shapes_of(table).items():
            if shapes.setdefault(name, shape) != shape:
                raise _differs(name, shapes[name], shape)

    def total(name: str) -> Sums:
        first, *others = (table for table in tables if name in table)
        if not others:
            return first[name]
        mine = first[name]
        sums = Sums(mine.sum2.copy(), mine.counts.copy())
        del mine
        for other in others:
            theirs = other[name]
            sums.sum2[:] += theirs.sum2
            sums.counts[:] += theirs.counts
        return sums

    return LazySums(shapes, total)


def check_finite(values: F64, *, where: str) -> None:
    """Raise `NonFiniteError` with row and column of the first NaN or infinity in [m, n]."""
    bad = ~np.isfinite(values)
    if bad.any():
        row, column = np.argwhere(bad)[0]
        place = f"column {column}" if len(values) == 1 else f"row {row}, column {column}"
        raise NonFiniteError(
            f"{values[row, column]} in {place}",
            where=where,
            hint="the model overflowed on this text, or its weights are damaged",
        )


def _differs(name: str, mine: tuple[int, ...], theirs: tuple[int, ...]) -> GgufError:
    return GgufError(
        f"{theirs[0]} × {theirs[1]} values cannot be added to {mine[0]} × {mine[1]}",
        where=f"tensor {shown(name)}",
        hint="statistics of different models, or of a .dat file that hides its experts",
    )


@dataclass(frozen=True, slots=True)
class Figures:
    """What `llama-imatrix --show-statistics` tells of a weight, by the same formulas.

    They are of v, the means of all columns in all rows that saw a token: sum, extremes, mean,
    standard deviation (of the population), share of v > 1e-5, entropy of v / sum in bits, also
    relative to that of n equal values, and the share of v more than one deviation above the mean.
    `cosine` is the similarity of the raw sums with those of the same weight one layer before, None
    where there is none.
    """

    n_values: int
    total: float
    least: float
    most: float
    mean: float
    deviation: float
    active: float
    entropy: float
    entropy_share: float
    above_one_deviation: float
    cosine: float | None


def figures(statistics: Statistics) -> dict[str, Figures]:
    """Figures of every weight that saw a token, by name."""
    return {
        name: _figures(sums, statistics.sums.get(_one_layer_before(name)))
        for name in sorted(statistics.sums)
        if (sums := statistics.sums[name]).n_tokens > 0
    }


def layer_figures(by_name: Mapping[str, Figures]) -> dict[int, dict[str, float]]:
    """Averages over the weights of each layer, weighted by their number of values.

    `total`, `above_one_deviation` and `cosine`; as llama-imatrix does, a weight without a
    predecessor counts as a cosine of 0.
    """
    layers: dict[int, list[Figures]] = {}
    for name, of in by_name.items():
        if found := _LAYER.match(name):
            layers.setdefault(int(found[1]), []).append(of)
    averages = {}
    for layer, members in sorted(layers.items()):
        n_values = sum(of.n_values for of in members)
        averages[layer] = {
            "total": sum(of.n_values * of.total for of in members) / n_values,
            "above_one_deviation": sum(of.n_values * of.above_one_deviation for of in members)
            / n_values,
            "cosine": sum(of.n_values * (of.cosine or 0.0) for of in members) / n_values,
        }
    return averages


def _figures(sums: Sums, before: Sums | None) -> Figures:
    v = sums.mean()[sums.counts > 0].ravel()
    total, mean, deviation = float(v.sum()), float(v.mean()), float(v.std())
    p = v[v > 0] / total if total > 0 else np.ones(1)
    entropy = float(-(p * np.log2(p)).sum()) + 0.0
    cosine = None
    if before is not None and before.sum2.size == sums.sum2.size:
        a, b = sums.sum2.ravel(), before.sum2.ravel()
        norm = float(np.linalg.norm(a) * np.linalg.norm(b))
        cosine = float(a @ b) / norm if norm > 0 else 0.0
    return Figures(
        n_values=v.size,
        total=total,
        least=float(v.min()),
        most=float(v.max()),
        mean=mean,
        deviation=deviation,
        active=float((v > 1e-5).mean()),
        entropy=entropy,
        entropy_share=entropy / float(np.log2(v.size)) if v.size > 1 else 0.0,
        above_one_deviation=float((v > mean + deviation).mean()) if deviation > 0 else 0.0,
        cosine=cosine,
    )


def _one_layer_before(name: str) -> str:
    found = _LAYER.match(name)
    return f"blk.{int(found[1]) - 1}.{name[found.end() :]}" if found else ""
