"""`quantkit plan`."""

from __future__ import annotations

import json
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import click

from quantkit.cli.options import (
    Rounding,
    default_threads,
    hub_options,
    job_options,
    memory_option,
    mmproj_type,
    on_hub,
)

if TYPE_CHECKING:
    from rich.console import Console

    from quantkit.pipeline import Planned
    from quantkit.types import Plan


@click.command("plan")
@job_options
@hub_options
@click.option(
    "-t", "--threads", type=click.IntRange(min=1), help="To plan memory for; default: all cores."
)
@memory_option
@click.option("--tensors", is_flag=True, help="List every tensor.")
@click.option("--json", "as_json", is_flag=True, help="Print the whole plan as JSON.")
def plan_command(
    model: Any,
    recipe: str,
    rounding: Rounding | None,
    name: str | None,
    mmproj: str,
    max_shard_size: int,
    max_shard_tensors: int | None,
    hub: dict[str, Any],
    threads: int | None,
    memory: int | None,
    tensors: bool,
    as_json: bool,
) -> None:
    """Show what converting MODEL, a checkpoint or a GGUF file, would write: types, files, sizes.

    Reads headers and metadata only, no weights. MODEL may be on the Hub: OWNER/NAME[@REVISION].
    """
    from quantkit.pipeline import Job, planned
    from quantkit.plan import report
    from quantkit.plan.build import Limits
    from quantkit.run.events import Silent, size

    limits = Limits(max_shard_size, max_shard_tensors)
    with ExitStack() as stack:
        session = stack.enter_context(on_hub(hub, Silent()))
        job = Job(session.at(model), recipe, limits, name, mmproj_type(mmproj), rounding=rounding)
        _, decided = stack.enter_context(planned(job, Silent()))
        n_threads = threads or default_threads()
        n_bytes = decided.memory(n_threads, memory).n_bytes
        if as_json:
            files = [report.as_json(plan) for plan in decided.plans]
            advice = [{"flag": item.flag, "reason": item.reason} for item in decided.advice]
            data = {
                "files": files,
                "advice": advice,
                "ignored": decided.ignored,
                "warnings": decided.warnings,
                "memory": {"n_bytes": n_bytes, "n_threads": n_threads},
            }
            click.echo(json.dumps(data, indent=1))
            return
        _show(decided, job.n_tokens(decided.recipe), with_tensors=tensors)
        click.echo(f"memory: {size(n_bytes)} for tiles on {n_threads} threads, beside the program")


def _show(decided: Planned, n_tokens: int, *, with_tensors: bool) -> None:
    from rich.console import Console
    from rich.markup import escape

    from quantkit.arch.vision import PREFIXES as VISION
    from quantkit.plan.report import substitutions

    console = Console(highlight=False)
    for plan in reversed(decided.plans):
        _show_roles(console, plan)
        _show_shards(console, plan)
        if with_tensors:
            _show_tensors(console, plan)
    text = decided.plans[-1]
    _show_work(console, decided, n_tokens)
    notes = [*decided.warnings, *substitutions(text)]
    reasons: dict[str, int] = {}
    for name, reason in decided.ignored.items():
        if len(decided.plans) > 1 and name.startswith(VISION):
            continue
        reasons[reason] = reasons.get(reason, 0) + 1
    notes += [f"{count} tensors left out: {reason}" for reason, count in reasons.items()]
    if decided.starved:
        types = ", ".join(decided.starved)
        notes.append(f"{types}: convert wants an --imatrix, or calibrates first (see --corpus)")
    notes += [f"run with {item.flag}: {item.reason}" for item in decided.advice]
    for note in notes:
        console.print(f"note: {escape(note)}", soft_wrap=True)


def _show_roles(console: Console, plan: Plan) -> None:
    from rich.markup import escape
    from rich.table import Table

    from quantkit.plan.report import by_role
    from quantkit.run.events import size, weights

    title = f"{escape(plan.stem)}  ({plan.arch}, {weights(plan.n_weights)} weights)"
    table = Table(title=title, title_justify="left", show_footer=True)
    table.add_column("role", "total", no_wrap=True)
    table.add_column("types", f"{plan.bpw:.3f} bpw")
    table.add_column("tensors", f"{len(plan.tensors):,}", justify="right")
    table.add_column("weights", weights(plan.n_weights), justify="right", no_wrap=True)
    n_bytes = sum(tensor.n_bytes for tensor in plan.tensors)
    table.add_column("size", size(n_bytes), justify="right", no_wrap=True)
    table.add_column("share", "", justify="right")
    for line in by_role(plan):
        table.add_row(
            line.role,
            ", ".join(f"{name}" for name in sorted(line.types)),
            f"{line.n_tensors:,}",
            weights(line.n_weights),
            size(line.n_bytes),
            f"{line.n_bytes / max(1, n_bytes):.1%}",
        )
    console.print(table)


def _show_shards(console: Console, plan: Plan) -> None:
    from rich.markup import escape
    from rich.table import Table

    from quantkit.plan.report import tensors_per_shard
    from quantkit.run.events import files

    table = Table(show_footer=True)
    table.add_column("file", files(len(plan.shards)))
    table.add_column("tensors", f"{len(plan.tensors):,}", justify="right")
    table.add_column("bytes", f"{plan.n_bytes:,}", justify="right")
    for shard, count in zip(plan.shards, tensors_per_shard(plan), strict=True):
        table.add_row(escape(shard.file), f"{count:,}", f"{shard.n_bytes:,}")
    console.print(table)


def _show_tensors(console: Console, plan: Plan) -> None:
    from rich.table import Table

    from quantkit.plan.report import formats

    table = Table()
    for heading in ("tensor", "shape (ne)", "type", "from"):
        table.add_column(heading)
    for heading in ("file", "offset", "bytes"):
        table.add_column(heading, justify="right")
    for tensor in plan.tensors:
        table.add_row(
            tensor.spec.name,
            " x ".join(str(n) for n in reversed(tensor.spec.shape)),
            tensor.type.name,
            ", ".join([*formats(tensor), *(["copied"] if tensor.repack else [])]),
            str(tensor.shard + 1),
            f"{tensor.begin:,}",
            f"{tensor.n_bytes:,}",
        )
    console.print(table)


def _show_work(console: Console, decided: Planned, n_tokens: int) -> None:
    from quantkit.plan.report import work
    from quantkit.run.events import size, weights

    total: dict[str, int] = {}
    for plan in decided.plans:
        for key, amount in work(plan).items():
            total[key] = total.get(key, 0) + amount
    console.print(
        f"work: read {size(total['read_bytes'])}, write {size(total['write_bytes'])}; "
        f"{weights(total['repack_weights'])} weights are copied bit by bit, "
        f"{weights(total['encode_weights'])} encoded",
        soft_wrap=True,
    )
    if decided.by_inputs:
        console.print(_feedback(decided, n_tokens), soft_wrap=True)


def _feedback(decided: Planned, n_tokens: int) -> str:
    """What rounding with feedback takes here, by the speed of a product of matrices."""
    from quantkit.cli.options import default_threads
    from quantkit.plan.rounding import forecast
    from quantkit.run.events import size, weights

    told = forecast(decided.plans[-1], n_tokens, default_threads())
    hours = told.seconds / 3600
    time = f"{hours:,.0f} h" if hours >= 3 else f"{max(1.0, told.seconds / 60):,.0f} min"
    return (
        f"feedback: {weights(told.work.n_weights)} weights on {told.n_tokens:,} tokens"
        f" ({told.n_tokens / max(1, told.work.widest):.0f} per column of the widest input),"
        f" about {time} on this CPU, {size(told.work.n_bytes)} of memory,"
        f" {size(told.work.n_token_bytes * told.n_tokens)} for hidden states"
    )
