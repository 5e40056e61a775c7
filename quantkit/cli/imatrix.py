"""`quantkit imatrix`: merge, show, convert and fill importance statistics."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from quantkit.container.names import escaped, shown

if TYPE_CHECKING:
    from quantkit.calibrate.statistics import Statistics

F = TypeVar("F", bound=Callable[..., Any])

_KAPPA = 64.0  # coverage.KAPPA; importing that would make --help wait for numpy
_FILE = click.Path(path_type=Path)


def _common(command: F) -> F:
    return click.option(
        "--dat-chunk-size",
        type=click.IntRange(min=1),
        default=512,
        show_default=True,
        help="Tokens per chunk of a .dat file, which does not say.",
    )(command)


def _out(command: F) -> F:
    return click.option(
        "-o",
        "--out",
        type=_FILE,
        required=True,
        help="File to write: GGUF, or the legacy form where the name ends in .dat.",
    )(command)


def _kappa(command: F) -> F:
    return click.option(
        "--kappa",
        type=click.FloatRange(min=0),
        default=_KAPPA,
        show_default=True,
        help="Tokens at which an expert's own mean weighs as much as what it is blended with.",
    )(command)


@click.group("imatrix")
def imatrix_command() -> None:
    """Importance statistics (imatrix): merge, show, convert, fill.

    Files are those of llama-imatrix or quantkit, GGUF or legacy .dat.

    Exit codes: 0 done, 2 wrong use, 5 cannot write, 6 a damaged file or statistics of different
    models, 7 NaN or infinity in a file.
    """


@imatrix_command.command("merge")
@click.argument("files", type=_FILE, nargs=-1, required=True)
@_out
@_common
def merge_command(files: tuple[Path, ...], out: Path, dat_chunk_size: int) -> None:
    """Add up the sums and counts of FILES, as if their texts had been read in one run."""
    from quantkit.calibrate.imatrix import read_imatrix
    from quantkit.calibrate.statistics import merged

    _write(out, merged([read_imatrix(file, dat_chunk_size=dat_chunk_size) for file in files]))


@imatrix_command.command("convert")
@click.argument("file", type=_FILE)
@_out
@_common
def convert_command(file: Path, out: Path, dat_chunk_size: int) -> None:
    """Write FILE in the other form. A .dat file has no counts, so they are lost or made up."""
    from quantkit.calibrate.imatrix import read_imatrix

    _write(out, read_imatrix(file, dat_chunk_size=dat_chunk_size))


@imatrix_command.command("fill")
@click.argument("file", type=_FILE)
@_out
@_kappa
@_common
def fill_command(file: Path, out: Path, kappa: float, dat_chunk_size: int) -> None:
    """Blend what seldom routed experts saw with what is better known, for llama-quantize.

    llama-quantize takes ones for an expert without tokens, and a mean over five tokens at its word.
    """
    from quantkit.calibrate.coverage import FILLED, filled, undivided
    from quantkit.calibrate.imatrix import read_imatrix
    from quantkit.errors import UsageError

    statistics = read_imatrix(file, dat_chunk_size=dat_chunk_size)
    if FILLED in statistics.kvs:
        raise UsageError("it is filled already", where=escaped(str(file)))
    for name in undivided(statistics):
        click.echo(f"note: {shown(name)} tells nothing of single experts: left as it is", err=True)
    made, missing = filled(statistics, kappa=kappa)
    for name in missing:
        click.echo(f"note: nothing is known of {shown(name)}: left out", err=True)
    _write(out, made)


@imatrix_command.command("show")
@click.argument("file", type=_FILE)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@_kappa
@_common
def show_command(file: Path, as_json: bool, kappa: float, dat_chunk_size: int) -> None:
    """Show what FILE holds: figures of every tensor and layer, and how experts are covered.

    The figures are those of `llama-imatrix --show-statistics`.
    """
    from quantkit.calibrate.coverage import coverage
    from quantkit.calibrate.imatrix import read_imatrix
    from quantkit.calibrate.statistics import figures, layer_figures

    statistics = read_imatrix(file, dat_chunk_size=dat_chunk_size)
    by_name = figures(statistics)
    everything: dict[str, Any] = {
        "file": str(file),
        "n_tokens": statistics.n_tokens,
        "n_chunks": statistics.n_chunks,
        "chunk_size": statistics.chunk_size,
        "datasets": list(statistics.datasets),
        "metadata": {key: kv.value for key, kv in statistics.kvs.items()},
        "n_priors": len(statistics.priors),
        "tensors": {name: asdict(of) for name, of in by_name.items()},
        "layers": layer_figures(by_name),
    }
    covered = coverage(statistics, kappa=kappa)
    if as_json:
        everything["coverage"] = covered.as_json()
        click.echo(json.dumps(_plain(everything), indent=1, allow_nan=False))
        return
    facts = ("n_tokens", "n_chunks", "chunk_size", "datasets", "metadata", "n_priors")
    _table([(fact, shown(str(everything[fact]))) for fact in facts])
    _table(_tensor_rows(everything["tensors"]))
    _table(_layer_rows(everything["layers"]))
    if covered.layers:
        _table(covered.rows())
        click.echo(
            f"{covered.n_experts} experts: {covered.share_below(1):.2%} saw no token,"
            f" {covered.share_below(32):.2%} fewer than 32, {covered.share_below(256):.2%}"
            " fewer than 256"
        )
    for what, names in (("no token reached", covered.empty), ("undivided", covered.undivided)):
        if names:
            click.echo(f"{what}: {', '.join(map(shown, names))}")


def _write(out: Path, statistics: Statistics) -> None:
    from quantkit import __version__
    from quantkit.calibrate.dat import write_dat
    from quantkit.calibrate.imatrix import VERSION, write_imatrix
    from quantkit.container.kv import string

    if out.suffix == ".dat":
        for name in write_dat(out, statistics):
            click.echo(f"note: no token reached {shown(name)}: left out", err=True)
        if statistics.priors:
            click.echo("note: a .dat file has no place for the sums over all tokens", err=True)
        return
    write_imatrix(out, statistics, {VERSION: string(__version__)})


def _tensor_rows(tensors: dict[str, dict[str, Any]]) -> list[tuple[str, ...]]:
    head = ("tensor", "sum", "min", "max", "mean", "std", "active", "n", "bits", "of n", "zd")
    rows: list[tuple[str, ...]] = [(*head, "cosine")]
    for name, of in tensors.items():
        numbers = (f"{of[key]:.4g}" for key in ("total", "least", "most", "mean", "deviation"))
        rows.append(
            (
                shown(name),
                *numbers,
                f"{of['active']:.2%}",
                f"{of['n_values']}",
                f"{of['entropy']:.3f}",
                f"{of['entropy_share']:.2%}",
                f"{of['above_one_deviation']:.2%}",
                "-" if of["cosine"] is None else f"{of['cosine']:.4f}",
            )
        )
    return rows


def _layer_rows(layers: dict[int, dict[str, float]]) -> list[tuple[str, ...]]:
    head = ("layer", "sum", "zd", "cosine")
    rows = (
        (str(at), f"{of['total']:.4g}", f"{of['above_one_deviation']:.2%}", f"{of['cosine']:.4f}")
        for at, of in layers.items()
    )
    return [head, *rows]


def _table(rows: Sequence[tuple[str, ...]]) -> None:
    """Columns as wide as their widest cell; the first and the last one flush left."""
    last = len(rows[0]) - 1
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = (
            cell.ljust(width) if at in (0, last) else cell.rjust(width)
            for at, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        click.echo("  ".join(cells).rstrip())
    click.echo()


def _plain(value: Any) -> Any:
    """The value without NaN and infinity, which metadata may hold and JSON may not."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, float) and not isfinite(value) else value
