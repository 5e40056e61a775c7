"""`quantkit convert`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from quantkit.cli.options import (
    Rounding,
    cluster_options,
    default_threads,
    hub_options,
    importance_options,
    job_options,
    memory_option,
    mmproj_type,
    on_cluster,
    on_hub,
)


@click.command("convert")
@job_options
@hub_options
@click.option(
    "-o", "--output", required=True, type=click.Path(path_type=Path), help="Folder for the files."
)
@importance_options
@click.option(
    "-t", "--threads", type=click.IntRange(min=1), help="Worker threads; default: all cores."
)
@memory_option
@click.option(
    "--device", default="cpu", show_default=True, help="Where to encode: cpu, cuda, cuda:1, ..."
)
@cluster_options
@click.option(
    "--staging",
    metavar="URL",
    help="A store, such as s3://BUCKET/PREFIX, for workers on machines that do not share the "
    "output folder.",
)
@click.option("--restart", is_flag=True, help="Discard an unfinished run in the folder.")
@click.option("--force", is_flag=True, help="Replace finished files of the same names.")
@click.option(
    "--publish",
    "repo",
    metavar="OWNER/NAME",
    help="Send each shard to this repository on the Hub as soon as it is finished, and at the end "
    "what `quantkit publish` sends.",
)
@click.option("-q", "--quiet", is_flag=True, help="Print errors only.")
@click.option("--json", "as_json", is_flag=True, help="Print events as JSON lines on stdout.")
def convert_command(
    model: Any,
    recipe: str,
    rounding: Rounding | None,
    name: str | None,
    mmproj: str,
    max_shard_size: int,
    max_shard_tensors: int | None,
    output: Path,
    hub: dict[str, Any],
    importance: dict[str, Any],
    threads: int | None,
    memory: int | None,
    device: str,
    cluster: dict[str, Any],
    staging: str | None,
    restart: bool,
    force: bool,
    repo: str | None,
    quiet: bool,
    as_json: bool,
) -> None:
    """Convert MODEL into GGUF files: a checkpoint's folder, or a GGUF file of any architecture.

    MODEL may be on the Hugging Face Hub: OWNER/NAME, OWNER/NAME@REVISION, or OWNER/NAME/FILE.gguf,
    each also after hf://. Weights are then streamed, with at most --spool of them on disk.

    A recipe below 3.5 bits wants importance statistics: name an imatrix, or the model is calibrated
    first. Files get their final names when all of them are complete. An interrupted run leaves
    `.partial` files; the same command continues it and ends in the same bytes.

    Of a GGUF shard set, name any shard. Its metadata is kept. Its tokenizer is not read, so it runs
    only on tokens that `quantkit calibrate` saved.
    """
    from quantkit.cli.console import reporter
    from quantkit.pipeline import Job, Output, convert
    from quantkit.plan.build import Limits

    view = reporter(quiet=quiet, as_json=as_json)
    limits = Limits(max_shard_size, max_shard_tensors)
    n_threads = threads or default_threads()
    if staging is not None and cluster["executor"] == "threads":
        raise click.UsageError("--staging goes with --executor ray.")
    with (
        on_cluster(cluster, threads, device, view) as workers,
        on_hub(hub, view, output, restart=restart) as session,
        _writers(repo, view) as writers,
    ):
        out = Output(output, n_threads, restart, force, device, writers, memory, workers, staging)
        vision = mmproj_type(mmproj)
        job = Job(session.at(model), recipe, limits, name, vision, rounding=rounding, **importance)
        done = convert(job, out, view)
    if repo is not None:
        from quantkit.pipeline.publication import Publication, publish

        publish(Publication(output, repo, n_threads=n_threads), view)
    if not quiet and not as_json:
        _tell(done, output)


@contextmanager
def _writers(repo: str | None, view: Any) -> Iterator[Any]:
    """What opens the files; with a repository, something that sends them there as well."""
    from quantkit.write.writer import ShardWriter

    if repo is None:
        yield ShardWriter
        return
    from quantkit.pipeline.publication import Pusher
    from quantkit.publish.remote import show_bars

    show_bars(False)  # there is one of the conversion
    with Pusher(repo, view) as pusher:
        yield pusher.writer


def _tell(done: Any, output: Path) -> None:
    for plan in done.plans:
        for shard in plan.shards:
            click.echo(output / shard.file)
    text = done.plans[-1]
    if text.arch == "clip":
        click.echo(f"\nrun it:  llama-server -m MODEL.gguf --mmproj {output / text.shards[0].file}")
        return
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
