"""The story: open a checkpoint, plan, quantise, write. Each step can be run and seen alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from quantkit.arch.base import Advice, Config, Model
from quantkit.arch.general import describe_name, general_kvs
from quantkit.arch.registry import describe_mmproj, describe_text
from quantkit.arch.vision import has_tower
from quantkit.errors import UsageError
from quantkit.pipeline.importance import Importance, load_importance
from quantkit.plan.build import Limits, TypeChooser, build_plan, file_type
from quantkit.plan.rounding import rounded_by_inputs
from quantkit.quantize.codec import Codec, How, codec_of, encodable
from quantkit.quantize.tiles import Encoding, encode_tile
from quantkit.recipe import Recipe, load_recipe
from quantkit.run import fs
from quantkit.run.events import Reporter, files, size
from quantkit.run.executor import run_threaded
from quantkit.source.checkpoint import Checkpoint, open_checkpoint
from quantkit.text.extras import require
from quantkit.types import GgmlType, Kv, Plan
from quantkit.write.record import Provenance
from quantkit.write.writer import ShardWriter, is_written

if TYPE_CHECKING:
    from quantkit.pipeline.rounding import Text


@dataclass(frozen=True, slots=True)
class Job:
    """What the user asked for. `mmproj` is a type, or None for no vision file.

    `imatrix` is a file of importance statistics. Without one, a low-bit recipe is calibrated first
    with `budget` tokens of `corpus`, unless that is None. `rounding` overrules the recipe's; with
    feedback, weights are rounded while the model runs on that text.
    """

    model: Path
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
    """The plans of a job's files, in the order of writing, and what to know about them."""

    recipe: Recipe
    plans: tuple[Plan, ...]
    advice: tuple[Advice, ...]
    ignored: dict[str, str]
    importance: Importance | None = None

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
def planned(job: Job, reporter: Reporter) -> Iterator[tuple[Checkpoint, Planned]]:
    """Open the checkpoint and decide everything that metadata can decide."""
    recipe = load_recipe(job.recipe)
    if job.rounding is not None:
        recipe = recipe.model_copy(update={"rounding": job.rounding})
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
    """Where it goes. `restart` discards an unfinished run, `force` replaces finished files.

    `device` is where weights are encoded: cpu (numba), or one of torch's, such as cuda.
    """

    folder: Path
    n_threads: int
    restart: bool = False
    force: bool = False
    device: str = "cpu"


def convert(job: Job, output: Output, reporter: Reporter) -> Planned:
    """Convert a checkpoint; every file of it is complete under its final name, or there is none."""
    with planned(job, reporter) as (checkpoint, first):
        decided, text = first, None
        if decided.by_inputs:
            text = _text(job, decided.recipe, output)
            decided = _plan(job, checkpoint, decided.recipe, text.kvs)
        if decided.starved and job.imatrix is None and job.corpus is not None:
            job = replace(job, imatrix=_calibrated(job, decided, output, reporter))
            decided = _plan(job, checkpoint, decided.recipe, text.kvs if text else None)
        if decided.starved:
            types = ", ".join(decided.starved)
            reporter.warn(f"{types} without importance statistics: all columns count alike")
        for plan in decided.plans:
            if is_written(output.folder, plan, force=output.force):
                reporter.stage("write", f"{plan.stem} is already there, nothing to do")
            else:
                _write(plan, checkpoint, decided, output, reporter, text)
    return decided


def _text(job: Job, recipe: Recipe, output: Output) -> Text:
    """What the model will be run on while its weights are rounded."""
    if job.corpus is None:
        raise UsageError(
            "rounding with feedback needs text to run the model on",
            hint="leave out --no-imatrix, or choose --rounding nearest",
        )
    require("torch")
    from quantkit.pipeline.opening import Running  # noqa: PLC0415 - brings torch
    from quantkit.pipeline.rounding import Text  # noqa: PLC0415

    return Text.read(job.model, job.corpus, job.n_tokens(recipe), Running(output.device))


def _calibrated(job: Job, decided: Planned, output: Output, reporter: Reporter) -> Path:
    """The imatrix of this model in the output folder, measured now if it is not there yet."""
    require("torch")
    from quantkit.pipeline.calibration import Calibration, calibrate  # noqa: PLC0415 - brings torch
    from quantkit.pipeline.opening import Reading  # noqa: PLC0415

    corpus, n_tokens = job.corpus or "", job.n_tokens(decided.recipe)
    types = ", ".join(decided.starved)
    reporter.warn(f"{types} and no --imatrix: calibrating first, {n_tokens:,} tokens of {corpus}")
    plan = decided.plans[-1]
    path = output.folder / f"{plan.stem.removesuffix(f'-{plan.recipe_name}')}.imatrix.gguf"
    fs.make_folder(output.folder)
    calibrate(Calibration(job.model, Reading(corpus, n_tokens)), path, reporter)
    return path


def _plan(
    job: Job, checkpoint: Checkpoint, recipe: Recipe, kvs: Mapping[str, Kv] | None = None
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
        source_fingerprint=" ".join(
            [checkpoint.fingerprint(), recipe.digest(), importance.digest if importance else ""]
        ),
        limits=job.limits if is_model else Limits(None),
    )


def _mmproj_recipe(type_: GgmlType) -> Recipe:
    """One type for the vision file; llama.cpp's patch convolution runs in F16 or F32 only."""
    patch = GgmlType.F16 if type_ is GgmlType.F16 else GgmlType.F32
    rules = ({"role": "vision.patch_embd", "type": patch},)
    return Recipe.model_validate({"name": type_.name, "default": type_, "rules": rules})


def _codecs(plan: Plan, device: str) -> Callable[[GgmlType], Codec]:
    """numba's codecs, or torch's on another device, which is tried before anything is written."""
    if device == "cpu":
        return codec_of
    from quantkit.quantize.torch import torch_codec  # noqa: PLC0415 - brings torch

    codecs = {type_: torch_codec(type_, device) for type_ in {t.type for t in plan.tensors}}
    return lambda type_: codecs.get(type_) or codec_of(type_)


def _write(
    plan: Plan,
    checkpoint: Checkpoint,
    decided: Planned,
    output: Output,
    reporter: Reporter,
    text: Text | None,
) -> None:
    recipe, importance = decided.recipe, decided.importance
    how = How(recipe.effort, recipe.weighting, recipe.gain)
    lookup = importance.lookup if importance else None
    encoding = Encoding(how, lookup, _codecs(plan, output.device))
    provenance = Provenance(checkpoint.root.name, checkpoint.fingerprint(), recipe)
    n_inexact = 0
    with ShardWriter(output.folder, plan, restart=output.restart) as writer:
        reporter.begin(plan.stem, plan.n_bytes, writer.n_done_bytes())
        try:
            if text is not None and plan is decided.plans[-1]:
                text.round(plan, encoding, recipe.feedback, writer, output.n_threads, reporter)
            work = partial(encode_tile, checkpoint, plan.tensors, encoding=encoding)
            with closing(run_threaded(work, writer.missing(), output.n_threads)) as tiles:
                for tile in tiles:
                    writer.write(tile.tensor, tile.tile, tile.data, tile.digest)
                    reporter.advance(tile.data.nbytes)
                    n_inexact += tile.n_inexact
        finally:
            reporter.end()
        writer.commit(provenance)
        fs.remove_folder(writer.work)
    if n_inexact:
        reporter.warn(
            f"{n_inexact:,} INT4 blocks have a scale beyond f16 and were encoded, not copied"
        )
    reporter.stage("write", f"{plan.stem}: {size(plan.n_bytes)} in {files(len(plan.shards))}")
