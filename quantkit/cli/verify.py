"""`quantkit verify`: is a shard set complete, undamaged and finite.

numpy, pydantic and rich are imported where they are used, so that `--help` does not wait for them.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from quantkit.write.verify import VerifyReport


@click.command("verify")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--quick", is_flag=True, help="Compare sizes and headers, do not read the data.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option("--threads", default=2, show_default=True, type=click.IntRange(1, 256))
def verify_command(file: Path, quick: bool, as_json: bool, threads: int) -> None:
    """Check the GGUF FILE and the shards that belong to it, against their manifest if there is one.

    Prints one problem a line. Exit code 0: sound; 6: damaged or inconsistent; 7: nothing damaged,
    but weights or scales hold NaN or infinity.
    """
    report = _run(file, quick, threads)
    if as_json:
        click.echo(json.dumps(_as_json(report), indent=1))
    else:
        for problem in report.problems:
            click.echo(str(problem).replace("\n", " "))
        click.echo(_summary(report))
    sys.exit(report.exit_code)


def _run(file: Path, quick: bool, threads: int) -> VerifyReport:
    from quantkit.write.verify import verify  # noqa: PLC0415

    if quick or not sys.stderr.isatty():
        return verify(file, deep=not quick, threads=threads)

    from rich.console import Console  # noqa: PLC0415
    from rich.progress import BarColumn, DownloadColumn, Progress  # noqa: PLC0415

    from quantkit.container.shardset import survey  # noqa: PLC0415

    shards, _ = survey(file)
    total = sum(tensor.n_bytes for _, tensor in shards.tensors())
    columns = (BarColumn(), DownloadColumn(binary_units=True))
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task("verify", total=total)
        return verify(file, threads=threads, on_bytes=lambda n: progress.advance(bar, n))


def _as_json(report: VerifyReport) -> dict[str, object]:
    return {
        "ok": report.ok,
        "exit_code": report.exit_code,
        "deep": report.deep,
        "manifest": str(report.manifest) if report.manifest else None,
        "n_files": len(report.shards.files),
        "n_tensors": report.shards.n_tensors,
        "n_bytes": report.shards.n_bytes,
        "problems": [
            {"kind": type(p).__name__, "where": p.where, "message": p.message, "hint": p.hint}
            for p in report.problems
        ],
    }


def _summary(report: VerifyReport) -> str:
    shards = report.shards
    seen = f"{len(shards.files)} files, {shards.n_tensors} tensors, {shards.n_bytes:,} bytes"
    if not report.ok:
        return f"{len(report.problems)} problems in {seen}"
    if report.manifest is None:
        return f"ok: {seen}; no manifest, so only structure and finiteness were checked"
    return f"ok: {seen}; {'all digests' if report.deep else 'sizes and headers'} match"
