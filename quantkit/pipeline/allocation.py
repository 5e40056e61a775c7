"""Allocate: measure a model once, then find the best types for any size."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt

from quantkit.allocate.as_recipe import allocated_yaml
from quantkit.allocate.budget import Files, parse_bpw, parse_fit
from quantkit.allocate.budget import allocate as allocate_within
from quantkit.allocate.choices import CANDIDATES, Floor, Group, Legal, build_groups, usable
from quantkit.allocate.frontier import frontier
from quantkit.allocate.measured import Sensitivity, load_sensitivity
from quantkit.allocate.solve import Allocation
from quantkit.errors import UsageError
from quantkit.guide.memory import cache_bytes, context
from quantkit.guide.model import read_shape
from quantkit.hub.session import Place
from quantkit.pipeline.guide import LADDER, PRESETS
from quantkit.pipeline.planning import Job, Planned, planned
from quantkit.plan.build import MAX_SHARD_BYTES, TypeChooser, can_repack
from quantkit.quantize.codec import How, codec_of, encodable
from quantkit.recipe import Recipe, load_recipe, shipped_names
from quantkit.run import fs
from quantkit.run.events import Reporter, Silent, size
from quantkit.run.sizes import parse_size
from quantkit.types import GgmlType, Plan, TensorSpec

if TYPE_CHECKING:
    from quantkit.allocate.copies import Scorer
    from quantkit.pipeline.opening import Opened, Reading, Running
    from quantkit.text.tokens import TokenSet

Rounding = Literal["nearest", "feedback"]

_RECORDS = 1024  # bytes of keys that a conversion adds, about its text and importance statistics
_COPIED_TOKENS = 2048
_CELLS = 256
_METHOD = 1  # of measuring; another number makes older results unusable


@dataclass(frozen=True)
class Goal:
    """What a recipe has to fit: exactly one of a size, bits per weight, and memories."""

    size: str | None = None
    bpw: str | None = None
    fit: str | None = None
    n_ctx: int | None = None

    def __post_init__(self) -> None:
        if sum(value is not None for value in (self.size, self.bpw, self.fit)) != 1:
            raise UsageError("one of --target-size, --target-bpw and --fit is needed")
        if self.n_ctx is not None and self.fit is None:
            raise UsageError("a context belongs to --fit", where="--ctx")

    def __str__(self) -> str:
        if self.fit is not None:
            return f"{self.fit} with a context of {self.n_ctx:,}" if self.n_ctx else self.fit
        return self.size or f"{self.bpw} bits per weight"

    def n_bytes(self, files: Files, plan: Plan) -> int:
        """What all files may take."""
        if self.size is not None:
            return parse_size(self.size)
        if self.bpw is not None:
            return parse_bpw(self.bpw, files)
        shape = read_shape(plan.kvs, where=plan.stem)
        per_token = cache_bytes(shape, _CELLS) // _CELLS
        n_ctx = context(shape, self.n_ctx)
        return parse_fit(self.fit or "", kv_bytes_per_token=per_token, n_ctx=n_ctx).n_bytes


@dataclass(frozen=True)
class Question:
    """The model, the text and the way to measure it, and what types tensors may get.

    `types` None are all that llama.cpp's main backends run well.
    """

    model: Place
    reading: Reading
    running: Running
    rounding: Rounding = "feedback"
    types: tuple[GgmlType, ...] | None = None
    floors: tuple[Floor, ...] = ()
    n_threads: int = 1

    @property
    def legal(self) -> Legal:
        """What may be chosen."""
        known = encodable()
        if self.types is None:
            return Legal(tuple(t for t in CANDIDATES if t in known), floors=self.floors)
        if unknown := [t.name for t in self.types if t not in known]:
            raise UsageError(f"types that cannot be encoded: {', '.join(unknown)}", where="--types")
        return Legal(self.types, (), self.floors)

    @property
    def measured(self) -> tuple[GgmlType, ...]:
        """Types whose errors are wanted: the same for all choices among the usual ones."""
        known = {t for t in usable(CANDIDATES) if t in encodable()}
        return usable(known | set(self.types or ()), ())


@dataclass(frozen=True)
class Row:
    """What a role got: tensors by type, bytes, and its part of the sum of costs."""

    role: str
    types: dict[str, int]
    n_bytes: int
    share: float


@dataclass(frozen=True)
class Mark:
    """A recipe in the picture of sizes: bytes of its files, and its predicted KL in nats."""

    name: str
    n_bytes: int
    kld: float


@dataclass(frozen=True)
class Answer:
    """A recipe's text and what to expect of it; `n_bytes` of files, with room for records."""

    text: str
    n_bytes: int
    budget: int
    bpw: float
    kld: float
    rows: tuple[Row, ...]
    marks: tuple[Mark, ...] = ()
    front: tuple[tuple[int, float], ...] = field(default=())


def parse_types(text: str) -> tuple[GgmlType, ...]:
    """Types by name, with commas between them."""
    names = [name.strip().upper() for name in text.split(",") if name.strip()]
    if unknown := [name for name in names if name not in GgmlType.__members__]:
        raise UsageError(f"unknown types: {', '.join(unknown)}", where="--types")
    if not names:
        raise UsageError("no type is named", where="--types")
    return tuple(GgmlType[name] for name in names)


def allocate(
    question: Question, goal: Goal, output: Path, reporter: Reporter, *, with_curve: bool = False
) -> Answer:
    """Find the recipe and write it. Measurements are kept beside it and used again."""
    if output.suffix not in {".yaml", ".yml"}:
        raise UsageError("a recipe's name ends in .yaml", where=str(output))
    recipe = _recipe(question, output)
    with planned(Job(question.model, "q8_0", mmproj=None), Silent()) as (_, decided):
        plan = decided.plans[-1]
    specs = tuple(sorted((t.spec for t in plan.tensors), key=lambda spec: spec.name))
    files = Files(specs, plan.kvs, MAX_SHARD_BYTES)
    budget = goal.n_bytes(files, plan)
    _check_target(question, specs, files, budget)
    measured = sensitivities(question, decided, output.parent, reporter)
    costs = measured.costs()
    groups = build_groups(specs, costs, question.legal)
    found = allocate_within(groups, files, budget - _RECORDS)
    types = found.types()
    kld = measured.predicted(found.cost)
    n_bytes = files.n_bytes(types) + _RECORDS
    text = allocated_yaml(
        specs,
        found,
        recipe.name,
        target=str(goal),
        unit="nats of KL, summed over tensors",
        description=f"allocated for {goal}; predicted KL divergence {kld:.4g} nats per token",
        like=recipe.model_copy(update={"predicted_kld": float(f"{kld:.4g}")}),
    )
    fs.make_folder(output.parent)
    fs.write_whole(output, text.encode())
    reporter.stage("allocate", f"{output.name}: {size(n_bytes)}, predicted KLD {kld:.4g}")
    bpw = 8 * sum(_stored(spec, types) for spec in specs) / max(1, sum(s.n_weights for s in specs))
    answer = Answer(text, n_bytes, budget, bpw, kld, _rows(specs, found))
    return _with_curve(answer, measured, specs, files, groups) if with_curve else answer


def sensitivities(
    question: Question, decided: Planned, folder: Path, reporter: Reporter
) -> Sensitivity:
    """What is kept in the folder of this model, text and setting, or measured now."""
    from quantkit.pipeline.opening import opened, read_tokens  # noqa: PLC0415 - brings torch

    budget = question.reading.budget
    with opened(question.model, question.running.constants) as model:
        saved = question.reading.corpus.endswith(".safetensors")  # and so taken whole
        tokens = read_tokens(model, replace(question.reading, budget=None if saved else budget))
        about = f"{tokens.name}, {len(tokens.ids):,} tokens"
        compute = question.running.compute()
        said = (
            f"{_METHOD} {model.identity} {tokens.digest} {question.reading.n_ctx} "
            f"{question.rounding} {[t.name for t in question.measured]} {compute.dtype}"
        )
        digest = hashlib.sha256(said.encode()).hexdigest()
        path = folder / f"{model.name}.{digest[:8]}.sensitivity.json"
        if path.exists():
            found = load_sensitivity(path)
            if found.digest == digest:
                reporter.stage("measure", f"{path.name} is already there, used again")
                return found
        plan = decided.plans[-1]
        found = _measure(question, plan, model, tokens, (digest, about), path, reporter)
    fs.write_whole(path, found.save_as())
    reporter.stage("measure", f"{path.name}: {len(found.groups)} groups of tensors")
    return found


def _measure(
    question: Question,
    plan: Plan,
    model: Opened,
    tokens: TokenSet,
    said: tuple[str, str],
    path: Path,
    reporter: Reporter,
) -> Sensitivity:
    from quantkit.allocate import sensitivity  # noqa: PLC0415 - brings torch
    from quantkit.allocate.errors import Rounder  # noqa: PLC0415
    from quantkit.evaluate.summary import scored_positions, with_bos  # noqa: PLC0415
    from quantkit.pipeline.calibration import progress_of, tell_text  # noqa: PLC0415
    from quantkit.quantize.feedback import Feedback  # noqa: PLC0415
    from quantkit.text.tokens import chunks  # noqa: PLC0415

    n_ctx = question.reading.n_ctx
    cut = chunks(tokens, n_ctx)
    tell_text(tokens, len(cut), n_ctx, reporter)
    n_copied = min(len(cut), max(1, _COPIED_TOKENS // n_ctx))
    places = np.add.outer(np.arange(n_copied) * n_ctx, np.array(scored_positions(n_ctx))).ravel()
    text = sensitivity.Text(_evenly_first(with_bos(cut, model.bos), n_copied), n_copied, places)
    recipe = _recipe(question, path)
    rounder = Rounder(
        How(recipe.effort, recipe.weighting, recipe.gain),
        codec_of,
        Feedback() if question.rounding == "feedback" else None,
        question.n_threads,
    )
    legal = Legal(question.measured, ())
    subject = sensitivity.Subject(
        [tensor.spec for tensor in plan.tensors],
        model.weights,
        model.hyper,
        lambda spec: legal.of([spec]),
        can_repack,
    )
    work = path.with_name(path.name + ".work")
    fs.make_folder(work)
    try:
        with progress_of(cut.size, f"measure {model.name}", reporter) as progress:
            settings = question.running.settings(work)
            return sensitivity.measure(subject, text, rounder, settings, _scorer, said, progress)
    finally:
        fs.remove_folder(work)


class _Kld:
    """A `Scorer` by the evaluation's arithmetic."""

    def __init__(self, n_places: int, n_copies: int) -> None:
        from quantkit.evaluate.scores import TileScorer  # noqa: PLC0415 - brings torch

        self._scorer = TileScorer(np.zeros(n_places, np.int64), n_copies)
        self.add = self._scorer.add

    def kld(self) -> npt.NDArray[np.float64]:
        """See `Scorer`."""
        return np.asarray(self._scorer.finish().kld.sum(1), np.float64)


def _scorer(n_places: int, n_copies: int) -> Scorer:
    return _Kld(n_places, n_copies)


def _evenly_first(chunks: npt.NDArray[np.int32], n: int) -> npt.NDArray[np.int32]:
    """The same chunks with `n` that are spread over all of them in front."""
    chosen = [(2 * k + 1) * len(chunks) // (2 * n) for k in range(n)]
    rest = [k for k in range(len(chunks)) if k not in set(chosen)]
    return chunks[chosen + rest]


def _check_target(
    question: Question, specs: Sequence[TensorSpec], files: Files, budget: int
) -> None:
    """Refuse before hours of measuring what can never fit."""
    free = build_groups(specs, lambda spec, type_: 0.0, question.legal)
    allocate_within(
        [Group(g.name, g.tensors, g.n_weights, g.options[:1]) for g in free],
        files,
        budget - _RECORDS,
    )


def _recipe(question: Question, path: Path) -> Recipe:
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", path.stem).lstrip("._-")[:64] or "allocated"
    return Recipe(name=name, default=GgmlType.Q8_0, rounding=question.rounding)


def _stored(spec: TensorSpec, types: dict[str, GgmlType]) -> int:
    type_ = types[spec.name] if spec.keep is None else spec.keep
    n_rows, n_cols = spec.grid
    return n_rows * n_cols * type_.block_bytes // type_.block_size


def _rows(specs: Sequence[TensorSpec], found: Allocation) -> tuple[Row, ...]:
    by_role: dict[str, list[TensorSpec]] = {}
    for spec in specs:
        if spec.keep is None:
            by_role.setdefault(spec.role, []).append(spec)
    types = found.types()
    cost = {
        name: found.options[g.name].cost / len(g.tensors)
        for g in found.groups
        for name in g.tensors
    }
    rows = []
    for role, members in by_role.items():
        count: dict[str, int] = {}
        for spec in sorted(members, key=lambda s: (types[s.name].bpw, types[s.name].name)):
            count[types[spec.name].name] = count.get(types[spec.name].name, 0) + 1
        share = sum(cost[s.name] for s in members) / max(found.cost, 1e-30)
        rows.append(Row(role, count, sum(_stored(s, types) for s in members), share))
    return tuple(sorted(rows, key=lambda row: -row.n_bytes))


def _with_curve(
    answer: Answer,
    measured: Sensitivity,
    specs: Sequence[TensorSpec],
    files: Files,
    groups: Sequence[Group],
) -> Answer:
    """All that fits any size best, and the shipped recipes beside it."""
    costs = measured.costs()
    least = {name: min(g.options, key=lambda o: o.n_bytes) for g in groups for name in g.tensors}
    outside = files.n_bytes({name: option.type for name, option in least.items()}) - sum(
        min(o.n_bytes for o in g.options) for g in groups
    )
    front = tuple(
        (p.n_bytes + outside + _RECORDS, measured.predicted(p.cost)) for p in frontier(groups, 24)
    )
    marks = []
    for name in (*(n for n in shipped_names() if n.startswith(LADDER)), *PRESETS):
        chooser = TypeChooser(load_recipe(name), specs, encodable())
        types = {spec.name: chooser.choose(spec).type for spec in specs}
        kld = measured.predicted(costs.total(specs, types))
        if kld < float("inf"):
            marks.append(Mark(name, files.n_bytes(types), kld))
    return replace(answer, marks=tuple(marks), front=front)
