"""Views of a run: lines and a bar for people, JSON lines for machines, nothing for --quiet."""

from __future__ import annotations

import json
import sys
import time
from typing import TYPE_CHECKING

from quantkit.run.events import Reporter, Silent, size

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID


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

    def begin(self, title: str, n_bytes: int, n_done: int) -> None:
        """See `Reporter`."""
        from rich.markup import escape
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )

        if n_done:
            self._print("[bold]resume  [/bold]", f"{size(n_done)} are already written")
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
            console=self._console,
            transient=True,
            disable=not self._console.is_terminal,
        )
        self._progress.start()
        self._task = self._progress.add_task(escape(title), total=n_bytes, completed=n_done)

    def advance(self, n_bytes: int) -> None:
        """See `Reporter`."""
        if self._progress is not None and self._task is not None:
            self._progress.advance(self._task, n_bytes)

    def end(self) -> None:
        """See `Reporter`."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def _print(self, label: str, text: str) -> None:
        from rich.markup import escape

        self._console.print(f"{label} {escape(text)}", soft_wrap=True)


class JsonLines:
    """One JSON object per event on stdout; progress at most once a second."""

    def __init__(self) -> None:
        self._total = self._done = 0
        self._last = 0.0

    def stage(self, name: str, detail: str) -> None:
        """See `Reporter`."""
        self._emit(event="stage", name=name, detail=detail)

    def warn(self, text: str) -> None:
        """See `Reporter`."""
        self._emit(event="warning", text=text)

    def begin(self, title: str, n_bytes: int, n_done: int) -> None:
        """See `Reporter`."""
        self._total, self._done = n_bytes, n_done
        self._emit(event="begin", title=title, n_bytes=n_bytes, n_done=n_done)

    def advance(self, n_bytes: int) -> None:
        """See `Reporter`."""
        self._done += n_bytes
        if time.monotonic() - self._last >= 1:
            self._last = time.monotonic()
            self._emit(event="progress", n_done=self._done, n_bytes=self._total)

    def end(self) -> None:
        """See `Reporter`."""

    def _emit(self, **fields: object) -> None:
        sys.stdout.write(json.dumps(fields) + "\n")
        sys.stdout.flush()
