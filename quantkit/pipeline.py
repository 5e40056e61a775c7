"""The story: open a checkpoint, plan, quantise, write. Each step can be run and seen alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from quantkit.arch.base import Advice, Config, Model
from quantkit.arch.general import describe_name, general_kvs
from quantkit.arch.registry import describe_mmproj, describe_text
from quantkit.arch.vision import has_tower
from quantkit.plan.build import Limits, TypeChooser, build_plan, file_type
from quantkit.quantize.codec import How, encodable
from quantkit.quantize.tiles import encode_tile
from quantkit.recipe import Recipe, load_recipe
from quantkit.run.events import Reporter, files, size
from quantkit.run.executor import run_threaded
from quantkit.source.checkpoint import Checkpoint, open_checkpoint
from quantkit.types import GgmlType, Plan
from quantkit.write.record import Provenance
from quantkit.write.writer import ShardWriter, is_written


@dataclass(frozen=True, slots=True)
class Job:
    """What the user asked for. `mmproj` is a type, or None for no vision file."""

    model: Path
    recipe: str
    limits: Limits = field(default_factory=Limits)
    name: str | None = None
    mmproj: GgmlType | None = GgmlType.F16


@dataclass(frozen=True, slots=True)
class Planned:
    """The plans of a job's files, in the order of writing, and what to know about them."""

    recipe: Recipe
    plans: tuple[Plan, ...]
    advice: tuple[Advice, ...]
    ignored: dict[str, str]


@contextmanager
def planned(job: Job, reporter: Reporter) -> Iterator[tuple[Checkpoint, Planned]]:
    """Open the checkpoint and decide everything that metadata can decide."""
    recipe = load_recipe(job.recipe)
    with open_checkpoint(job.model) as checkpoint:
        n_files = len({ref.file for ref in checkpoint.tensors.values()})
        reporter.stage("open", f"{len(checkpoint.tensors):,} tensors in {files(n_files)}")
        decided = _plan(job, checkpoint, recipe)
        text = decided.plans[-1]
        reporter.stage(
            "plan",
            f"{len(text.tensors):,} tensors, {text.bpw:.3f} bpw, {size(text.n_bytes)} "
            f"in {files(len(text.shards))}",
        )
        yield checkpoint, decided


@dataclass(frozen=True, slots=True)
class Output:
    """Where it goes. `restart` discards an unfinished run, `force` replaces finished files."""

    folder: Path
    n_threads: int
    restart: bool = False
    force: bool = False


# Below this, which weights matter decides the result, and rounding all alike costs much.
_WANTS_IMPORTANCE_BPW = 3.5


def convert(job: Job, output: Output, reporter: Reporter) -> Planned:
    """Convert a checkpoint; every file of it is complete under its final name, or there is none."""
    with planned(job, reporter) as (checkpoint, decided):
        low = {t.type.name for t in decided.plans[-1].tensors if t.type.bpw < _WANTS_IMPORTANCE_BPW}
        if low:
            reporter.warn(f"{', '.join(sorted(low))} without an imatrix: all columns count alike")
        for plan in decided.plans:
            if is_written(output.folder, plan, force=output.force):
                reporter.stage("write", f"{plan.stem} is already there, nothing to do")
            else:
                _write(plan, checkpoint, decided.recipe, output, reporter)
    return decided


def _plan(job: Job, checkpoint: Checkpoint, recipe: Recipe) -> Planned:
    config = Config(checkpoint.config)
    text = describe_text(config, checkpoint.weights, checkpoint)
    plans = []
    if job.mmproj is not None and has_tower(config, checkpoint.weights):
        vision = describe_mmproj(config, checkpoint.weights, checkpoint)
        plans.append(_plan_file(job, checkpoint, vision, _mmproj_recipe(job.mmproj), "mmproj"))
    plans.append(_plan_file(job, checkpoint, text, recipe, "model"))
    return Planned(recipe, tuple(plans), text.advice, dict(text.ignored))


def _plan_file(job: Job, checkpoint: Checkpoint, model: Model, recipe: Recipe, kind: str) -> Plan:
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
        general | model.kvs,
        stem=f"{name}-{recipe.name}" if is_model else f"mmproj-{name}-{recipe.name}",
        arch=model.arch,
        recipe_name=recipe.name,
        source_fingerprint=checkpoint.fingerprint(),
        limits=job.limits if is_model else Limits(None),
    )


def _mmproj_recipe(type_: GgmlType) -> Recipe:
    """One type for the vision file; llama.cpp's patch convolution runs in F16 or F32 only."""
    patch = GgmlType.F16 if type_ is GgmlType.F16 else GgmlType.F32
    rules = ({"role": "vision.patch_embd", "type": patch},)
    return Recipe.model_validate({"name": type_.name, "default": type_, "rules": rules})


def _write(
    plan: Plan,
    checkpoint: Checkpoint,
    recipe: Recipe,
    output: Output,
    reporter: Reporter,
) -> None:
    how = How(effort=recipe.effort)
    provenance = Provenance(checkpoint.root.name, checkpoint.fingerprint(), recipe)
    n_inexact = 0
    with ShardWriter(output.folder, plan, restart=output.restart) as writer:
        reporter.begin(plan.stem, plan.n_bytes, writer.n_done_bytes())
        try:
            work = partial(encode_tile, checkpoint, plan.tensors, how=how)
            with closing(run_threaded(work, writer.missing(), output.n_threads)) as tiles:
                for tile in tiles:
                    writer.write(tile.tensor, tile.tile, tile.data, tile.digest)
                    reporter.advance(tile.data.nbytes)
                    n_inexact += tile.n_inexact
        finally:
            reporter.end()
        writer.commit(provenance)
    if n_inexact:
        reporter.warn(
            f"{n_inexact:,} INT4 blocks have a scale beyond f16 and were encoded, not copied"
        )
    reporter.stage("write", f"{plan.stem}: {size(plan.n_bytes)} in {files(len(plan.shards))}")
