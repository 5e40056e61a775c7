"""`quantkit calibrate`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from quantkit.cli.options import (
    MODEL,
    cluster_options,
    default_threads,
    hub_options,
    on_cluster,
    on_hub,
    reading_options,
    running_options,
)


@click.command("calibrate")
@click.argument("model", type=MODEL)
@reading_options(default="core")
@click.option(
    "-o",
    "--output",
    required=True,
    type=click.Path(path_type=Path, dir_okay=False),
    help="The imatrix, a .gguf file; the tokens are kept beside it.",
)
@running_options
@cluster_options
@hub_options
@click.option("--force", is_flag=True, help="Replace an imatrix of the same name.")
@click.option("-q", "--quiet", is_flag=True, help="Print errors only.")
@click.option("--json", "as_json", is_flag=True, help="Print events as JSON lines on stdout.")
def calibrate_command(
    model: Any,
    output: Path,
    reading: dict[str, Any],
    running: dict[str, Any],
    cluster: dict[str, Any],
    hub: dict[str, Any],
    threads: int | None,
    force: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Measure which weights of MODEL matter, and write an imatrix.

    MODEL is a checkpoint's folder (or a GGUF file, with tokens saved before). It is streamed layer
    by layer and expert by expert, so memory does not depend on its size. llama-quantize reads the
    result as well. An interrupted run continues with the last whole layer. With --executor ray the
    text is shared among workers, to the same bytes; they need MODEL and the output folder under
    the same paths.
    """
    from quantkit.cli.console import reporter
    from quantkit.cli.options import use_threads
    from quantkit.pipeline.calibration import Calibration, calibrate
    from quantkit.pipeline.opening import Reading, Running
    from quantkit.pipeline.spread import spread_over

    use_threads(threads or default_threads())
    view = reporter(quiet=quiet, as_json=as_json)
    how = Running(**running)
    with (
        on_cluster(cluster, threads, str(how.compute().device), view) as workers,
        on_hub(hub, view, output.parent) as session,
    ):
        job = Calibration(session.at(model), Reading(**reading), how)
        spread = spread_over(workers, view) if workers else None
        calibrate(job, output, view, force=force, spread=spread)
