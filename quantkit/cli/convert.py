"""`quantkit convert`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from quantkit.cli.options import (
    Rounding,
    default_threads,
    importance_options,
    job_options,
    mmproj_type,
)


@click.command("convert")
@job_options
@click.option(
    "-o", "--output", required=True, type=click.Path(path_type=Path), help="Folder for the files."
)
@importance_options
@click.option(
    "-t", "--threads", type=click.IntRange(min=1), help="Worker threads; default: all cores."
)
@click.option(
    "--device", default="cpu", show_default=True, help="Where to encode: cpu, cuda, cuda:1, ..."
)
@click.option("--restart", is_flag=True, help="Discard an unfinished run in the folder.")
@click.option("--force", is_flag=True, help="Replace finished files of the same names.")
@click.option("-q", "--quiet", is_flag=True, help="Print errors only.")
@click.option("--json", "as_json", is_flag=True, help="Print events as JSON lines on stdout.")
def convert_command(
    model: Path,
    recipe: str,
    rounding: Rounding | None,
    name: str | None,
    mmproj: str,
    max_shard_size: int,
    max_shard_tensors: int | None,
    output: Path,
    importance: dict[str, Any],
    threads: int | None,
    device: str,
    restart: bool,
    force: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Convert the checkpoint in folder MODEL into GGUF files.

    A recipe below 3.5 bits wants importance statistics: name an imatrix, or the model is calibrated
    first. Files get their final names when all of them are complete. An interrupted run leaves
    `.partial` files; the same command continues it and ends in the same bytes.
    """
    from quantkit.cli.console import reporter
    from quantkit.pipeline import Job, Output, convert
    from quantkit.plan.build import Limits

    view = reporter(quiet=quiet, as_json=as_json)
    limits = Limits(max_shard_size, max_shard_tensors)
    job = Job(model, recipe, limits, name, mmproj_type(mmproj), rounding=rounding, **importance)
    done = convert(job, Output(output, threads or default_threads(), restart, force, device), view)
    if not quiet and not as_json:
        _tell(done, output)


def _tell(done: Any, output: Path) -> None:
    for plan in done.plans:
        for shard in plan.shards:
            click.echo(output / shard.file)
    text = done.plans[-1]
    click.echo(f"\nrun it:  llama-server -m {output / text.shards[0].file} --jinja", nl=False)
    if len(done.plans) > 1:
        click.echo(f" --mmproj {output / done.plans[0].shards[0].file}", nl=False)
    click.echo("".join(f" {item.flag}" for item in done.advice))
    for item in done.advice:
        click.echo(f"         {item.flag}: {item.reason}")
    instant = done.recipe.sampling.instant
    if instant:
        flags = " ".join(f"--{key.replace('_', '-')} {value:g}" for key, value in instant.items())
        click.echo(f"         with thinking off: {flags}")
