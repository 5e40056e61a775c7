"""`quantkit guide`."""

from __future__ import annotations

import json
from typing import Any

import click

from quantkit.cli.options import MODEL, hub_options, on_hub, parse_size


@click.command("guide")
@click.argument("model", type=MODEL)
@click.option(
    "-r", "--recipe", help="For a checkpoint: a recipe; default: the best that fits the machine."
)
@click.option("--vram", type=parse_size, metavar="SIZE", required=True, help="0 without a GPU.")
@click.option("--ram", type=parse_size, metavar="SIZE", required=True, help="Memory of the host.")
@click.option("--disk", type=parse_size, metavar="SIZE", help="Space for the files.")
@click.option(
    "-c",
    "--ctx",
    "--ctx-size",
    "n_ctx",
    type=click.IntRange(min=1),
    help="Context in tokens; default: 98304, or what the model allows.",
)
@click.option("--repo", metavar="OWNER/NAME", help="Where the files are on the Hugging Face Hub.")
@hub_options
@click.option("--markdown", is_flag=True, help="Print Markdown, as for a model card.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def guide_command(
    model: Any,
    recipe: str | None,
    vram: int,
    ram: int,
    disk: int | None,
    n_ctx: int | None,
    repo: str | None,
    hub: dict[str, Any],
    markdown: bool,
    as_json: bool,
) -> None:
    """Tell how MODEL, a .gguf file or a checkpoint's folder, runs on a machine.

    Does it fit, which recipe is the best that does, how fast it will be, and the command lines for
    llama.cpp. Only headers and metadata are read. Sizes are like 24GB or 24GiB. MODEL may be on the
    Hub: OWNER/NAME[@REVISION] or OWNER/NAME/FILE.gguf.
    """
    from quantkit.guide import guide as contents
    from quantkit.guide import text
    from quantkit.guide.memory import Machine
    from quantkit.pipeline.guide import Question, guide
    from quantkit.run.events import Silent

    with on_hub(hub, Silent()) as session:
        answer = guide(Question(session.at(model), Machine(vram, ram, disk), recipe, n_ctx, repo))
    if as_json:
        click.echo(json.dumps(contents.as_json(answer), indent=1, allow_nan=False))
    else:
        click.echo(text.markdown(answer) if markdown else text.plain(answer), nl=False)
