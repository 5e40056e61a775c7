"""Which shards make up a checkpoint, and whether their headers keep to the index."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable

from quantkit.errors import SourceError, UnsupportedError
from quantkit.run.json_size import parsed_bytes
from quantkit.source.folder import MAX_PARSED_BYTES, Place, check_name, json_errors
from quantkit.types import TensorRef

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
MAX_INDEX_BYTES = 64 * 2**20
MAX_TENSORS = 1 << 19  # of one checkpoint; Kimi K3 has 497,220
_MAX_SHARDS = 1 << 12
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_SHARD = re.compile(r"(.*)-(\d{1,9})-of-(\d{1,9})\.safetensors")
_TEXT = r'"([^"\\\x00-\x1f]*(?:\\.[^"\\\x00-\x1f]*)*)"'
_BLANK = r"[ \t\n\r]*"
_OPEN = re.compile(rf"{_BLANK}\{{")
_CLOSE = re.compile(rf"{_BLANK}\}}")
_KEY = re.compile(rf"{_BLANK}{_TEXT}{_BLANK}:{_BLANK}")
_PAIR = re.compile(rf"{_BLANK}{_TEXT}{_BLANK}:{_BLANK}{_TEXT}{_BLANK}[,}}]")
_NEXT = re.compile(rf"{_BLANK}[,}}]")
_END = re.compile(rf"{_BLANK}\Z")
_REPAIR = "download the checkpoint again; a broken download leaves this"


def find_shards(folder: Place) -> dict[str, set[str] | None]:
    """Shard file -> the tensors that the index places in it, None where there is no index.

    The index alone decides where there is one: file names are not sorted and other
    `.safetensors` files are ignored. Without it, `model.safetensors` is the checkpoint, or else
    every `.safetensors` file of the folder is a part of it.
    """
    text = _index_text(folder)
    if text is not None:
        where = str(folder.root / INDEX_NAME)
        with json_errors(where):
            weight_map = _weight_map(text)
        del text
        return dict(_indexed(weight_map, where))
    names = [name for name in folder.names() if name.endswith(".safetensors")]
    if not names:
        raise _nothing_to_open(folder)
    if SINGLE_NAME in names:
        names = [SINGLE_NAME]
    if len(names) > _MAX_SHARDS:
        raise SourceError(f"holds more than {_MAX_SHARDS:,} shards", where=str(folder.root))
    _check_numbering(names, str(folder.root))
    return dict.fromkeys(names)


def _index_text(folder: Place) -> str | None:
    raw = folder.read_bytes(INDEX_NAME, MAX_INDEX_BYTES)
    if raw is None:
        return None
    where = str(folder.root / INDEX_NAME)
    if raw.count(b",") > MAX_TENSORS:
        raise SourceError(f"names more than {MAX_TENSORS:,} tensors", where=where)
    if parsed_bytes(raw) > MAX_PARSED_BYTES:
        raise SourceError("takes too much memory, unlike any checkpoint's", where=where)
    with json_errors(where):
        return raw.decode()


def _weight_map(text: str) -> dict[str, str]:
    """The member `weight_map` of a JSON object; empty if there is none.

    Read pair by pair: half a million tensors take 200 bytes each then, not 500. ValueError for what
    is no JSON, names a key twice or places a tensor in anything but a file.
    """
    found: dict[str, str] = {}
    seen: set[str] = set()
    at = _match(_OPEN, text, 0).end()
    step = _CLOSE.match(text, at)
    while step is None or step[0][-1] == ",":
        member = _match(_KEY, text, at)
        key, at = _text(member[1]), member.end()
        if key in seen:
            raise ValueError(f"the key {key[:200]!r} occurs twice")
        seen.add(key)
        if key == "weight_map" and text.startswith("{", at):
            found, at = _pairs(text, at + 1)
        else:
            _, at = json.JSONDecoder().raw_decode(text, at)
        step = _match(_NEXT, text, at)
        at = step.end()
    _match(_END, text, step.end())
    return found


def _pairs(text: str, at: int) -> tuple[dict[str, str], int]:
    """The tensors and files of an object whose brace stands before `at`, and where it ends."""
    found: dict[str, str] = {}
    files: dict[str, str] = {}
    step = _CLOSE.match(text, at)
    while step is None or step[0][-1] == ",":
        step = _PAIR.match(text, at)
        if step is None:
            tensor = _text(_match(_KEY, text, at)[1])
            raise ValueError(f"weight_map places {tensor[:200]!r} in no file")
        tensor, file = _text(step[1]), _text(step[2])
        if tensor in found:
            raise ValueError(f"the key {tensor[:200]!r} occurs twice")
        found[tensor] = files.setdefault(file, file)
        at = step.end()
    return found, step.end()


def _match(pattern: re.Pattern[str], text: str, at: int) -> re.Match[str]:
    found = pattern.match(text, at)
    if found is None:
        raise ValueError(f"it goes wrong at character {at}")
    return found


def _text(literal: str) -> str:
    return str(json.loads(f'"{literal}"')) if "\\" in literal else literal


def _indexed(weight_map: dict[str, str], where: str) -> dict[str, set[str]]:
    if not weight_map:
        raise SourceError("holds no weight_map", where=where, hint=_REPAIR)
    shards: dict[str, set[str]] = {}
    for tensor, file in weight_map.items():
        if file not in shards:
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
    """Refuse a shard that lacks tensors of the index or holds others; `expected` is used up."""
    present = {ref.name for ref in refs}
    if present == expected:
        expected.clear()  # the shard's own names stay, and these are as many again
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
    """Put a shard's tensors into the checkpoint's.

    Refuses a name that another shard has, and more than `MAX_TENSORS`.
    """
    for ref in refs:
        other = tensors.setdefault(ref.name, ref)
        if other is not ref:
            raise SourceError(
                f"is also in {other.file}",
                where=f"{ref.file}: {ref.name}",
                hint="keep only the files of one checkpoint in the folder",
            )
    if len(tensors) > MAX_TENSORS:
        raise SourceError(
            f"the checkpoint has more than {MAX_TENSORS:,} tensors", where=ref.file, hint=_REPAIR
        )
