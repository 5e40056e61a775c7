"""`quantkit doctor`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from quantkit.cli.options import MODEL, default_threads, hub_options, memory_option, on_hub

if TYPE_CHECKING:
    from quantkit.pipeline.doctor.finding import Finding

_MARKS = {"ok": ("green", "ok"), "note": ("cyan", "note")}
_MARKS |= {"warning": ("yellow", "warn"), "failure": ("red", "FAIL")}


@click.command("doctor")
@click.argument("model", type=MODEL, required=False)
@click.option("-r", "--recipe", help="What MODEL is to be converted with; default: q4_x.")
@click.option("--rounding", type=click.Choice(["nearest", "feedback"]), help="Overrule the recipe.")
@click.option("--imatrix", type=click.Path(path_type=Path), help="Importance statistics.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Where it is to go.")
@hub_options
@click.option(
    "-t", "--threads", type=click.IntRange(min=1), help="To reckon with; default: all cores."
)
@memory_option
@click.option("--online", is_flag=True, help="Ask the Hub whether the token is valid.")
@click.option("--json", "as_json", is_flag=True, help="Print what was found as JSON.")
@click.pass_context
def doctor_command(
    ctx: click.Context,
    model: Any,
    recipe: str | None,
    rounding: Any,
    imatrix: Path | None,
    output: Path | None,
    hub: dict[str, Any],
    threads: int | None,
    memory: int | None,
    online: bool,
    as_json: bool,
) -> None:
    """Say what this machine has, what will limit a job on it, and what the job will take.

    With MODEL and a recipe the conversion is planned and its encoders are tried for a moment;
    with -o the disk is tried too. No weights are converted, and no file is left. The exit code is
    0 unless something here would make the job fail: then it is the one the job would end with.
    """
    from quantkit.pipeline.doctor.machine import machine, token_online
    from quantkit.run.events import Silent

    findings = list(machine())
    if online:
        findings.append(token_online())
    told = None
    if model is not None:
        from quantkit.pipeline import Job
        from quantkit.pipeline.doctor.job import Question, examine

        with on_hub(hub, Silent()) as session:
            job = Job(session.at(model), recipe or "q4_x", rounding=rounding, imatrix=imatrix)
            asked = Question(job, output, threads or default_threads(), memory)
            more, told = examine(asked)
        findings += more
    elif output is not None:
        findings.append(_output(output))
    _print_json(findings, told) if as_json else _print(findings)
    ctx.exit(max((finding.exit_code for finding in findings), default=0))


def _output(folder: Path) -> Finding:
    from quantkit.pipeline.doctor.disks import output_disk
    from quantkit.pipeline.doctor.finding import Finding
    from quantkit.run.events import size

    disk = output_disk(folder)
    if disk.refused:
        return Finding("output", f"{folder}: {disk.refused}", "failure", "choose another", 5)
    return Finding("output", f"{size(disk.n_free)} free, written at {size(disk.write)}/s")


def _print(findings: list[Finding]) -> None:
    from rich.console import Console
    from rich.markup import escape

    console = Console(highlight=False)
    for finding in findings:
        colour, mark = _MARKS[finding.level]
        hint = f"\n{'':18}{escape(finding.hint)}" if finding.hint else ""
        topic = f"{finding.topic:11}"
        console.print(
            f"[{colour}]{mark:5}[/{colour}] {escape(topic)} {escape(finding.value)}{hint}",
            soft_wrap=True,
        )


def _print_json(findings: list[Finding], told: Any) -> None:
    import json
    from dataclasses import asdict

    data: dict[str, Any] = {"findings": [asdict(finding) for finding in findings]}
    if told is not None:
        data["job"] = asdict(told) | {"limit": told.limit, "total_seconds": told.total}
    click.echo(json.dumps(data, indent=1))
