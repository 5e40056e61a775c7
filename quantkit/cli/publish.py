"""`quantkit publish`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from quantkit.cli.options import default_threads

if TYPE_CHECKING:
    from quantkit.pipeline.publication import Done


def _no_token(context: click.Context, parameter: click.Parameter, value: Any) -> None:
    if value is not None:
        raise click.UsageError(
            "A token on the command line can be read by every user of the machine: set HF_TOKEN, "
            "or log in with `hf auth login`."
        )


@click.command("publish")
@click.argument("folder", metavar="OUT", type=click.Path(path_type=Path))
@click.option("--repo", required=True, metavar="OWNER/NAME", help="The repository on the Hub.")
@click.option(
    "--base-model",
    "base",
    metavar="OWNER/NAME",
    help="The model that was converted; default: what the conversion has recorded.",
)
@click.option(
    "--report",
    "reports",
    multiple=True,
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="A report.json of `quantkit evaluate`; those in OUT are found.",
)
@click.option("--public", is_flag=True, help="Make a new repository public; default: private.")
@click.option("--dry-run", is_flag=True, help="Show what would be sent, and send nothing.")
@click.option("--card-only", is_flag=True, help="Only README.md, picture and measurements.")
@click.option("--no-card", is_flag=True, help="All but README.md, picture and measurements.")
@click.option("--force", is_flag=True, help="Replace files that differ, and an edited card.")
@click.option(
    "-t", "--threads", type=click.IntRange(min=1), help="Threads that verify; default: all cores."
)
@click.option("--token", expose_value=False, callback=_no_token, hidden=True)
@click.option("-q", "--quiet", is_flag=True, help="Print errors only.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
def publish_command(
    folder: Path,
    repo: str,
    base: str | None,
    reports: tuple[Path, ...],
    public: bool,
    dry_run: bool,
    card_only: bool,
    no_card: bool,
    force: bool,
    threads: int | None,
    quiet: bool,
    as_json: bool,
) -> None:
    """Publish the models in folder OUT, and in the folders in it, on the Hugging Face Hub.

    A folder for each sharded quant, vision file and imatrix at the root, and a card: sizes and
    measurements, how to download and run, how it was made. Files are verified first, and compared
    with the Hub's digests afterwards. What is there already is not sent, so an interrupted run is
    continued by the same command; what differs there is not replaced. Text that you write into
    the card, above or below what is generated, stays.
    """
    from quantkit.cli.console import reporter
    from quantkit.pipeline.publication import Publication, publish
    from quantkit.publish.remote import show_bars

    if card_only and no_card:
        raise click.UsageError("--card-only and --no-card exclude each other.")
    show_bars(sys.stderr.isatty() and not (quiet or as_json))
    job = Publication(
        folder,
        repo,
        base,
        public,
        force,
        "only" if card_only else "without" if no_card else "with",
        reports,
        threads or default_threads(),
    )
    done = publish(job, reporter(quiet=quiet or as_json, as_json=False), dry_run=dry_run)
    if as_json:
        click.echo(json.dumps(_as_json(done, dry_run), indent=1))
    elif dry_run:
        _show(done)
    elif not quiet:
        from quantkit.hub.client import endpoint

        click.echo(f"{endpoint()}/{done.repo}")


def _show(done: Done) -> None:
    from quantkit.container.names import escaped
    from quantkit.run.events import size

    width = max(len(escaped(step.item.path)) for step in done.steps)
    batch = ""
    for step in done.steps:
        if step.item.batch != batch:
            batch = step.item.batch
            click.echo(f"commit: Add {escaped(batch)}")
        name = escaped(step.item.path).ljust(width)
        click.echo(f"  {name}  {size(step.item.n_bytes):>11}  {step.state.value}")
    kind = "private" if done.private else "public"
    there = "a new repository" if done.created else "the repository"
    click.echo(
        f"\n{size(done.n_to_send)} to send to {there} {done.repo} ({kind}); nothing was sent"
    )
    if any(step.state.value == "differs" for step in done.steps):
        click.echo("files that differ are replaced with --force only")


def _as_json(done: Done, dry_run: bool) -> dict[str, Any]:
    return {
        "repo": done.repo,
        "private": done.private,
        "new": done.created,
        "dry_run": dry_run,
        "head": done.head,
        "files": [
            {
                "path": step.item.path,
                "n_bytes": step.item.n_bytes,
                "sha256": step.item.sha256,
                "state": step.state.value,
                "commit": step.item.batch,
            }
            for step in done.steps
        ],
    }
