"""Which shards make up a checkpoint, and whether their headers keep to the index."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from quantkit.errors import SourceError, UnsupportedError
from quantkit.source.folder import Place, check_name, read_json
from quantkit.types import TensorRef

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
MAX_INDEX_BYTES = 64 * 2**20
_MAX_SHARDS = 1 << 14
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_SHARD = re.compile(r"(.*)-(\d{1,9})-of-(\d{1,9})\.safetensors")
_REPAIR = "download the checkpoint again; a broken download leaves this"


def find_shards(folder: Place) -> dict[str, set[str] | None]:
    """Shard file -> the tensors that the index places in it, None where there is no index.

    The index alone decides where there is one: file names are not sorted and other
    `.safetensors` files are ignored. Without it, `model.safetensors` is the checkpoint, or else
    every `.safetensors` file of the folder is a part of it.
    """
    index = read_json(folder, INDEX_NAME, MAX_INDEX_BYTES, unique=True)
    if index is not None:
        return dict(_indexed(index, str(folder.root / INDEX_NAME)))
    names = [name for name in folder.names() if name.endswith(".safetensors")]
    if not names:
        raise _nothing_to_open(folder)
    if SINGLE_NAME in names:
        names = [SINGLE_NAME]
    _check_numbering(names, str(folder.root))
    return dict.fromkeys(names)


def _indexed(index: dict[str, Any], where: str) -> dict[str, set[str]]:
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise SourceError("holds no weight_map", where=where, hint=_REPAIR)
    shards: dict[str, set[str]] = {}
    for tensor, file in weight_map.items():
        # A name is checked once; one that is no string (nor hashable) is refused by the check.
        if not isinstance(file, str) or file not in shards:
            check_name(file, where=f"{where}: {tensor[:400]}", suffix=".safetensors")
            shards[file] = set()
            if len(shards) > _MAX_SHARDS:
                raise SourceError(f"names more than {_MAX_SHARDS:,} shards", where=where)
        shards[file].add(tensor)
    folded: dict[str, str] = {}
    for file in shards:
        twin = folded.setdefault(file.casefold(), file)
        if twin != file:
            raise SourceError(f"{twin!r} and {file!r} differ only in case", where=where)
    return shards


def _check_numbering(names: Iterable[str], where: str) -> None:
    """Without an index, the `-of-N` of the names tells what is missing."""
    series: dict[tuple[str, int], set[int]] = {}
    for name in names:
        match = _SHARD.fullmatch(name)
        if match:
            series.setdefault((match[1], int(match[3])), set()).add(int(match[2]))
    for (stem, count), present in series.items():
        first = 0 if 0 in present else 1
        n_missing = count - sum(first <= number < first + count for number in present)
        if n_missing:
            raise SourceError(
                f"{n_missing} of the {count} shards '{stem}-*-of-*' are missing; there is no index",
                where=where,
                hint=_REPAIR,
            )


def _nothing_to_open(folder: Place) -> Exception:
    pickles = [name for name in folder.names() if name.endswith(_PICKLES)]
    if pickles:
        return UnsupportedError(
            f"holds only pickled weights ({pickles[0]}), which can run code when opened",
            where=str(folder.root),
            hint="convert the checkpoint to safetensors; quantkit never opens pickles",
        )
    return SourceError(
        "holds no .safetensors file",
        where=str(folder.root),
        hint="name the folder that holds config.json and the model's shards",
    )


def check_against_index(file: str, refs: Iterable[TensorRef], expected: set[str]) -> None:
    """Refuse a shard that lacks tensors of the index or holds others."""
    present = {ref.name for ref in refs}
    if present == expected:
        return
    for names, what in (
        (expected - present, "is in the index but not in the shard"),
        (present - expected, "is in the shard, where the index does not place it"),
    ):
        if names:
            first = min(names)
            more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
            raise SourceError(f"{what}{more}", where=f"{file}: {first}", hint=_REPAIR)


def add_tensors(tensors: dict[str, TensorRef], refs: Iterable[TensorRef]) -> None:
    """Put a shard's tensors into the checkpoint's, refusing a name that another shard has."""
    for ref in refs:
        other = tensors.setdefault(ref.name, ref)
        if other is not ref:
            raise SourceError(
                f"is also in {other.file}",
                where=f"{ref.file}: {ref.name}",
                hint="keep only the files of one checkpoint in the folder",
            )
