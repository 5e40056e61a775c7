"""`quantkit families`."""

from __future__ import annotations

import click


@click.command("families")
def families_command() -> None:
    """List the families of models that checkpoints can be converted from.

    Of every one, a small random model made by transformers' own class is converted and run by
    llama.cpp and by quantkit; both agree with transformers (tests/families, tests/forward). The
    tokenizer is taken from the checkpoint's files; one that llama.cpp would not reproduce is
    refused.

    Another model converts from the GGUF that llama.cpp's own converter makes of it.
    """
    from quantkit.arch.registry import FAMILIES
    from quantkit.forward.hyper import STYLES

    head = ("family", "llama.cpp", "checked", "class in config.json")
    rows = [head]
    for family in FAMILIES:
        checked = ["converts"]
        if family.arch in STYLES:
            checked.append("runs")
            if STYLES[family.arch].feedback:
                checked.append("feedback")
        for i, name in enumerate(family.architectures):
            first = (family.title, family.arch, ", ".join(checked)) if i == 0 else ("", "", "")
            rows.append((*first, name))
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    for row in rows:
        line = "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        click.echo(line.rstrip())
    click.echo(
        "\nconverts: weights, metadata and tokenizer; runs: calibrate, evaluate, allocate; "
        "feedback: --rounding feedback"
    )
