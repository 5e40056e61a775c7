"""Views of a run: lines and a bar for people, JSON lines for machines, nothing for --quiet."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING

import click

from quantkit.cli import printable
from quantkit.run.events import Reporter, Silent, Unit, size

if TYPE_CHECKING:
    from rich.progress import Progress, ProgressColumn, TaskID


def reporter(*, quiet: bool, as_json: bool) -> Reporter:
    """The view that the user asked for."""
    if as_json:
        return JsonLines()
    return Silent() if quiet else Lines()


class Lines:
    """One line per finished stage on stderr, and a bar while bytes are written."""

    def __init__(self) -> None:
        from rich.console import Console

        self._console = Console(stderr=True, highlight=False)
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._since = time.monotonic()

    def stage(self, name: str, detail: str) -> None:
        """See `Reporter`."""
        seconds = time.monotonic() - self._since
        self._since = time.monotonic()
        self._print(f"[bold]{name:8}[/bold]", f"{detail}  ({seconds:.1f} s)")

    def warn(self, text: str) -> None:
        """See `Reporter`."""
        self._print("[yellow]note    [/yellow]", text)

    def begin(self, title: str, total: int, n_done: int, unit: Unit = "bytes") -> None:
        """See `Reporter`."""
        from rich.markup import escape
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        if n_done:
            done = (
                f"{size(n_done)} are already written" if unit == "bytes" else "from a saved state"
            )
            self._print("[bold]resume  [/bold]", done)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            *_amounts(unit),
            TimeRemainingColumn(),
            console=self._console,
            transient=True,
            disable=not self._console.is_terminal,
        )
        self._progress.start()
        self._task = self._progress.add_task(escape(title), total=total, completed=n_done)

    def advance(self, n: float) -> None:
        """See `Reporter`."""
        if self._progress is not None and self._task is not None:
            self._progress.advance(self._task, n)

    def end(self) -> None:
        """See `Reporter`."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def _print(self, label: str, text: str) -> None:
        from rich.markup import escape

        self._console.print(f"{label} {escape(printable(text))}", soft_wrap=True)


def _amounts(unit: Unit) -> list[ProgressColumn]:
    """How much is done, and how fast."""
    from rich.progress import DownloadColumn, ProgressColumn, Task, TransferSpeedColumn
    from rich.text import Text

    class Tokens(ProgressColumn):
        def render(self, task: Task) -> Text:
            speed = f", {task.speed:,.0f}/s" if task.speed else ""
            return Text(f"{task.completed:,.0f} of {task.total:,.0f} tokens{speed}")

    return [DownloadColumn(), TransferSpeedColumn()] if unit == "bytes" else [Tokens()]


class JsonLines:
    """One JSON object per event on stdout; progress at most once a second."""

    def __init__(self) -> None:
        self._total = 0
        self._done = self._last = 0.0
        self._unit: Unit = "bytes"

    def stage(self, name: str, detail: str) -> None:
        """See `Reporter`."""
        self._emit(event="stage", name=name, detail=detail)

    def warn(self, text: str) -> None:
        """See `Reporter`."""
        self._emit(event="warning", text=text)

    def begin(self, title: str, total: int, n_done: int, unit: Unit = "bytes") -> None:
        """See `Reporter`."""
        self._total, self._done, self._unit = total, float(n_done), unit
        self._emit(event="begin", title=title, n_done=n_done, **{f"n_{unit}": total})

    def advance(self, n: float) -> None:
        """See `Reporter`."""
        self._done += n
        if time.monotonic() - self._last >= 1:
            self._last = time.monotonic()
            done = round(self._done)
            self._emit(event="progress", n_done=done, **{f"n_{self._unit}": self._total})

    def end(self) -> None:
        """See `Reporter`."""

    def _emit(self, **fields: object) -> None:
        click.echo(json.dumps(fields))
