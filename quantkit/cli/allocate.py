"""`quantkit allocate`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import click

from quantkit.cli.options import (
    MODEL,
    default_threads,
    hub_options,
    on_hub,
    running_options,
)


@click.command("allocate")
@click.argument("model", type=MODEL)
@click.option("--target-size", metavar="SIZE", help="Bytes of all files: 240GB, 223.5GiB, 7000000.")
@click.option("--target-bpw", metavar="BITS", help="Bits per weight, on average over the tensors.")
@click.option("--fit", metavar="SIZE+SIZE", help="Memories: VRAM, RAM or both, as 24GB+256GB.")
@click.option(
    "-c",
    "--ctx",
    "n_ctx",
    type=click.IntRange(min=1),
    help="Context that --fit leaves room for; default: 98304, or what the model allows.",
)
@click.option(
    "-o",
    "--output",
    required=True,
    type=click.Path(path_type=Path, dir_okay=False),
    help="The recipe, a .yaml file; what was measured is kept beside it.",
)
@click.option(
    "--floor",
    "floors",
    multiple=True,
    metavar="ROLE>=TYPE",
    help='Fewest bits of a role, such as "attention.*>=Q5_K"; may be repeated.',
)
@click.option("--types", metavar="TYPE,...", help="Types to choose from; default: all that run.")
@click.option(
    "--rounding",
    type=click.Choice(["feedback", "nearest"]),
    default="feedback",
    show_default=True,
    help="How the recipe will round; errors are measured with it.",
)
@click.option(
    "--corpus",
    metavar="NAME|FILE",
    default="core",
    show_default=True,
    help="Text to measure on.",
)
@click.option(
    "--calibration-tokens",
    "n_tokens",
    type=click.IntRange(min=4),
    default=16_384,
    show_default=True,
    help="How much of it.",
)
@click.option(
    "--curve",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Draw what every size costs at least, shipped recipes beside it: .html or .svg.",
)
@running_options
@hub_options
@click.option("-q", "--quiet", is_flag=True, help="Print errors only.")
@click.option("--json", "as_json", is_flag=True, help="Print events as JSON lines on stdout.")
def allocate_command(
    model: Any,
    target_size: str | None,
    target_bpw: str | None,
    fit: str | None,
    n_ctx: int | None,
    output: Path,
    floors: tuple[str, ...],
    types: str | None,
    rounding: Literal["feedback", "nearest"],
    corpus: str,
    n_tokens: int,
    curve: Path | None,
    running: dict[str, Any],
    hub: dict[str, Any],
    threads: int | None,
    quiet: bool,
    as_json: bool,
) -> None:
    """Find the recipe for MODEL that loses least at a size, and write it.

    What errors in each tensor do to the model's output is measured once, in one sweep through its
    layers, and used again for other sizes. The recipe is text to read, edit and convert with.
    """
    from quantkit.allocate.choices import parse_floor
    from quantkit.cli.console import reporter
    from quantkit.cli.options import use_threads
    from quantkit.pipeline.allocation import Goal, Question, allocate, parse_types
    from quantkit.pipeline.curve import draw

    goal = Goal(target_size, target_bpw, fit, n_ctx)
    allowed = parse_types(types) if types is not None else None
    lows = tuple(parse_floor(text) for text in floors)
    n_threads = threads or default_threads()
    use_threads(n_threads)
    from quantkit.pipeline.opening import Reading, Running

    reading, how = Reading(corpus, n_tokens), Running(**running)
    view = reporter(quiet=quiet, as_json=as_json)
    with on_hub(hub, view, output.parent) as session:
        place = session.at(model)
        question = Question(place, reading, how, rounding, allowed, lows, n_threads)
        answer = allocate(question, goal, output, view, with_curve=curve is not None)
        if curve is not None:
            draw(answer, (place.resolve() if isinstance(place, Path) else place).name, curve)
    if not quiet and not as_json:
        _tell(answer, output)


def _tell(answer: Any, output: Path) -> None:
    from quantkit.run.events import size

    click.echo(f"{'role':24}{'size':>10}{'of KLD':>8}  types")
    for row in answer.rows:
        types = ", ".join(f"{n} {name}" for name, n in row.types.items())
        click.echo(f"{row.role:24}{size(row.n_bytes):>10}{row.share:8.1%}  {types}")
    short = answer.budget - answer.n_bytes
    click.echo(
        f"\n{output}: {answer.n_bytes:,} bytes, {short:,} below the target; {answer.bpw:.3f} bpw; "
        f"predicted KLD {answer.kld:.4g}"
    )
