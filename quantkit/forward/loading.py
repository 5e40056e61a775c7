"""Rows of a model's weights on their way to the device, read ahead of their use."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from itertools import pairwise
from typing import NamedTuple

import torch

from quantkit.forward.weights import Weights

_PIECE = 2 << 20  # weights that one of several readers takes, at least
_MAX_READERS = 16


class Part(NamedTuple):
    """Rows `first .. last` of a tensor, leading axes flattened."""

    name: str
    first: int
    last: int


class Loader:
    """Parts of matrices as tensors of one type on one device, the next read while one is used.

    At most two are held at a time, and two on a GPU.

    To a CUDA device they go through pinned memory and a stream of their own: the copy of one runs
    beside the products with another. torch's allocators keep what a copy still needs, the host's by
    the event that a non-blocking copy leaves, the device's by `record_stream`. There, products with
    an expert's few tokens are over before one thread has read it, and several read its rows. A
    CPU's cores have enough to do, and a second place for the rows would cost what it saves.
    """

    def __init__(self, weights: Weights, device: torch.device, dtype: torch.dtype) -> None:
        self._weights = weights
        self._device = device
        self._dtype = dtype
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._ahead = ThreadPoolExecutor(1, "read-ahead")  # threads start when they are needed
        self._readers = ThreadPoolExecutor(_MAX_READERS, "read-rows")

    def load(self, parts: Sequence[Part]) -> Generator[torch.Tensor, None, None]:
        """Each part's rows [rows, cols] in order; raises what reading raises.

        What is being read when the iterator is closed is waited for.
        """
        if len(parts) == 1:  # nothing to overlap with
            yield self._arrived(*self._sent(parts[0]))
            return
        pending = [self._ahead.submit(self._sent, part) for part in parts[:1]]
        try:
            for k in range(len(parts)):
                tile = self._arrived(*pending.pop().result())
                if k + 1 < len(parts):
                    pending.append(self._ahead.submit(self._sent, parts[k + 1]))
                yield tile
                del tile  # before the next one comes
        finally:
            wait(pending)

    def _sent(self, part: Part) -> tuple[torch.Tensor, torch.cuda.Event | None]:
        """The rows, and for a GPU, where they are only on their way, the end of their copy."""
        if self._copies is None:
            return torch.from_numpy(self._weights.read(*part)), None
        shape = self._weights.shape(part.name)
        rows = torch.empty(part.last - part.first, shape[-1], pin_memory=True)
        n_readers = min(_MAX_READERS, torch.get_num_threads()) if len(shape) == 3 else 1
        self.fill(rows, part, min(n_readers, rows.numel() // _PIECE))
        with torch.cuda.stream(self._copies):
            tile = rows.to(self._device, non_blocking=True).to(self._dtype)
            return tile, self._copies.record_event()

    def _arrived(self, tile: torch.Tensor, copied: torch.cuda.Event | None) -> torch.Tensor:
        if copied is None:
            return tile.to(self._device, self._dtype)
        user = torch.cuda.current_stream(self._device)
        user.wait_event(copied)
        tile.record_stream(user)  # allocated for one stream, used by another
        return tile

    def fill(self, rows: torch.Tensor, part: Part, n_readers: int) -> None:
        """Read a part into rows f32[rows, cols] on the host, by so many threads, at least one."""
        n_readers = max(1, n_readers)
        cuts = [len(rows) * k // n_readers for k in range(n_readers + 1)]
        into = rows.numpy()

        def read(begin: int, end: int) -> None:
            into[begin:end] = self._weights.read(part.name, part.first + begin, part.first + end)

        reading = [self._readers.submit(read, *cut) for cut in pairwise(cuts)]
        wait(reading)
        for piece in reading:
            piece.result()
