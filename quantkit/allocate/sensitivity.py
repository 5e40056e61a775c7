"""Measure a model: errors of its tensors in all types, and what such errors do to its output."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from quantkit.allocate.copies import Cache, Copies, Copy, Disturbed, MakeScorer, first_layer
from quantkit.allocate.errors import Rounder, Watch, error_row, relative_error, sample_rows
from quantkit.allocate.measured import MeasuredGroup, Sensitivity
from quantkit.forward.hyper import Hyper
from quantkit.forward.matrices import Compute, Matrices, output_name
from quantkit.forward.stream import Sequences, Stream
from quantkit.forward.sweep import Settings
from quantkit.forward.weights import Weights
from quantkit.types import GgmlType, TensorSpec

Progress = Callable[[float], None]

# What weights are rounded to: alone and together to the last, together to the first as well.
_STRENGTHS = (GgmlType.Q3_K, GgmlType.IQ2_XXS)
_ROWS_OF_32 = (GgmlType.Q5_0, GgmlType.Q4_0)  # for rows that hold no super-block
_MILD, _STRONG = 0, 1
_MAX_GROUPS = 96
_REFERENCE = 0.3  # of a layer's time, for progress: the reference and the errors


@dataclass(frozen=True)
class Text:
    """Token ids i32[n_seq, n_ctx]; the first `n_copied` sequences are what copies run on.

    `scored` are places among their tokens whose logits are compared, i64[n].
    """

    chunks: npt.NDArray[np.integer]
    n_copied: int
    scored: npt.NDArray[np.int64]


@dataclass(frozen=True)
class Subject:
    """A model: its tensors as they will be written, weights, numbers.

    `types` gives those that a tensor may get; `exact(spec, type)` tells where nothing is lost.
    """

    specs: Sequence[TensorSpec]
    weights: Weights
    hyper: Hyper
    types: Callable[[TensorSpec], Sequence[GgmlType]]
    exact: Callable[[TensorSpec, GgmlType], bool]


@dataclass
class _Learnt:
    """t^2 by tensor and type, t^2 by tensor and strength, and importances of columns."""

    errors: dict[str, dict[str, float]] = field(default_factory=dict)
    nearest: dict[str, tuple[float, ...]] = field(default_factory=dict)
    importances: dict[str, npt.NDArray[np.float32]] = field(default_factory=dict)


def measure(
    subject: Subject,
    text: Text,
    rounder: Rounder,
    settings: Settings,
    scorer: MakeScorer,
    said: tuple[str, str],
    progress: Progress,
) -> Sensitivity:
    """One sweep over all layers. `progress` is told parts of the whole.

    Inputs are not rounded in it. `scorer(n_places, n_copies)` makes what compares logits; `said` is
    the result's digest, and words about its text.
    """
    with torch.inference_mode():
        return _Sweep(subject, text, rounder, settings, scorer).run(said, progress)


class _Sweep:
    def __init__(
        self,
        subject: Subject,
        text: Text,
        rounder: Rounder,
        settings: Settings,
        scorer: MakeScorer,
    ) -> None:
        self._subject, self._text, self._rounder = subject, text, rounder
        self._scorer, self._learnt = scorer, _Learnt()
        compute = Compute(settings.compute.device, settings.compute.dtype, "exact")
        hyper, n_layers = subject.hyper, subject.hyper.n_layers
        self._head = output_name(subject.weights)
        cache = Cache(settings.n_bytes // 2)
        self._cached = Disturbed(subject.weights, cache, {}, rounder, {})
        self._watch = Watch(subject.weights)
        all_tokens = Sequences.of(text.chunks)
        self._groups = _groups(subject.specs)
        copies = list(_copies(self._groups, subject))
        few = Sequences.of(text.chunks[: text.n_copied])
        make = settings.rows_for(hyper, len(few), 2 * len(copies))
        self._reference = Stream(
            Matrices(self._cached, compute, self._watch), hyper, all_tokens,
            settings.rows_for(hyper, len(all_tokens), 1),
        )  # fmt: skip
        self._copies = Copies(
            self._reference, copies, few, hyper, compute,
            lambda types: Disturbed(
                subject.weights, cache, types, rounder, self._learnt.importances
            ),
            make, [first_layer(copy, n_layers, self._head) for copy in copies],
        )  # fmt: skip

    def run(self, said: tuple[str, str], progress: Progress) -> Sensitivity:
        n_layers, reference = self._subject.hyper.n_layers, self._reference
        part = 1 / (n_layers + 1)
        self._outside("token_embd.weight")
        reference.embed()
        self._copies.embed()
        for layer in range(n_layers):
            self._copies.branch(layer)
            reference.advance(layer, lambda p: progress(p * part * _REFERENCE / 2))
            specs = [spec for spec in self._subject.specs if spec.layer == layer]
            for spec in specs:
                self._learn(spec)
                progress(part * _REFERENCE / 2 / len(specs))
            self._watch.clear()
            self._copies.advance(layer, lambda p: progress(p * part * (1 - _REFERENCE)))
        reference.observe_output()
        self._outside("output.weight")
        kld = self._copies.kld(self._text.scored, self._scorer)
        progress(part)
        return self._result(kld, said)

    def _outside(self, name: str) -> None:
        for spec in self._subject.specs:
            if spec.name == name:
                self._learn(spec)

    def _learn(self, spec: TensorSpec) -> None:
        """Errors of a tensor whose inputs have been seen."""
        if spec.keep is not None or len(spec.shape) == 1:
            return
        learnt, rounder = self._learnt, self._rounder
        if spec.name == "token_embd.weight":
            rows, inputs = self._embedded(), None
        else:
            rows, inputs = sample_rows(self._cached, spec.name), self._watch.of(spec.name)
        types = self._subject.types(spec)
        errors = error_row(rows, inputs, types, rounder)
        for type_ in types:
            if self._subject.exact(spec, type_):
                errors[type_.name] = 0.0
        learnt.errors[spec.name] = errors
        importance = None if inputs is None else inputs.importance()
        judge = None if inputs is None else inputs.judge()
        if importance is not None:
            learnt.importances[spec.name] = importance
        learnt.nearest[spec.name] = tuple(
            relative_error(rows, rounder.nearest(rows, type_, importance), judge)
            for type_ in _strengths(spec)
        )

    def _embedded(self) -> npt.NDArray[np.float32]:
        """Rows of the embedding, as often as the text has them."""
        ids = self._text.chunks.ravel()
        few = np.sort(ids[:: max(1, len(ids) // 256)]).tolist()
        rows = [self._cached.read("token_embd.weight", i, i + 1) for i in few]
        return np.concatenate(rows)

    def _result(self, kld: Sequence[float], said: tuple[str, str]) -> Sensitivity:
        by_name = {copy.name: value for copy, value in zip(self._copies.copies, kld, strict=True)}
        groups = tuple(
            MeasuredGroup(
                name=name,
                tensors=tuple(spec.name for spec in specs),
                error=self._error(name, _STRONG),
                kld=max(0.0, by_name[name]),
            )
            for name, specs in self._groups.items()
        )
        joint = []
        for title, strengths in _joints(self._groups).items():
            alone = (
                group.kld * self._error(group.name, strengths[group.name]) / max(group.error, 1e-30)
                for group in groups
            )
            joint.append((sum(alone), max(0.0, by_name[title])))
        return Sensitivity(
            digest=said[0],
            text=said[1],
            errors=self._learnt.errors,
            groups=groups,
            joint=tuple(joint),
        )

    def _error(self, group: str, strength: int) -> float:
        nearest = self._learnt.nearest
        return float(np.mean([nearest[spec.name][strength] for spec in self._groups[group]]))


def _groups(specs: Sequence[TensorSpec]) -> dict[str, list[TensorSpec]]:
    """Tensors by role and band of layers; bands as narrow as the number of copies allows."""
    free = [spec for spec in specs if spec.keep is None and len(spec.shape) > 1]
    n_layers = 1 + max((spec.layer or 0 for spec in free), default=0)
    width = 1
    while True:
        groups: dict[str, list[TensorSpec]] = {}
        for spec in free:
            name = spec.role
            if spec.layer is not None:
                first = spec.layer // width * width
                last = min(first + width, n_layers) - 1
                name += f" {first}" if first == last else f" {first}-{last}"
            groups.setdefault(name, []).append(spec)
        if len(groups) <= _MAX_GROUPS or width >= n_layers:
            return groups
        width += 1


def _copies(groups: Mapping[str, list[TensorSpec]], subject: Subject) -> Iterator[Copy]:
    for name, specs in groups.items():
        yield Copy(name, {spec.name: _strengths(spec)[_STRONG] for spec in specs})
    for title, strengths in _joints(groups).items():
        types = {
            spec.name: _strengths(spec)[strengths[name]]
            for name, specs in groups.items()
            for spec in specs
        }
        yield Copy(title, types, frozen=False)


def _joints(groups: Mapping[str, list[TensorSpec]]) -> dict[str, dict[str, int]]:
    """Which strength groups have in copies that have all of them disturbed."""
    bulk = {name: _STRONG if _is_bulk(s[0]) else _MILD for name, s in groups.items()}
    return {
        "all, mild": dict.fromkeys(groups, _MILD),
        "all, bulk strong": bulk,
        "all, strong": dict.fromkeys(groups, _STRONG),
    }


def _is_bulk(spec: TensorSpec) -> bool:
    """Whether it is of the kind that has most of a model's weights."""
    return spec.role.startswith(("routed_expert", "dense_ffn"))


def _strengths(spec: TensorSpec) -> Sequence[GgmlType]:
    fits = all(spec.grid[1] % type_.block_size == 0 for type_ in _STRENGTHS)
    return _STRENGTHS if fits else _ROWS_OF_32
