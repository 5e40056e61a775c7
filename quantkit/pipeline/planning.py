"""What a job's files will be, decided from metadata alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from quantkit.arch.base import Advice, Config, Model
from quantkit.arch.general import describe_name, general_kvs
from quantkit.arch.registry import describe_mmproj, describe_text
from quantkit.arch.vision import has_tower
from quantkit.hub.session import Place
from quantkit.pipeline import gguf_source
from quantkit.pipeline.importance import Importance, load_importance
from quantkit.plan.build import Limits, TypeChooser, build_plan, file_type
from quantkit.plan.memory import Memory, fit, hidden_states
from quantkit.plan.rounding import rounded_by_inputs
from quantkit.quantize.codec import How, encodable
from quantkit.quantize.tiles import Source
from quantkit.recipe import Recipe, load_recipe
from quantkit.run.events import Reporter, files, size
from quantkit.source.checkpoint import Checkpoint
from quantkit.source.gguf import MODEL, GgufSource
from quantkit.types import GgmlType, Kv, Plan


@dataclass(frozen=True, slots=True)
class Job:
    """What the user asked for. `model` is a checkpoint's folder or a GGUF file, `mmproj` the type
    of a checkpoint's vision file, or None for no such file.

    `imatrix` is a file of importance statistics. Without one, a low-bit recipe is calibrated first
    with `budget` tokens of `corpus`, unless that is None. `rounding` overrules the recipe's; with
    feedback, weights are rounded while the model runs on that text.
    """

    model: Place
    recipe: str
    limits: Limits = field(default_factory=Limits)
    name: str | None = None
    mmproj: GgmlType | None = GgmlType.F16
    imatrix: Path | None = None
    corpus: str | None = "core"
    budget: int | None = None
    rounding: Literal["nearest", "feedback"] | None = None

    def n_tokens(self, recipe: Recipe) -> int:
        """Most tokens to run the model on. Gram matrices want many more than their diagonals."""
        return self.budget or {"nearest": 32_768, "feedback": 131_072}[recipe.rounding]


@dataclass(frozen=True, slots=True)
class Planned:
    """The plans of a job's files, in the order of writing, and what to know about them.

    `warnings` are sentences about the source.
    """

    recipe: Recipe
    plans: tuple[Plan, ...]
    advice: tuple[Advice, ...]
    ignored: dict[str, str]
    importance: Importance | None = None
    warnings: tuple[str, ...] = ()

    def memory(self, n_threads: int, budget: int | None) -> Memory:
        """How the job keeps within `budget` bytes; raises as `fit` and `hidden_states` do."""
        if self.by_inputs and budget is not None:
            hidden_states(self.plans[-1], budget)
        return fit(self.plans, self.how, n_threads, budget)

    @property
    def how(self) -> How:
        """How weights are encoded."""
        return How(self.recipe.effort, self.recipe.weighting, self.recipe.gain)

    @property
    def by_inputs(self) -> dict[str, GgmlType]:
        """Tensors that are rounded by their inputs, and their types."""
        return rounded_by_inputs(self.plans[-1]) if self.recipe.rounding == "feedback" else {}

    @property
    def starved(self) -> list[str]:
        """Low-bit types of tensors without statistics: there, which columns count matters most.

        The token embedding is looked up, not multiplied; no statistics are missing for it.
        """
        known = {*(self.importance.lookup.covered() if self.importance else ()), *self.by_inputs}
        low = {
            tensor.type.name
            for tensor in self.plans[-1].tensors
            if tensor.type.bpw < _WANTS_IMPORTANCE_BPW
            and tensor.spec.name not in known
            and tensor.spec.role != "token_embd"
        }
        return sorted(low)


# Below this, which weights matter decides the result, and rounding all alike costs much.
_WANTS_IMPORTANCE_BPW = 3.5


@contextmanager
def planned(job: Job, reporter: Reporter) -> Iterator[tuple[Source, Planned]]:
    """Open the model and decide everything that metadata can decide."""
    recipe = load_recipe(job.recipe)
    if job.rounding is not None:
        recipe = recipe.model_copy(update={"rounding": job.rounding})
    with gguf_source.open_source(job.model) as source:
        n_files = len({ref.file for ref in source.tensors.values()})
        reporter.stage("open", f"{len(source.tensors):,} tensors in {files(n_files)}")
        decided = plan_job(job, source, recipe)
        text = decided.plans[-1]
        reporter.stage(
            "plan",
            f"{len(text.tensors):,} tensors, {text.bpw:.3f} bpw, {size(text.n_bytes)} "
            f"in {files(len(text.shards))}",
        )
        yield source, decided


def plan_job(
    job: Job, source: Source, recipe: Recipe, kvs: Mapping[str, Kv] | None = None
) -> Planned:
    """The plans of a job on an opened source; `kvs` are metadata to add to the model's file."""
    if isinstance(source, GgufSource):
        return _plan_gguf(job, source, recipe, kvs)
    return _plan_checkpoint(job, source, recipe, kvs)


def _plan_gguf(
    job: Job, source: GgufSource, recipe: Recipe, kvs: Mapping[str, Kv] | None
) -> Planned:
    if source.kind != MODEL:
        recipe = recipe.model_copy(update={"rounding": "nearest"})
    model = gguf_source.described(source)
    importance = load_importance(job.imatrix, model.tensors) if job.imatrix else None
    chooser = TypeChooser(recipe, model.tensors, encodable())
    changed = gguf_source.changed_kvs(file_type(model.tensors, chooser), recipe)
    plan = build_plan(
        model.tensors,
        chooser,
        model.kvs | changed | (importance.kvs if importance else {}) | dict(kvs or {}),
        stem=gguf_source.stem_of(source, job.name, recipe),
        arch=model.arch,
        recipe_name=recipe.name,
        source_fingerprint=_fingerprint(source, recipe, importance),
        limits=job.limits,
    )
    told = tuple(gguf_source.warnings(model, plan))
    return Planned(recipe, (plan,), (), {}, importance, told)


def _fingerprint(source: Source, recipe: Recipe, importance: Importance | None) -> str:
    return " ".join(
        [source.fingerprint(), recipe.digest(), importance.digest if importance else ""]
    )


def _plan_checkpoint(
    job: Job, checkpoint: Checkpoint, recipe: Recipe, kvs: Mapping[str, Kv] | None
) -> Planned:
    config = Config(checkpoint.config)
    text = describe_text(config, checkpoint.weights, checkpoint)
    importance = load_importance(job.imatrix, text.tensors) if job.imatrix else None
    plans = []
    if job.mmproj is not None and has_tower(config, checkpoint.weights):
        vision = describe_mmproj(config, checkpoint.weights, checkpoint)
        plans.append(
            _plan_file(job, checkpoint, vision, _mmproj_recipe(job.mmproj), "mmproj", None)
        )
    plans.append(_plan_file(job, checkpoint, text, recipe, "model", importance, kvs))
    return Planned(recipe, tuple(plans), text.advice, dict(text.ignored), importance)


def _plan_file(
    job: Job,
    checkpoint: Checkpoint,
    model: Model,
    recipe: Recipe,
    kind: str,
    importance: Importance | None,
    kvs: Mapping[str, Kv] | None = None,
) -> Plan:
    chooser = TypeChooser(recipe, model.tensors, encodable())
    general = general_kvs(
        model.arch,
        kind,
        checkpoint.root,
        checkpoint,
        model.tensors,
        file_type(model.tensors, chooser),
        recipe.sampling.values(),
    )
    name = job.name or describe_name(general, checkpoint.root.resolve().name)
    is_model = kind == "model"
    return build_plan(
        model.tensors,
        chooser,
        general | model.kvs | (importance.kvs if importance else {}) | dict(kvs or {}),
        stem=f"{name}-{recipe.name}" if is_model else f"mmproj-{name}-{recipe.name}",
        arch=model.arch,
        recipe_name=recipe.name,
        source_fingerprint=_fingerprint(checkpoint, recipe, importance),
        limits=job.limits if is_model else Limits(None),
    )


def _mmproj_recipe(type_: GgmlType) -> Recipe:
    """One type for the vision file; llama.cpp's patch convolution runs in F16 or F32 only."""
    patch = GgmlType.F16 if type_ is GgmlType.F16 else GgmlType.F32
    rules = ({"role": "vision.patch_embd", "type": patch},)
    return Recipe.model_validate({"name": type_.name, "default": type_, "rules": rules})
