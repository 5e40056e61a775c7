"""`quantkit verify`: is a shard set complete, undamaged and finite.

numpy, pydantic and rich are imported where they are used, so that `--help` does not wait for them.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from quantkit.cli.console import reporter
from quantkit.cli.options import default_threads
from quantkit.run.events import Silent, files, size

if TYPE_CHECKING:
    from quantkit.write.verify import VerifyReport


@click.command("verify")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--quick", is_flag=True, help="Compare sizes and headers, do not read the data.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option(
    "--threads", type=click.IntRange(1, 256), default=default_threads, help="Default: all cores."
)
def verify_command(file: Path, quick: bool, as_json: bool, threads: int) -> None:
    """Check the GGUF FILE and the shards that belong to it, against their manifest if there is one.

    Prints one problem a line. Exit code 0: sound; 6: damaged or inconsistent; 7: nothing damaged,
    but weights or scales hold NaN or infinity.
    """
    report = _run(file, quick, as_json, threads)
    if as_json:
        click.echo(json.dumps(_as_json(report), indent=1))
    else:
        for problem in report.problems:
            click.echo(str(problem).replace("\n", " "))
        click.echo(_summary(report))
    sys.exit(report.exit_code)


def _run(file: Path, quick: bool, quiet: bool, threads: int) -> VerifyReport:
    from quantkit.write.verify import verify

    view = Silent() if quick or quiet else reporter(quiet=False, as_json=False)
    try:
        return verify(
            file,
            deep=not quick,
            threads=threads,
            on_begin=lambda n_bytes: view.begin("verify", n_bytes, 0),
            on_bytes=view.advance,
        )
    finally:
        view.end()


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
    seen = f"{files(len(shards.files))}, {shards.n_tensors:,} tensors, {size(shards.n_bytes)}"
    if not report.ok:
        n = len(report.problems)
        return f"{n:,} problem{'s' if n != 1 else ''} in {seen}"
    if report.manifest is None:
        depth = "structure and finiteness were" if report.deep else "structure was"
        return f"ok: {seen}; no manifest, so only {depth} checked"
    return f"ok: {seen}; {'all digests' if report.deep else 'sizes and headers'} match"
