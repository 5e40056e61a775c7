"""`quantkit inspect`: what a GGUF file, or the shard set it belongs to, says about itself."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import chain
from math import isfinite
from typing import Any

import click

from quantkit.cli.options import MODEL, hub_options, on_hub
from quantkit.container.names import escaped, shown
from quantkit.container.reader import read_gguf
from quantkit.container.shardset import ShardSet, survey
from quantkit.hub.folder import HubFolder
from quantkit.run.events import Silent, size
from quantkit.types import Kv, KvType

_SHOWN_ITEMS = 6
_WIDEST = 64  # a column is not padded further
_PIECE = 1 << 16
_ITEMS = 1 << 10
_LAYER = re.compile(r"^(v\.|mm\.)?blk\.\d+\.")


@click.command("inspect")
@click.argument("file", type=MODEL)
@hub_options
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option("--kv-only", is_flag=True, help="Print the metadata only.")
@click.option("--tensors-only", is_flag=True, help="Print the tensors only.")
@click.option("--full", is_flag=True, help="Print long texts and arrays whole.")
def inspect_command(
    file: Any,
    hub: dict[str, Any],
    as_json: bool,
    kv_only: bool,
    tensors_only: bool,
    full: bool,
) -> None:
    """Show metadata, types and tensors of a GGUF FILE, with its sibling shards.

    FILE may be on the Hub: OWNER/NAME[@REVISION]/FILE.gguf. Only headers are read. Whether a set is
    complete and undamaged is what `verify` tells.
    """
    if kv_only and tensors_only:
        raise click.UsageError("--kv-only and --tensors-only exclude each other")
    with on_hub(hub, Silent()) as session:
        place = session.at(file)
        if isinstance(place, HubFolder):
            place = place.only_gguf()
        read_gguf(place)  # an unreadable FILE is an error, an unreadable sibling a remark
        shards, problems = survey(place)
    parts = ("kvs",) if kv_only else ("tensors",) if tensors_only else ("general", "kvs", "tensors")
    if as_json:
        # Piece by piece: the text of it all can be six times as large as what it says.
        encoder = json.JSONEncoder(indent=1, allow_nan=False)
        _echo(encoder.iterencode(_as_json(shards, parts, full)))
    else:
        _print(shards, parts, full)
    for problem in problems:
        click.echo(f"note: {problem}", err=True)


def _as_json(shards: ShardSet, parts: Iterable[str], full: bool) -> dict[str, Any]:
    everything = {
        "general": _general(shards),
        "kvs": {
            key: {"type": kv.type.name}
            | ({"item": kv.item.name, "count": len(kv.value)} if kv.item is not None else {})
            | {"value": _plain(kv.value if full else _cut(kv))}
            for key, kv in _kvs(shards).items()
        },
        "tensors": [
            {
                "name": tensor.name,
                "type": tensor.type.name,
                "ne": tensor.shape[::-1],
                "begin": tensor.begin,
                "n_bytes": tensor.n_bytes,
                "file": file.path.name,
            }
            for file, tensor in shards.tensors()
        ],
    }
    return {part: everything[part] for part in parts}


def _general(shards: ShardSet) -> dict[str, Any]:
    n_weights = sum(tensor.n_weights for _, tensor in shards.tensors())
    n_bytes = sum(tensor.n_bytes for _, tensor in shards.tensors())
    named = {
        what: kv.value
        for what in ("architecture", "name", "size_label")
        if (kv := shards.kvs.get(f"general.{what}")) and kv.type is KvType.STRING
    }
    return named | {
        "files": [file.path.name for file in shards.files],
        "n_bytes": shards.n_bytes,
        "n_tensors": shards.n_tensors,
        "n_weights": n_weights,
        "bpw": round(8 * n_bytes / n_weights, 4) if n_weights else None,
        "gguf_version": shards.files[0].version,
        "alignment": shards.files[0].alignment,
    }


def _kvs(shards: ShardSet) -> dict[str, Kv]:
    return shards.files[0].kvs


def _cut(kv: Kv) -> Any:
    if kv.type is KvType.STRING:
        return shown(kv.value)
    if kv.type is not KvType.ARRAY:
        return kv.value
    items = kv.value[:_SHOWN_ITEMS]
    return [shown(item) for item in items] if kv.item is KvType.STRING else items


def _plain(value: Any) -> Any:
    # JSON has no NaN and no infinity.
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, float) and not isfinite(value) else value


def _echo(parts: Iterable[str]) -> None:
    """Print a line that comes in parts, many or long ones, without holding it as a whole."""
    held: list[str] = []
    n_chars = 0
    for part in parts:
        if n_chars + len(part) > _PIECE:
            click.echo("".join(held), nl=False)
            held, n_chars = [], 0
        if len(part) <= _PIECE:
            held.append(part)
            n_chars += len(part)
            continue
        for begin in range(0, len(part), _PIECE):
            click.echo(part[begin : begin + _PIECE], nl=False)
    click.echo("".join(held))


def _print(shards: ShardSet, parts: Iterable[str], full: bool) -> None:
    show = {"general": _print_general, "kvs": _print_kvs, "tensors": _print_tensors}
    for part in parts:
        show[part](shards, full)


def _print_general(shards: ShardSet, _full: bool) -> None:
    facts = _general(shards)
    files = facts.pop("files")
    facts["n_files"] = len(files)
    facts["n_bytes"] = f"{facts['n_bytes']:,} ({size(facts['n_bytes'])})"
    facts["n_weights"] = f"{facts['n_weights']:,}"
    _table([(what, escaped(str(value))) for what, value in facts.items()])


def _print_kvs(shards: ShardSet, full: bool) -> None:
    heads = [(shown(key), _type(kv)) for key, kv in _kvs(shards).items()]
    widths = _widths([("key", "type"), *heads])
    click.echo(f"\n{'key':{widths[0]}}  {'type':{widths[1]}}  value")
    for (key, type_), kv in zip(heads, _kvs(shards).values(), strict=True):
        _echo(chain([f"{key:{widths[0]}}  {type_:{widths[1]}}  "], _value(kv, full)))


def _type(kv: Kv) -> str:
    return kv.type.name if kv.item is None else f"{kv.item.name}[{len(kv.value)}]"


def _value(kv: Kv, full: bool) -> Iterator[str]:
    cut = kv.value if full else _cut(kv)
    if kv.item is None:
        yield escaped(_text(kv.type, cut))
        return
    told = repr if kv.item is KvType.STRING else partial(_text, kv.item)
    for begin in range(0, len(cut), _ITEMS):
        yield ", " if begin else "["
        yield escaped(", ".join(map(told, cut[begin : begin + _ITEMS])))
    yield ("" if cut else "[") + (", …]" if len(cut) < len(kv.value) else "]")


def _text(type_: KvType, value: Any) -> str:
    # Seven digits are what an f32 holds.
    return f"{value:.7g}" if type_ is KvType.F32 else str(value)


def _print_tensors(shards: ShardSet, _full: bool) -> None:
    counts: Counter[tuple[str, str]] = Counter()
    weights: Counter[tuple[str, str]] = Counter()
    sizes: Counter[tuple[str, str]] = Counter()
    for _, tensor in shards.tensors():
        kind = _LAYER.sub(r"\1", tensor.name).removesuffix(".weight"), tensor.type.name
        counts[kind] += 1
        weights[kind] += tensor.n_weights
        sizes[kind] += tensor.n_bytes
    kinds = (
        (shown(kind[0]), kind[1], str(n), size(sizes[kind]), _bpw(sizes[kind], weights[kind]))
        for kind, n in sorted(counts.items())
    )
    _table([("role", "type", "tensors", "size", "bpw"), *kinds], right=(2, 3, 4))
    number = {file.path: str(no) for no, file in enumerate(shards.files, start=1)}
    tensors = (
        (shown(t.name), t.type.name, _ne(t.shape), f"{t.n_bytes:,}", number[file.path])
        for file, t in shards.tensors()
    )
    _table([("tensor", "type", "ne", "bytes", "file"), *tensors], right=(3, 4))


def _table(rows: list[tuple[str, ...]], right: tuple[int, ...] = ()) -> None:
    """Columns as wide as their widest cell, up to a point; a terminal folds what is longer."""
    widths = _widths(rows)
    click.echo()
    for row in rows:
        cells = (
            cell.rjust(width) if at in right else cell.ljust(width)
            for at, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        click.echo("  ".join(cells).rstrip())


def _widths(rows: list[tuple[str, ...]]) -> list[int]:
    return [min(_WIDEST, max(map(len, column))) for column in zip(*rows, strict=True)]


def _ne(shape: tuple[int, ...]) -> str:
    return " × ".join(map(str, shape[::-1]))


def _bpw(n_bytes: int, n_weights: int) -> str:
    return f"{8 * n_bytes / n_weights:.3f}"
