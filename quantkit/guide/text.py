"""A guide for people: Markdown for a model card, or plain text for a terminal."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from shlex import quote

from quantkit.container.names import escaped
from quantkit.guide.commands import Command, Mode
from quantkit.guide.guide import Guide, Rung
from quantkit.guide.memory import Fit, Place
from quantkit.run.events import size

_WHERE = {
    Place.VRAM: "runs from VRAM",
    Place.RAM: "runs from VRAM and RAM",
    Place.DISK: "runs from disk",
    Place.NOWHERE: "does not run",
}


def markdown(guide: Guide) -> str:
    """Headings, tables and fenced code."""
    return _joined(_lines(guide, _Markdown()))


def plain(guide: Guide) -> str:
    """The same words for a terminal."""
    return _joined(_lines(guide, _Plain()))


class _Markdown:
    def heading(self, text: str) -> list[str]:
        return ["", f"## {text}", ""]

    def table(self, head: Sequence[str], rows: list[Sequence[str]]) -> list[str]:
        rule = ["---:" if right else "---" for right in _numeric(rows)]
        cells = [[escaped(cell).replace("|", "\\|") for cell in row] for row in rows]
        return [f"| {' | '.join(row)} |" for row in (head, rule, *cells)]

    def code(self, command: Command) -> list[str]:
        # A fence longer than any run of backticks inside.
        inside = max(map(len, re.findall("`+", "\n".join(command.lines))), default=0)
        fence = "`" * max(3, inside + 1)
        lines = [escaped(line) for line in command.lines]
        return [f"{command.title}:", "", f"{fence}{command.language}", *lines, fence, ""]

    def item(self, text: str) -> list[str]:
        return [f"- {text}"]


class _Plain:
    def heading(self, text: str) -> list[str]:
        return ["", text, "-" * len(text)]

    def table(self, head: Sequence[str], rows: list[Sequence[str]]) -> list[str]:
        widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
        right = _numeric(rows)
        return [
            "  ".join(
                cell.rjust(width) if number else cell.ljust(width)
                for cell, width, number in zip(row, widths, right, strict=True)
            ).rstrip()
            for row in (head, *rows)
        ]

    def code(self, command: Command) -> list[str]:
        return [
            f"{command.title}:",
            *(f"    {escaped(line)}".rstrip() for line in command.lines),
            "",
        ]

    def item(self, text: str) -> list[str]:
        return [f"* {text}"]


def _lines(guide: Guide, style: _Markdown | _Plain) -> Iterator[str]:
    model, machine, laid = guide.model, guide.machine, guide.fit
    total = machine.ram + machine.vram
    yield (
        f"{escaped(model.name)}, {size(model.n_bytes)}: {_WHERE[laid.place]} "
        f"with {size(machine.vram)} of VRAM and {size(machine.ram)} of RAM"
        + (f" ({size(total)} together)" if machine.vram else "")
    )
    yield f"Speed: {guide.speed.verdict}"
    yield from style.heading(f"Memory at {laid.n_ctx:,} tokens of context")
    yield from _memory(guide, laid, style.table)
    yield ""
    yield "Buffers are estimates; llama-fit-params measures them."
    if guide.ladder:
        yield from style.heading("Recipes on this machine")
        yield from style.table(
            ("recipe", "size", "bpw", ""), [_rung(rung, guide.best) for rung in guide.ladder]
        )
    yield from style.heading("Commands")
    for command in guide.commands:
        yield from style.code(command)
    if len(guide.placements) > 2:
        yield from style.heading("Other placements, in place of --fit on")
        for what, flags in guide.placements[1:]:
            words = " ".join(quote(word) for flag in flags for word in flag)
            yield from style.code(Command(what, text=words))
    yield from style.heading("Sampling")
    yield from style.table(("mode", "values", "chat template"), [_mode(m) for m in guide.modes])
    if guide.notes:
        yield from style.heading("Notes")
        for note in guide.notes:
            yield from style.item(escaped(note))


def _joined(lines: Iterator[str]) -> str:
    """Text without two empty lines in a row."""
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip("\n") + "\n"


def _numeric(rows: list[Sequence[str]]) -> list[bool]:
    """Which columns hold numbers."""
    columns = zip(*rows, strict=True)
    return [all(cell[:1].isdigit() or cell == "-" for cell in column) for column in columns]


def _memory(
    guide: Guide, laid: Fit, table: Callable[[Sequence[str], list[Sequence[str]]], list[str]]
) -> list[str]:
    rows: list[Sequence[str]] = []
    cache = f"KV cache ({laid.cache_type.name.lower()})"
    for what, vram, ram in (
        ("weights", laid.vram.weights, laid.ram.weights),
        (cache, laid.vram.cache, laid.ram.cache),
        ("compute buffers", laid.vram.compute, laid.ram.compute),
        ("vision, margin, system", laid.vram.other, laid.ram.other),
        ("together", laid.vram.total, laid.ram.total),
        ("there is", guide.machine.vram, guide.machine.ram),
    ):
        rows.append((what, size(vram) if vram else "-", size(ram) if ram else "-"))
    return table(("", "VRAM", "RAM"), rows)


def _rung(rung: Rung, best: str | None) -> Sequence[str]:
    remark = "best that fits" if rung.recipe == best else _WHERE[rung.place]
    if rung.wasteful:
        remark += ", no better than INT4"
    return rung.recipe, size(rung.n_bytes), f"{rung.bpw:.2f}", remark


def _mode(mode: Mode) -> Sequence[str]:
    values = ", ".join(f"{key} {value:.7g}" for key, value in mode.sampling.items())
    kwargs = ", ".join(f"{key} = {str(value).lower()}" for key, value in mode.kwargs.items())
    return mode.name, values or "llama.cpp's defaults", kwargs or "-"
