"""Several streams through all layers side by side, saved between layers so that a kill costs one.

The save is one file, see `state`; its first line says the digest and the next layer. It counts only
where this very sweep could have written that line and the sum is right.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from quantkit.forward.hyper import Hyper
from quantkit.forward.matrices import Compute
from quantkit.forward.rows import Rows, as_bytes, rows_within
from quantkit.forward.spans import clear_shares
from quantkit.forward.state import (
    Arrays,
    first_line,
    read_arrays,
    shapes_of,
    whole_state,
    write_state,
)
from quantkit.forward.stream import Stream
from quantkit.run import fs

_NAME = "sweep.state"
_PIECE = 64 << 20
# A save may take this share of the time since the last one.
_SHARE = 0.1


class Memory(Protocol):
    """What has been learnt on the way and must survive a kill."""

    def arrays(self) -> Arrays:
        """Everything, as plain arrays; names, types and shapes stay what they are at first."""

    def restore(self, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
        """Take it up again."""


@dataclass(frozen=True)
class Settings:
    """How a sweep runs: `n_bytes` bounds what is kept in memory, the rest goes to `work`."""

    compute: Compute
    n_bytes: int
    work: Path

    def rows_for(self, hyper: Hyper, n_tok: int, n_streams: int) -> Callable[[int, int], Rows]:
        """What makes the hidden states of so many streams."""
        n_tables = n_streams * (2 if hyper.moe else 1)
        fits = n_tables * n_tok * hyper.hidden * 4 <= self.n_bytes
        return rows_within(self.work, in_memory=fits)


class Sweep:
    """Streams over the same sequences, and what is learnt from them.

    `digest` names everything that the result depends on. `folder` is where the state is kept, or
    None for a sweep that starts over.
    """

    def __init__(
        self, streams: Sequence[Stream], memory: Memory, folder: Path | None, digest: str
    ) -> None:
        self.streams = streams
        self._memory = memory
        self._path = folder and folder / _NAME
        self._digest = digest
        self._saved_at = time.monotonic()
        self._save_seconds = 0.0

    def start(self, at_most: int | None = None) -> int:
        """Begin, or take up a saved state. Gives the first layer to do, not beyond `at_most`."""
        n_layers = self.streams[0].hyper.n_layers
        layer = self._load(n_layers if at_most is None else min(at_most, n_layers))
        if layer == 0:
            for stream in self.streams:
                stream.embed()
        self._saved_at = time.monotonic()
        return layer

    def run(
        self,
        first: int,
        after_layer: Callable[[int], None],
        progress: Callable[[float], None],
    ) -> None:
        """All layers from `first` on. `progress` is told parts of a layer of one stream."""

        def advance(layer: int) -> None:
            for stream in self.streams:
                stream.advance(layer, progress)
            after_layer(layer)

        self.run_layers(first, advance)

    def run_layers(self, first: int, advance: Callable[[int], None]) -> None:
        """Layers from `first` on, which `advance` passes with all streams."""
        for layer in range(first, self.streams[0].hyper.n_layers):
            advance(layer)
            elapsed = time.monotonic() - self._saved_at
            if self._save_seconds <= _SHARE * elapsed:
                self._save(layer + 1)

    def clear(self) -> None:
        """Remove the state; the sweep's result has been written."""
        if self._path is not None:
            clear_state(self._path.parent)

    def _save(self, next_layer: int) -> None:
        if self._path is None:
            return
        begun = time.monotonic()
        write_state(self._path, self._pieces(next_layer))
        self._saved_at = time.monotonic()
        self._save_seconds = self._saved_at - begun

    def _head(self, next_layer: int) -> bytes:
        """The first line of a state, which says all that the rest depends on."""
        arrays = shapes_of(self._memory.arrays())
        arrays += [("hidden", "<f4", (s.hidden.n_rows, s.hidden.n_cols)) for s in self.streams]
        return first_line({"digest": self._digest, "layer": next_layer}, arrays)

    def _pieces(self, next_layer: int) -> Iterator[bytes | memoryview]:
        yield self._head(next_layer)
        for array in self._memory.arrays().values():
            yield array.tobytes()
        for rows, begin, end in self._hidden():
            yield as_bytes(rows.read(begin, end))

    def _hidden(self) -> Iterator[tuple[Rows, int, int]]:
        """Stretches of all streams' rows."""
        for stream in self.streams:
            rows = stream.hidden
            step = max(1, _PIECE // (4 * rows.n_cols))
            for begin in range(0, rows.n_rows, step):
                yield rows, begin, min(begin + step, rows.n_rows)

    def _n_bytes(self) -> int:
        """Bytes between the first line and the sum."""
        n_hidden = sum(s.hidden.n_rows * s.hidden.n_cols for s in self.streams)
        return 4 * n_hidden + sum(array.nbytes for array in self._memory.arrays().values())

    def _load(self, at_most: int) -> int:
        """Next layer of a saved state of this very sweep, which is then in place; else 0."""
        if self._path is None:
            return 0
        layers = range(1, at_most + 1)
        lines = (self._head(layer) for layer in layers)
        with whole_state(self._path, lines, self._n_bytes()) as found:
            if found is None:
                return 0
            which, file = found
            arrays = read_arrays(file, self._memory.arrays())
            for rows, begin, end in self._hidden():
                x = np.fromfile(file, np.float32, (end - begin) * rows.n_cols)
                rows.write(begin, torch.from_numpy(x).view(end - begin, rows.n_cols))
        self._memory.restore(arrays)
        return layers[which]


def clear_work(folder: Path, parts: str) -> None:
    """Remove all that sweeps over a text leave in a folder: states, shares, files like `parts`."""
    clear_state(folder)
    clear_shares(folder)
    for part in folder.glob(parts):
        fs.remove(part)
    fs.remove_folder(folder)


def clear_state(folder: Path) -> None:
    """Remove the state of any sweep from its folder, also one that was being written."""
    fs.remove(folder / _NAME)
    fs.remove(fs.partial_of(folder / _NAME))
