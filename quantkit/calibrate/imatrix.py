"""Importance statistics on disk, as llama-imatrix writes them; `dat` has the legacy form.

Metadata `general.type` = imatrix, `imatrix.datasets`, `imatrix.chunk_count` and
`imatrix.chunk_size`; for every weight W the F32 tensors `W.in_sum2` [m, n] and `W.counts` [m, 1],
sums and counts as in `Sums`. Sums over all tokens of a subsample (`Statistics.priors`) are one
more pair under the name `W@all`: llama.cpp loads it and finds no weight of that name to use it for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from quantkit.calibrate.dat import read_dat
from quantkit.calibrate.statistics import (
    N_CTX,
    LazySums,
    Shape,
    Statistics,
    Sums,
    shapes_of,
)
from quantkit.calibrate.storage import MAX_VALUES, OpenFile, as_f32, check_sums, new_file
from quantkit.container.kv import string, strings, u32
from quantkit.container.layout import MAGIC, TensorEntry, lay_out
from quantkit.container.names import (
    ALIGNMENT,
    SPLIT_KEYS,
    escaped,
    shown,
)
from quantkit.container.reader import GgufFile, TensorInfo, read_gguf
from quantkit.errors import GgufError, UsageError
from quantkit.types import GgmlType, Kv, Kvs, KvType

TYPE = "general.type"
DATASETS = "imatrix.datasets"
CHUNK_COUNT = "imatrix.chunk_count"
CHUNK_SIZE = "imatrix.chunk_size"

# Metadata of ours; llama.cpp passes over them.
VERSION = "quantkit.version"
N_TOKENS = "quantkit.imatrix.n_tokens"  # u64, where it is no whole number of chunks

_OWN_KEYS = {TYPE, DATASETS, CHUNK_COUNT, CHUNK_SIZE, N_TOKENS, ALIGNMENT, *SPLIT_KEYS}
_MAX_ROWS = 1 << 14
_PRIOR = "@all"
_SUM2, _COUNTS = ".in_sum2", ".counts"
_UNUSED = ".in_sum"  # plain sums, which some builds of llama-imatrix add


def read_imatrix(path: str | Path, *, dat_chunk_size: int = N_CTX) -> Statistics:
    """Open a GGUF imatrix or, where the file does not begin as one, a legacy `.dat`.

    Names and sizes are checked at once. Values stay in the file, which is kept open, and are read
    and checked whenever a weight is asked for; any thread may. `Statistics.check` reads them all.
    `dat_chunk_size` is the tokens per chunk of a `.dat`, which does not say. Raises, now or then,
    `GgufError` for anything damaged, inconsistent, negative or not an imatrix, and
    `NonFiniteError` for NaN and infinity, both with file and tensor.
    """
    path = Path(path)
    file = OpenFile(path)
    if file.bytes(0, min(len(MAGIC), file.n_bytes), file.where) == MAGIC:
        return _read_gguf(read_gguf(path), file)
    return read_dat(file, dat_chunk_size)


def write_imatrix(path: str | Path, statistics: Statistics, kvs: Kvs | None = None) -> None:
    """Write the GGUF form, whole or not at all; `kvs` are added to the statistics' own metadata.

    Weights are sorted by name, as llama-imatrix does, and taken one by one. Sums are rounded to
    f32, and so are counts above 2^24. Raises `UsageError` where there is nothing to write,
    `GgufError` for names or metadata that GGUF cannot hold, `NonFiniteError` for sums that f32
    cannot.
    """
    path = Path(path)
    pairs = _pairs(statistics)
    if not pairs:
        raise UsageError("there are no statistics to write", where=escaped(str(path)))
    entries = [
        TensorEntry(pair.base + suffix, shape, GgmlType.F32)
        for pair in pairs
        for suffix, shape in zip((_SUM2, _COUNTS), _stored(pair.shape), strict=True)
    ]
    (layout,) = lay_out("imatrix", _kvs(statistics, kvs or {}), entries, max_shard_bytes=None)
    places = iter(layout.tensors)
    with new_file(path, layout.n_bytes) as write:
        write(layout.header, 0)
        for pair in pairs:
            sums = pair.table[pair.name]
            for values in (sums.sum2, sums.counts):
                place = next(places)
                data = as_f32(values, where=f"tensor {shown(place.name)}")
                write(data.data.cast("B"), place.begin)


@dataclass(frozen=True, slots=True)
class _Pair:
    """Two tensors to write: those of weight `name` of a table, called `base` in the file."""

    base: str
    name: str
    table: Mapping[str, Sums]
    shape: Shape


def _pairs(statistics: Statistics) -> list[_Pair]:
    for name in statistics.sums:
        if not name or name.endswith(_PRIOR):
            raise GgufError(f"no weight may be called {shown(name)!r}")
    pairs = [
        _Pair(name + suffix, name, table, shape)
        for table, suffix in ((statistics.sums, ""), (statistics.priors, _PRIOR))
        for name, shape in shapes_of(table).items()
    ]
    return sorted(pairs, key=lambda pair: pair.base)


def _stored(shape: Shape) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of the two tensors of a weight; ggml does not store trailing axes of 1."""
    m, n = shape
    return ((n,), (1,)) if m == 1 else ((m, n), (m, 1))


def _kvs(statistics: Statistics, kvs: Kvs) -> dict[str, Kv]:
    own = {
        TYPE: string("imatrix"),
        DATASETS: strings(statistics.datasets),
        CHUNK_COUNT: u32(statistics.n_chunks),
        CHUNK_SIZE: u32(statistics.chunk_size),
    }
    if statistics.n_tokens % statistics.chunk_size:
        own[N_TOKENS] = Kv(KvType.U64, statistics.n_tokens)
    return {**own, **{k: v for k, v in {**statistics.kvs, **kvs}.items() if k not in _OWN_KEYS}}


_Halves = tuple[TensorInfo, TensorInfo]  # sums, counts


def _read_gguf(gguf: GgufFile, file: OpenFile) -> Statistics:
    where = file.where
    statistics = _from_kvs(gguf.kvs, where)
    tensors = {tensor.name: tensor for tensor in gguf.tensors}
    if not tensors:
        raise GgufError("holds no statistics", where=where)
    halves: dict[str, _Halves] = {}
    shapes: dict[str, Shape] = {}
    for base in sorted({_base(name, where) for name in tensors}):
        halves[base], shapes[base] = _check_halves(tensors, base, f"{where}, tensor {shown(base)}")
    table, priors = (
        {base.removesuffix(_PRIOR): s for base, s in shapes.items() if base.endswith(_PRIOR) is p}
        for p in (False, True)
    )
    for name in priors.keys() & table.keys():
        if priors[name] != table[name]:
            raise GgufError(
                f"{name}{_PRIOR} has another shape than {name}", where=f"{where}, {shown(name)}"
            )
    statistics.sums = LazySums(table, partial(_read_pair, file, halves, shapes, ""))
    statistics.priors = LazySums(priors, partial(_read_pair, file, halves, shapes, _PRIOR))
    return statistics


def _check_halves(tensors: Mapping[str, TensorInfo], base: str, at: str) -> tuple[_Halves, Shape]:
    """The two tensors of a weight, and its shape; nothing is read."""
    sum2, counts = tensors.get(base + _SUM2), tensors.get(base + _COUNTS)
    if sum2 is None or counts is None:
        raise GgufError(f"{_SUM2} without {_COUNTS}, or the reverse", where=at)
    for tensor in (sum2, counts):
        if tensor.type is not GgmlType.F32:
            raise GgufError(f"expected F32, got {tensor.type.name}", where=at)
    unused = tensors.get(base + _UNUSED)
    if unused and (unused.type is not GgmlType.F32 or unused.n_weights != sum2.n_weights):
        raise GgufError(f"{_UNUSED} does not go with {_SUM2}", where=at)
    if sum2.n_weights > MAX_VALUES:
        raise GgufError(f"{sum2.n_weights} values are too many for a weight", where=at)
    m = counts.n_weights
    n, rest = divmod(sum2.n_weights, m)
    if rest or not n:
        raise GgufError(f"{sum2.n_weights} sums do not divide into {m} rows", where=at)
    if m > _MAX_ROWS:
        raise GgufError(f"{m} rows are more experts than any model has", where=at)
    return (sum2, counts), (m, n)


def _read_pair(
    file: OpenFile,
    halves: Mapping[str, _Halves],
    shapes: Mapping[str, Shape],
    suffix: str,
    name: str,
) -> Sums:
    base = name + suffix
    at = f"{file.where}, tensor {shown(base)}"
    sum2, counts = (file.f32s(half.begin, half.n_weights, at) for half in halves[base])
    sums = Sums(sum2.reshape(shapes[base]), counts)
    check_sums(sums, at)
    return sums


def _base(name: str, where: str) -> str:
    for suffix in (_SUM2, _COUNTS, _UNUSED):
        base = name.removesuffix(suffix)
        if base not in (name, "", _PRIOR):
            return base
    raise GgufError(
        f"a tensor called {shown(name)!r} is no part of an imatrix",
        where=where,
        hint=f"names end in {_SUM2} or {_COUNTS}",
    )


def _from_kvs(kvs: Kvs, where: str) -> Statistics:
    if _value(kvs, TYPE, KvType.STRING, where) != "imatrix":
        raise GgufError(
            f"{TYPE} is {shown(kvs[TYPE].value)!r}, not 'imatrix'",
            where=where,
            hint="this GGUF file is a model or an adapter; give the one that llama-imatrix wrote",
        )
    if any(key in kvs for key in SPLIT_KEYS):
        raise GgufError("one shard of several; an imatrix is a single file", where=where)
    datasets = _value(kvs, DATASETS, KvType.ARRAY, where)
    if kvs[DATASETS].item is not KvType.STRING:
        raise GgufError("expected an array of texts", where=f"{where}, KV {DATASETS}")
    chunk_count = _value(kvs, CHUNK_COUNT, KvType.U32, where)
    chunk_size = _value(kvs, CHUNK_SIZE, KvType.U32, where)
    if not chunk_size:
        raise GgufError("chunks of 0 tokens", where=f"{where}, KV {CHUNK_SIZE}")
    n_tokens = chunk_count * chunk_size
    if N_TOKENS in kvs:
        n_tokens = _value(kvs, N_TOKENS, KvType.U64, where)
        if n_tokens // chunk_size != chunk_count:
            raise GgufError(
                f"{n_tokens} tokens are not {chunk_count} chunks of {chunk_size}",
                where=f"{where}, KV {N_TOKENS}",
            )
    others = {key: kv for key, kv in kvs.items() if key not in _OWN_KEYS}
    return Statistics(chunk_size, n_tokens, tuple(datasets), kvs=others)


def _value(kvs: Kvs, key: str, type_: KvType, where: str) -> Any:
    kv = kvs.get(key)
    if kv is None or kv.type is not type_:
        got = "is missing" if kv is None else f"is {kv.type.name}"
        raise GgufError(f"{key} {got}, expected {type_.name}", where=where)
    return kv.value
