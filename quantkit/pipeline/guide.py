"""The guide's story: a checkpoint with a recipe, or a GGUF file, seen as a model to run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath

from quantkit.container.layout import DEFAULT_ALIGNMENT, padded
from quantkit.container.names import escaped, shown
from quantkit.container.reader import GgufFile
from quantkit.container.shardset import ShardSet, open_shards
from quantkit.errors import QuantkitError, UsageError
from quantkit.guide.guide import Guide, Rung, best_rung, make_guide
from quantkit.guide.memory import Machine, context, fit
from quantkit.guide.model import (
    Held,
    Model,
    Shape,
    Tip,
    read_sampling,
    read_shape,
    thinking_switch,
    with_recommended_sampling,
)
from quantkit.hub.folder import HubFile
from quantkit.hub.session import Place
from quantkit.pipeline.planning import Job, Planned, planned
from quantkit.plan.build import TypeChooser
from quantkit.quantize.codec import encodable
from quantkit.recipe import Recipe, load_recipe, parse_recipe, shipped_names
from quantkit.run.events import Silent
from quantkit.types import GgmlType, Kvs, KvType, TensorSpec, WeightFormat
from quantkit.write.manifest import load_manifest, manifest_path

LADDER = "ud-"
# llama.cpp's presets, for what lies between or below; those for models trained in few bits are no
# general advice.
PRESETS = (
    "iq1_s", "iq1_m", "iq2_xxs", "iq2_xs", "iq2_m", "q2_k", "iq3_xxs", "iq3_s", "q3_k_m", "iq4_xs",
    "q4_k_m", "q4_x", "q5_k_m", "q6_k", "q8_0",
)  # fmt: skip
_DEFAULT_BETA_FAST = 32.0


@dataclass(frozen=True, slots=True)
class Question:
    """What the user wants to run, and on what. `recipe` None asks for the best that fits.

    `n_ctx` None is 98,304 or what the model allows; `repo` is where the files are on the Hub.
    """

    path: Place
    machine: Machine
    recipe: str | None = None
    n_ctx: int | None = None
    repo: str | None = None


def guide(question: Question) -> Guide:
    """Answer it from headers and metadata alone; raises what opening raises."""
    path = question.path
    if isinstance(path, HubFile) or (isinstance(path, Path) and path.suffix == ".gguf"):
        if question.recipe is not None:
            raise UsageError(
                "a GGUF file has its types already",
                where="--recipe",
                hint="give the checkpoint's folder to see what other recipes would make of it",
            )
        repo = path.folder.repo.ref.repo if isinstance(path, HubFile) else None
        model = model_of_file(open_shards(path))
        return make_guide(model, question.machine, question.n_ctx, repo=question.repo or repo)
    name = question.recipe or "q8_0"
    rungs: tuple[Rung, ...] = ()
    while True:
        with planned(Job(path, name), Silent()) as (_, decided):
            rungs = rungs or tuple(ladder(decided, question.machine, question.n_ctx))
            best = question.recipe or best_rung(rungs) or min(rungs, key=_n_bytes).recipe
            if best == name:
                model = model_of_plan(decided)
                return make_guide(
                    model, question.machine, question.n_ctx, ladder=rungs, repo=question.repo
                )
        name = best


def ladder(decided: Planned, machine: Machine, n_ctx: int | None) -> Iterator[Rung]:
    """The shipped `ud-*` recipes for this model by size; llama.cpp's presets if none fits."""
    text = decided.plans[-1]
    shape = read_shape(text.kvs, where=text.stem)
    names = [name for name in shipped_names() if name.startswith(LADDER)]
    rungs = _rungs(names, decided, shape, machine, n_ctx)
    if best_rung(rungs) is None:
        rungs += _rungs(PRESETS, decided, shape, machine, n_ctx)
    yield from sorted(rungs, key=lambda rung: (rung.n_bytes, rung.recipe))


def model_of_plan(decided: Planned) -> Model:
    """What a conversion would write."""
    text = decided.plans[-1]
    mmproj = decided.plans[0] if len(decided.plans) > 1 else None
    model = Model(
        name=text.stem,
        arch=text.arch,
        files=tuple(shard.file for shard in text.shards),
        n_bytes=text.n_bytes,
        tensors=tuple(Held(t.spec.name, t.type, t.n_bytes) for t in text.tensors),
        shape=read_shape(text.kvs, where=text.stem),
        sampling=read_sampling(text.kvs),
        instant=_instant_of(decided.recipe),
        switch=thinking_switch(_template(text.kvs)),
        mmproj=(mmproj.shards[0].file, mmproj.n_bytes) if mmproj else None,
        tips=tuple(Tip(item.flag, item.reason) for item in decided.advice),
    )
    return with_recommended_sampling(model, text.kvs)


def model_of_file(shards: ShardSet) -> Model:
    """What lies there, with the vision file and the record of its conversion if they lie beside.

    `UsageError` for a GGUF file that is no model.
    """
    first = shards.files[0].path
    where = escaped(str(first))
    kind = shards.kvs.get("general.type")
    if kind is not None and kind.value != "model":
        raise UsageError(f"is of type {shown(str(kind.value))!r}, not a model", where=where)
    arch = shards.kvs.get("general.architecture")
    instant, notes = _instant(shards)
    model = Model(
        name=shards.stem,
        arch=str(arch.value) if arch else "",
        files=tuple(_path(file) for file in shards.files),
        n_bytes=shards.n_bytes,
        tensors=tuple(Held(t.name, t.type, t.n_bytes) for _, t in shards.tensors()),
        shape=read_shape(shards.kvs, where=where),
        sampling=read_sampling(shards.kvs),
        instant=instant,
        switch=thinking_switch(_template(shards.kvs)),
        mmproj=_mmproj(shards),
        tips=_tips(shards.kvs),
        notes=notes,
    )
    return with_recommended_sampling(model, shards.kvs)


def _rungs(
    names: Iterable[str], decided: Planned, shape: Shape, machine: Machine, n_ctx: int | None
) -> list[Rung]:
    text = decided.plans[-1]
    specs = [tensor.spec for tensor in text.tensors]
    header = text.n_bytes - sum(padded(t.n_bytes, DEFAULT_ALIGNMENT) for t in text.tensors)
    whole = model_of_plan(decided)
    rungs = []
    for name in names:
        held, wasteful = _typed(name, specs)
        n_bytes = header + sum(padded(t.n_bytes, DEFAULT_ALIGNMENT) for t in held)
        model = Model(name, text.arch, (), n_bytes, tuple(held), shape, mmproj=whole.mmproj)
        laid = fit(model, machine, context(shape, n_ctx))
        bpw = 8 * model.weights_bytes / max(1, text.n_weights)
        rungs.append(Rung(name, n_bytes, bpw, laid.place, wasteful))
    return rungs


def _typed(recipe: str, specs: Sequence[TensorSpec]) -> tuple[list[Held], bool]:
    """Tensors as a recipe would have them, and whether INT4 weights get more than their bits."""
    chooser = TypeChooser(load_recipe(recipe), specs, encodable())
    held, wasteful = [], False
    for spec in specs:
        type_ = chooser.choose(spec).type
        n_rows, n_cols = spec.grid
        held.append(Held(spec.name, type_, n_rows * type_.row_bytes(n_cols)))
        is_int4 = any(slab.weight.format is WeightFormat.INT4_G32 for slab in spec.slabs)
        wasteful |= is_int4 and type_.bpw > GgmlType.Q4_0.bpw
    return held, wasteful


def _n_bytes(rung: Rung) -> int:
    return rung.n_bytes


def _template(kvs: Kvs) -> str | None:
    kv = kvs.get("tokenizer.chat_template")
    return str(kv.value) if kv and kv.type is KvType.STRING else None


def _tips(kvs: Kvs) -> tuple[Tip, ...]:
    """The advice of `quantkit.arch.deepseek`, from a file: llama.cpp does not read this key."""
    kv = kvs.get("deepseek2.rope.scaling.yarn_beta_fast")
    if kv is None or kv.type is not KvType.F32 or kv.value == _DEFAULT_BETA_FAST:
        return ()
    return (
        Tip(
            f"--yarn-beta-fast {kv.value:g}",
            f"the model was trained with beta_fast {kv.value:g}; llama.cpp does not read it "
            "from a deepseek2 file and would use 32, which hurts long contexts",
        ),
    )


def _path(file: GgufFile) -> str:
    """Where a file is; of one on the Hub, where `hf download --local-dir .` puts it."""
    return file.remote.path if isinstance(file.remote, HubFile) else str(file.path)


def _mmproj(shards: ShardSet) -> tuple[str, int] | None:
    """The vision file beside a model: the one of its name, or the only one.

    On the Hub it is the repository's, F16 where there are several.
    """
    first = shards.files[0].remote
    if isinstance(first, HubFile):
        paths = [p for p in first.folder.ggufs() if PurePath(p).name.startswith("mmproj")]
        paths.sort(key=lambda path: "-f16" not in path.lower())
        return (paths[0], first.folder.files.size(paths[0])) if paths else None
    found = sorted(shards.folder.glob("mmproj*.gguf"))
    named = [
        path
        for path in found
        if shards.stem.startswith(path.stem.removeprefix("mmproj-").rpartition("-")[0] or "\0")
    ]
    chosen = named[:1] or (found if len(found) == 1 else [])
    return (str(chosen[0]), chosen[0].stat().st_size) if chosen else None


def _instant_of(recipe: Recipe) -> dict[str, float]:
    return {str(key): value for key, value in recipe.sampling.instant.items()}


def _instant(shards: ShardSet) -> tuple[dict[str, float], tuple[str, ...]]:
    """Sampling with thinking off, from the recipe that quantkit has recorded beside the file."""
    path = manifest_path(shards.folder, shards.stem)
    if not path.exists():
        return {}, ()
    try:
        record = load_manifest(path)
        recipe = parse_recipe(record.recipe.text, where=str(path))
    except QuantkitError as error:
        return {}, (f"the record beside the file cannot be used: {error.message}",)
    return _instant_of(recipe), ()
