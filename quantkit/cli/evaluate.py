"""`quantkit evaluate`."""

from __future__ import annotations

import json
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


@click.command("evaluate")
@click.argument("model", type=MODEL)
@click.argument("quants", nargs=-1, type=MODEL)
@reading_options(default=None)
@click.option(
    "--task",
    metavar="mmlu|FILE",
    help="Multiple-choice questions to ask, with a text or without: MMLU, or a JSONL file.",
)
@click.option(
    "--shots",
    type=click.IntRange(min=0),
    default=5,
    show_default=True,
    help="Solved examples before each question.",
)
@click.option(
    "--examples",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="JSONL file of them; default: the first five questions of each subject of --task.",
)
@click.option(
    "--limit", type=click.IntRange(min=1), help="Most questions to ask, evenly taken from all."
)
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    help="Folder for report.json and report.html.",
)
@click.option(
    "--engine",
    type=click.Choice(["quantkit", "llama.cpp"]),
    default="quantkit",
    show_default=True,
    help="What runs the quants: quantkit in a few GB, or llama.cpp with all of them in memory.",
)
@click.option(
    "--imatrix",
    type=click.Path(path_type=Path),
    help="Adds the expert coverage of an imatrix to the report.",
)
@click.option(
    "--calibrated-on",
    type=click.Path(path_type=Path),
    metavar="TOKENS",
    help="Tokens that the quants were calibrated with: text that shares them is refused.",
)
@click.option(
    "--save-base",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Write MODEL's log-probabilities for llama-perplexity --kl-divergence-base, and stop.",
)
@running_options
@cluster_options
@hub_options
@click.option("--force", is_flag=True, help="Score on calibration text all the same.")
@click.option("-q", "--quiet", is_flag=True, help="Print the result only.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON on stdout.")
def evaluate_command(
    model: Any,
    quants: tuple[Any, ...],
    task: str | None,
    shots: int,
    examples: Path | None,
    limit: int | None,
    output: Path | None,
    engine: Any,
    imatrix: Path | None,
    calibrated_on: Path | None,
    save_base: Path | None,
    reading: dict[str, Any],
    running: dict[str, Any],
    cluster: dict[str, Any],
    hub: dict[str, Any],
    threads: int | None,
    force: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Compare QUANTS (.gguf) with MODEL: perplexity, KL divergence, and where the error arises.

    MODEL is the checkpoint's folder, a GGUF file, or a file of base log-probabilities that
    llama-perplexity or --save-base wrote. All quants go through in one sweep. Figures mean what
    llama-perplexity's mean: the second half of every chunk is scored. Of QUANTS, files that are no
    models are left out, so that OUT/*.gguf may be given. Each may be on the Hub: OWNER/NAME of a
    checkpoint, OWNER/NAME/FILE.gguf of a quant, with @REVISION behind the name.

    With --task, questions are asked: how many MODEL and QUANTS answer right, and which answers
    change. A line of a JSONL file is {"question": TEXT, "choices": [TEXT, ...], "answer": LETTER or
    INDEX, "subject": TEXT}; the subject can be left out.

    With --executor ray the text is shared among workers, to the same report; they need MODEL,
    QUANTS and the report's folder under the same paths. Questions are asked by this process.
    """
    from quantkit.cli.console import reporter
    from quantkit.cli.options import use_threads
    from quantkit.pipeline.evaluation import (
        Evaluation,
        evaluate,
        is_base_file,
        write_base,
        write_report,
    )
    from quantkit.pipeline.opening import Reading, Running
    from quantkit.pipeline.spread import spread_over
    from quantkit.pipeline.tasks import Asking

    use_threads(threads or default_threads())
    view = reporter(quiet=quiet or as_json, as_json=False)
    has_text = reading["corpus"] is not None
    if not has_text and task is None and not is_base_file(model):
        raise click.UsageError("which text? Give --text FILE, --corpus NAME, or a --task.")
    if task is None and (examples is not None or limit is not None):
        raise click.UsageError("--examples and --limit belong to a --task.")
    if task is not None and save_base is not None:
        raise click.UsageError("--save-base writes what MODEL makes of a text, not of a --task.")
    if not quants and save_base is None:
        raise click.UsageError("name the files to compare, or --save-base FILE.")
    if cluster["executor"] != "threads" and (engine != "quantkit" or save_base is not None):
        raise click.UsageError("--executor shares neither --save-base nor --engine llama.cpp.")
    folder = output or (save_base.parent if save_base else Path())
    how = Running(**running)
    with (
        on_cluster(cluster, threads, str(how.compute().device), view) as workers,
        on_hub(hub, view, folder) as session,
    ):
        job = Evaluation(
            session.at(model),
            tuple(session.file(quant) for quant in quants),
            Reading(**reading) if has_text else None,
            how,
            engine,
            threads or default_threads(),
            imatrix,
            calibrated_on,
            force,
            Asking(task, shots, limit, examples) if task is not None else None,
        )
        if save_base is not None:
            write_base(job, save_base, view)
            return
        spread = spread_over(workers, view) if workers else None
        report = evaluate(job, folder / ".evaluate.work", view, spread=spread)
    if output is not None:
        write_report(report, output)
    if as_json:
        click.echo(json.dumps(report, allow_nan=False))
        return
    _show(report)
    if output is not None:
        click.echo(f"\nreport: {output / 'report.html'}")


def _show(report: dict[str, Any]) -> None:
    from quantkit.evaluate import choice, summary
    from quantkit.pipeline.evaluation import predicted_kld

    for quant in report["quants"]:
        click.echo(f"\n{quant['path']}: {quant['bytes']:,} bytes, {quant['bpw']:.3f} bpw")
        if report["text"] is not None:
            click.echo(summary.as_text(quant))
            if (expected := predicted_kld(Path(quant["path"]))) is not None:
                click.echo(f"predicted mean KLD: {expected:.4g}")
        for task in quant["tasks"]:
            click.echo(choice.as_text(task))
