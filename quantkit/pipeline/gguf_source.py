"""A GGUF file as what is converted: its plan, its metadata, what is said about it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from quantkit.arch.base import Model
from quantkit.arch.general import describe_name
from quantkit.arch.gguf_names import describe_gguf, unknown
from quantkit.container.kv import f32, i32, u32
from quantkit.container.names import shown
from quantkit.errors import UsageError
from quantkit.hub.folder import HubFile
from quantkit.hub.session import Place
from quantkit.quantize.tiles import Source
from quantkit.recipe import Recipe
from quantkit.source.checkpoint import open_checkpoint
from quantkit.source.gguf import MODEL, GgufSource, open_gguf
from quantkit.types import GgmlType, Kv, Plan

FILE_TYPE, QUANTIZATION_VERSION = "general.file_type", "general.quantization_version"
_VERSION = 2  # of ggml's block layouts

# Keys that tell how the source's weights were rounded. These are rounded in another way.
_STALE = ("quantize.imatrix.", "quantkit.rounding")

# Stored so, weights are what they were, or next to it.
_NEAR_EXACT = frozenset({GgmlType.F32, GgmlType.F16, GgmlType.BF16, GgmlType.Q8_0})
_LISTED = 5


def open_source(place: Place) -> Source:
    """A GGUF model, by its suffix, or a checkpoint's folder; raises what opening either raises."""
    if isinstance(place, HubFile) or (isinstance(place, Path) and place.suffix == ".gguf"):
        return open_gguf(place)
    return open_checkpoint(place)


def described(source: GgufSource) -> Model:
    """Tensors with roles, and the metadata that stays true; see `describe_gguf`."""
    kvs = {key: kv for key, kv in source.kvs.items() if not key.startswith(_STALE)}
    return describe_gguf(source.arch, kvs, source.weights)


def changed_kvs(file_type: int, recipe: Recipe) -> dict[str, Kv]:
    """What a conversion says anew; all else is kept as it was, byte for byte and in its place."""
    kvs = {QUANTIZATION_VERSION: u32(_VERSION), FILE_TYPE: u32(file_type)}
    for key, value in recipe.sampling.values().items():
        kvs[f"general.sampling.{key}"] = i32(int(value)) if key == "top_k" else f32(value)
    return kvs


def stem_of(source: GgufSource, name: str | None, recipe: Recipe) -> str:
    """What files are called; `name` overrules the model's own."""
    prefix = "" if source.kind == MODEL else "mmproj-"
    named = name or describe_name(source.kvs, source.shards.stem)
    return f"{prefix}{named.removeprefix(prefix)}-{recipe.name}"


def warnings(model: Model, plan: Plan) -> Iterator[str]:
    """Sentences about weights that have been quantised before, and about unknown tensors."""
    lossy: Counter[str] = Counter()
    for tensor in plan.tensors:
        if tensor.repack:
            continue
        stored = GgmlType[tensor.spec.slabs[0].weight.data.dtype]
        if stored not in _NEAR_EXACT:
            lossy[stored.name] += 1
    if lossy:
        told = ", ".join(f"{n:,} tensors are {name}" for name, n in lossy.most_common())
        yield (
            f"{told} and are quantised a second time, which loses more than once from the"
            " original would: take a BF16, F16 or F32 file if there is one"
        )
    if names := unknown(model):
        listed = ", ".join(shown(name) for name in names[:_LISTED])
        more = f" and {len(names) - _LISTED:,} more" if len(names) > _LISTED else ""
        yield f"tensors of unknown role get the recipe's default type: {listed}{more}"


def refuse_to_read(wanted: str, *, feedback: bool) -> UsageError:
    """Why a model whose tokenizer is not read cannot be run on a corpus, and what to do."""
    if feedback:
        return UsageError(
            "rounding with feedback runs the model on text, and a GGUF file's tokenizer is not"
            " read",
            hint="--corpus takes tokens that `quantkit calibrate` saved (.tokens.safetensors); or"
            " --rounding nearest, with an --imatrix",
        )
    return UsageError(
        f"{wanted} without importance statistics",
        hint="--imatrix takes those of llama-imatrix or `quantkit calibrate`, --corpus saved tokens"
        " to calibrate with (.tokens.safetensors); --no-imatrix does without",
    )


def refuse_own_source(source: GgufSource, plan: Plan, folder: Path) -> None:
    """Raise `UsageError` if a finished file would take the place of one that is read."""
    read = {file.path.resolve() for file in source.shards.files if file.remote is None}
    for shard in plan.shards:
        if (folder / shard.file).resolve() in read:
            raise UsageError(
                "is the file that is converted",
                where=str(folder / shard.file),
                hint="choose another folder with -o, or another --name",
            )
