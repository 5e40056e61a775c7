"""`quantkit inspect`: what a GGUF file, or the shard set it belongs to, says about itself.

rich is imported where a table is made, so that `--help` does not wait for it.
"""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from collections.abc import Iterable
from math import isfinite
from typing import TYPE_CHECKING, Any

import click

from quantkit.cli.options import MODEL, hub_options, on_hub
from quantkit.container.names import escaped, shown
from quantkit.container.reader import read_gguf
from quantkit.container.shardset import ShardSet, survey
from quantkit.hub.folder import HubFolder
from quantkit.run.events import Silent, size
from quantkit.types import Kv, KvType

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

_SHOWN_ITEMS = 6
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
        click.echo(json.dumps(_as_json(shards, parts, full), indent=1, allow_nan=False))
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


def _print(shards: ShardSet, parts: Iterable[str], full: bool) -> None:
    from rich.console import Console

    # In a pipe nothing is cut to a terminal's width.
    console = Console(width=None if sys.stdout.isatty() else 10_000, highlight=False)
    show = {"general": _print_general, "kvs": _print_kvs, "tensors": _print_tensors}
    for part in parts:
        show[part](console, shards, full)


def _print_general(console: Console, shards: ShardSet, _full: bool) -> None:
    facts = _general(shards)
    files = facts.pop("files")
    facts["n_files"] = len(files)
    facts["n_bytes"] = f"{facts['n_bytes']:,} ({size(facts['n_bytes'])})"
    facts["n_weights"] = f"{facts['n_weights']:,}"
    table = _table(("", "left"), ("", "left"))
    table.show_header = False
    _fill(table, ((what, escaped(str(value))) for what, value in facts.items()))
    console.print(table)


def _print_kvs(console: Console, shards: ShardSet, full: bool) -> None:
    table = _table(("key", "left"), ("type", "left"), ("value", "left"))
    rows = ((shown(key), *_kv_cells(kv, full)) for key, kv in _kvs(shards).items())
    _fill(table, rows)
    console.print(table)


def _kv_cells(kv: Kv, full: bool) -> tuple[str, str]:
    cut = kv.value if full else _cut(kv)
    if kv.item is None:
        return kv.type.name, escaped(_text(kv.type, cut))
    items = [repr(x) if kv.item is KvType.STRING else _text(kv.item, x) for x in cut]
    more = ["…"] if len(cut) < len(kv.value) else []
    return f"{kv.item.name}[{len(kv.value)}]", f"[{escaped(', '.join(items + more))}]"


def _text(type_: KvType, value: Any) -> str:
    # Seven digits are what an f32 holds.
    return f"{value:.7g}" if type_ is KvType.F32 else str(value)


def _print_tensors(console: Console, shards: ShardSet, _full: bool) -> None:
    counts: Counter[tuple[str, str]] = Counter()
    weights: Counter[tuple[str, str]] = Counter()
    sizes: Counter[tuple[str, str]] = Counter()
    for _, tensor in shards.tensors():
        kind = _LAYER.sub(r"\1", tensor.name).removesuffix(".weight"), tensor.type.name
        counts[kind] += 1
        weights[kind] += tensor.n_weights
        sizes[kind] += tensor.n_bytes
    right = "right"
    table = _table(
        ("role", "left"), ("type", "left"), ("tensors", right), ("size", right), ("bpw", right)
    )
    _fill(
        table,
        (
            (shown(kind[0]), kind[1], str(n), size(sizes[kind]), _bpw(sizes[kind], weights[kind]))
            for kind, n in sorted(counts.items())
        ),
    )
    console.print(table)

    table = _table(
        ("tensor", "left"), ("type", "left"), ("ne", "left"), ("bytes", right), ("file", right)
    )
    number = {file.path: str(no) for no, file in enumerate(shards.files, start=1)}
    _fill(
        table,
        (
            (shown(t.name), t.type.name, _ne(t.shape), f"{t.n_bytes:,}", number[file.path])
            for file, t in shards.tensors()
        ),
    )
    console.print(table)


def _table(*columns: tuple[str, Any]) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE, pad_edge=False)
    for name, justify in columns:
        table.add_column(name, justify=justify, overflow="fold")
    return table


def _fill(table: Table, rows: Iterable[tuple[str, ...]]) -> None:
    from rich.text import Text

    for row in rows:
        table.add_row(*(Text(cell) for cell in row))  # Text: names are no markup


def _ne(shape: tuple[int, ...]) -> str:
    return " × ".join(map(str, shape[::-1]))


def _bpw(n_bytes: int, n_weights: int) -> str:
    return f"{8 * n_bytes / n_weights:.3f}"
