"""What an evaluation found, as one JSON document: the form that is stored, published and drawn.

Sizes are in bytes, KL divergences in nats, `bpw` counts the tensor data only. A figure that is
not finite is stored as null.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from math import isfinite
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import numpy as np
import numpy.typing as npt
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictFloat,
    StrictInt,
    ValidationError,
    model_validator,
)

import quantkit
from quantkit.container.names import escaped, shown
from quantkit.container.reader import RangeFile
from quantkit.container.shardset import ShardSet, open_shards
from quantkit.errors import NonFiniteError, UsageError
from quantkit.run.json_size import parsed_bytes

# Tenths of a decade: below the first edge nothing is left but rounding, 100 nats no model reaches.
LOG10_EDGES = tuple(round(0.1 * k, 1) for k in range(-80, 21))

_LAYER = re.compile(r"^blk\.\d+\.")
_VISION_LAYER = re.compile(r"^v\.(blk\.\d+\.)?")
_NORM = re.compile(r"(_norm|^ln\d|^(pre|post)_ln)$")
_ATTENTION = {
    f"attn_{part}": f"attention.{part}"
    for part in ("q", "k", "v", "qkv", "output", "q_a", "q_b", "kv_b", "k_b", "v_b")
} | {"attn_kv_a_mqa": "attention.kv_a"}
_VISION = {"patch_embd", "position_embd", "attn_qkv", "attn_out", "ffn_up", "ffn_down"}
_FFN = re.compile(r"ffn_(?P<part>gate|up|down|gate_up)(?P<kind>_exps|_shexp)?")
_FFN_ROLES = {None: "dense_ffn", "_exps": "routed_expert", "_shexp": "shared_expert"}
_ROLES = _ATTENTION | {
    "token_embd": "token_embd",
    "output": "output",
    "rope_freqs": "rope_freqs",
    "ffn_gate_inp": "router",
    "exp_probs_b": "router_bias",
}


def _plain(value: Any) -> Any:
    """Python numbers for numpy's, None for NaN and infinity."""
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not isfinite(value) else value


def _printable(value: Any) -> Any:
    """Names of files may hold anything; what is stored is harmless on a terminal too."""
    return escaped(value) if isinstance(value, str) else value


_Text = Annotated[str, BeforeValidator(_printable)]
_Int64 = Annotated[StrictInt, Field(ge=-(1 << 63), lt=1 << 63)]
_Number = Annotated[_Int64 | StrictFloat | None, BeforeValidator(_plain)]
_Numbers = Annotated[_Int64 | StrictFloat | tuple[_Number, ...] | None, BeforeValidator(_plain)]
_Count = Annotated[int, Field(ge=0, lt=1 << 63), BeforeValidator(_plain)]


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Text(_Record):
    """What was read: `n_chunks` windows of `n_ctx` tokens of a corpus."""

    corpus: _Text
    n_tokens: _Count
    n_chunks: _Count
    n_ctx: _Count
    digest: _Text


class Base(_Record):
    """The model that the others are measured against."""

    ppl: _Number
    ppl_error: _Number = None
    path: _Text | None = None


class Histogram(_Record):
    """Tokens by KLD: `counts[i]` of them lie between 10^`log10_edges[i]` and the next edge.

    The first and last count also hold what lies below and above all edges.
    """

    log10_edges: tuple[Annotated[float, Field(ge=-300, le=300)], ...]
    counts: tuple[_Count, ...]

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if len(self.log10_edges) != len(self.counts) + 1 or not self.counts:
            raise ValueError("one edge more than counts is needed")
        if any(b <= a for a, b in zip(self.log10_edges, self.log10_edges[1:], strict=False)):
            raise ValueError("edges do not ascend")
        return self


class Layer(_Record):
    """How far a layer's output has moved.

    `hidden_error` is ||h' - h|| / ||h|| of the hidden state after the layer,
    `router_disagreement` the share of (token, slot) choices of experts that differ.
    """

    layer: _Count
    hidden_error: _Number
    router_disagreement: _Number = None


class TypeLine(_Record):
    """The tensors of one role and one type."""

    role: _Text
    type: _Text
    n_tensors: _Count
    weights: _Count
    bytes: _Count


class Grade(_Record):
    """Answers to `n` questions of base (`_reference`) and quant; see `choice.Grade`."""

    n: _Count
    accuracy_reference: _Number
    accuracy_reference_error: _Number
    accuracy: _Number
    accuracy_error: _Number
    difference: _Number
    difference_error: _Number
    correct_to_wrong: _Count
    wrong_to_correct: _Count
    wrong_to_other_wrong: _Count


class TaskResult(Grade):
    """The grade of a task over all its questions, and by subject.

    `shots` solved examples stood before each question; `digest` names the tokens that were read.
    """

    task: _Text
    shots: _Count
    digest: _Text
    by_subject: dict[_Text, Grade]


class Quant(_Record):
    """One file or shard set and all its figures.

    Every key of a summary (`ppl`, `kld_mean`, `kld_p99`, ...) is a field too; see `figures`.
    """

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, _Numbers] = Field(init=False)

    path: _Text
    bytes: _Count
    bpw: _Number
    kld_histogram: Histogram | None = None
    layers: tuple[Layer, ...] = ()
    types: tuple[TypeLine, ...] = ()
    tasks: tuple[TaskResult, ...] = ()

    @property
    def figures(self) -> Mapping[str, Any]:
        """The summary: numbers, None, or tuples of them, in the summary's order."""
        return self.__pydantic_extra__

    def figure(self, key: str) -> float | None:
        """One number of the summary; None where it is missing, was not finite, or is no number."""
        value = self.figures.get(key)
        return value if isinstance(value, int | float) else None


class Coverage(_Record):
    """Tokens that reached each expert: `counts[i][e]` for layer number `layers[i]`, expert e."""

    layers: tuple[_Count, ...]
    counts: Annotated[tuple[tuple[_Count, ...], ...], BeforeValidator(_plain)]
    n_tokens: _Count

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if len(self.layers) != len(self.counts) or len({len(row) for row in self.counts}) > 1:
            raise ValueError("one row of counts per layer is needed, all equally long")
        return self


class Report(_Record):
    """The whole document. `text` is None where only questions were asked."""

    version: Literal[1] = 1
    quantkit: _Text
    model: _Text
    text: Text | None
    engine: _Text
    constants: dict[_Text, _Text | bool | _Number]
    base: Base
    quants: Annotated[tuple[Quant, ...], Field(min_length=1)]
    coverage: Coverage | None = None

    @model_validator(mode="after")
    def _measures(self) -> Self:
        if self.text is None and not all(quant.tasks for quant in self.quants):
            raise ValueError("neither a text nor a task")
        return self

    @model_validator(mode="after")
    def _histograms_compare(self) -> Self:
        edges = {q.kld_histogram.log10_edges for q in self.quants if q.kld_histogram}
        if len(edges) > 1:
            raise ValueError("histograms of different edges")
        return self


def report_json(
    *,
    model: str,
    text: Text | None,
    engine: str,
    base: Base,
    quants: Sequence[Quant],
    constants: Mapping[str, str | bool | float | None] | None = None,
    coverage: Coverage | None = None,
) -> dict[str, Any]:
    """The report as plain data that `json.dumps(..., allow_nan=False)` takes.

    `engine` says what ran the models, `constants` with which settings.
    """
    report = Report(
        quantkit=quantkit.__version__,
        model=model,
        text=text,
        engine=engine,
        constants=dict(constants or {}),
        base=base,
        quants=tuple(quants),
        coverage=coverage,
    )
    return report.model_dump(mode="json")


_MAX_PARSED_BYTES = 40 << 20


def load_report(raw: bytes, *, where: str) -> Report:
    """A report from a file's bytes; ValueError or `UsageError` for what is none."""
    if parsed_bytes(raw) > _MAX_PARSED_BYTES:
        raise UsageError("takes too much memory, unlike any report", where=where)
    return parse_report(json.loads(raw), where=where)


def parse_report(raw: object, *, where: str = "report") -> Report:
    """Check plain data; `UsageError` names the first field that is not what `report_json` makes."""
    try:
        return Report.model_validate(raw)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        raise UsageError(
            f"not a report of version 1: {shown(place or 'document')}: {shown(first['msg'])}",
            where=where,
        ) from error


def describe(
    path: str | Path | RangeFile,
    summary: Mapping[str, Any],
    *,
    kld: npt.NDArray[np.floating[Any]] | None = None,
    layers: Sequence[Layer] = (),
    tasks: Sequence[TaskResult] = (),
) -> Quant:
    """The entry of the file, or of the shard set, at `path`; only headers are read.

    `kld` holds one divergence per scored token. Without a text `summary` is empty.
    """
    shards = open_shards(path)
    return Quant(
        path=str(path),
        bytes=shards.n_bytes,
        bpw=bpw(shards),
        kld_histogram=None if kld is None else kld_histogram(kld),
        layers=tuple(layers),
        types=tuple(types_by_role(shards)),
        tasks=tuple(tasks),
        **summary,
    )


def bpw(shards: ShardSet) -> float | None:
    """Bits per weight over the tensor data; None for a file without tensors."""
    n_weights = sum(tensor.n_weights for _, tensor in shards.tensors())
    n_bytes = sum(tensor.n_bytes for _, tensor in shards.tensors())
    return 8 * n_bytes / n_weights if n_weights else None


def kld_histogram(kld: npt.NDArray[np.floating[Any]]) -> Histogram:
    """Count the tokens f32/f64[n] by order of magnitude, over `LOG10_EDGES`.

    Divergences at or below zero, where rounding is all there is, count as the smallest.
    """
    if n_bad := int(np.count_nonzero(~np.isfinite(kld))):
        raise NonFiniteError(f"the KL divergence of {n_bad} of {kld.size} tokens is not finite")
    low, high = LOG10_EDGES[0], LOG10_EDGES[-1]
    log10 = np.log10(np.maximum(kld.astype(np.float64), 10.0**low))
    counts, _ = np.histogram(np.clip(log10, low, high), bins=np.array(LOG10_EDGES))
    return Histogram(log10_edges=LOG10_EDGES, counts=tuple(counts.tolist()))


def types_by_role(shards: ShardSet) -> list[TypeLine]:
    """Tensors, weights and bytes by role and type: largest role first, then largest type."""
    sums: dict[str, dict[str, list[int]]] = {}
    for _, tensor in shards.tensors():
        line = sums.setdefault(role_of(tensor.name), {}).setdefault(tensor.type.name, [0, 0, 0])
        for k, amount in enumerate((1, tensor.n_weights, tensor.n_bytes)):
            line[k] += amount
    role_bytes = {role: sum(line[2] for line in types.values()) for role, types in sums.items()}
    return [
        TypeLine(role=role, type=type_, n_tensors=line[0], weights=line[1], bytes=line[2])
        for role in sorted(sums, key=lambda role: (-role_bytes[role], role))
        for type_, line in sorted(sums[role].items(), key=lambda item: (-item[1][2], item[0]))
    ]


def role_of(name: str) -> str:
    """The role of a tensor by its GGUF name; `other` for one that quantkit does not write."""
    stem = name.removesuffix(".weight").removesuffix(".bias")
    is_vision, is_projector = stem.startswith("v."), stem.startswith("mm.")
    stem = (_VISION_LAYER if is_vision else _LAYER).sub("", stem)
    if _NORM.search(stem):
        return "norm"
    if is_projector:
        return "projector"
    if is_vision:
        return f"vision.{stem}" if stem in _VISION else "other"
    if ffn := _FFN.fullmatch(stem):
        return f"{_FFN_ROLES[ffn['kind']]}.{ffn['part']}"
    return _ROLES.get(stem, "other")
