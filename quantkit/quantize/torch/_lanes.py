"""Ways to a CUDA device and back: a stream with pinned memory each, shared by all threads.

What is done in one lane is done in its order; copies in one run beside searches in others. A search
takes up to 140 bytes of the device for each weight (420 at effort best, IQ2_S), so few lanes are
better than one for each thread, and few keep a GPU busy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from queue import LifoQueue

import numpy as np
import torch

from quantkit.quantize.codec import Blocks, Tile

LANES = 4

# f32[rows, cols] -> u8[rows, row_bytes], both on the device.
Search = Callable[[torch.Tensor], torch.Tensor]


class Lane:
    """A stream, an event and pinned memory, for one thread at a time."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._done = torch.cuda.Event(blocking=True)  # who waits for it leaves the core to others
        self._pinned = torch.empty(0, dtype=torch.uint8)

    def encode(self, x: Tile, search: Search, out: Blocks) -> None:
        """Blocks of x f32[rows, cols], in any memory order, into out u8[rows, row_bytes].

        One piece of pinned memory serves both ways: blocks are smaller than rows, and the stream
        writes them after it has read the rows.
        """
        into = self._room(4 * x.size).view(torch.float32).view(x.shape)
        into.numpy()[:] = x
        with torch.cuda.stream(self._stream):
            blocks = search(into.to(self._device, non_blocking=True))
            back = self._room(out.size).view(out.shape)
            back.copy_(blocks, non_blocking=True)
            self._done.record(self._stream)
        self._done.synchronize()
        out[:] = back.numpy()

    def _room(self, n_bytes: int) -> torch.Tensor:
        """The first bytes of the pinned memory; for more than there is, of another piece."""
        if len(self._pinned) < n_bytes:
            self._pinned = torch.empty(n_bytes, dtype=torch.uint8, pin_memory=True)
        return self._pinned[:n_bytes]


class Lanes:
    """The lanes of one device, made when they are first needed."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._idle: LifoQueue[Lane | None] = LifoQueue()  # the last one used is the next one
        for _ in range(LANES):
            self._idle.put(None)

    @contextmanager
    def one(self) -> Iterator[Lane]:
        """A lane of one's own inside the block; waits until there is one."""
        lane = self._idle.get()
        try:
            lane = lane or Lane(self._device)
            yield lane
        finally:
            self._idle.put(lane)


@cache
def lanes_of(device: torch.device) -> Lanes:
    """The lanes of a CUDA device, the same for all types."""
    return Lanes(device)


def encode_in_lane(device: torch.device, x: Tile, search: Search, out: Blocks) -> None:
    """See `Lane.encode`; safe from any thread."""
    with lanes_of(device).one() as lane:
        lane.encode(x, search, out)


def encode_here(device: torch.device, x: Tile, search: Search, out: Blocks) -> None:
    """The same on a device without streams, in torch's plain order."""
    rows = np.ascontiguousarray(x, np.float32)
    if not rows.flags.writeable:  # torch has no read-only tensors
        rows = rows.copy()
    out[:] = search(torch.from_numpy(rows).to(device)).cpu().numpy()
