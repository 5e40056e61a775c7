"""Rows of weights that stay for several products, as many as fit."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import closing

import torch

from quantkit.forward.loading import Part

# An expert of Kimi K2 takes 176 MB, the attention of a layer 404 MB, both as f32.
_KEPT_BYTES = 512 << 20

Tiles = Generator[torch.Tensor, None, None]


class Kept:
    """Parts of matrices as `load` gives them, kept while they fit; the rest is read anew."""

    def __init__(self, load: Callable[[Sequence[Part]], Tiles]) -> None:
        self._load = load
        self._left = _KEPT_BYTES
        self._tiles: dict[Part, torch.Tensor] = {}

    def load(self, parts: Sequence[Part]) -> Tiles:
        """See `Loader`."""
        missing = [part for part in parts if part not in self._tiles]
        with closing(self._load(missing)) as loaded:
            for part in parts:
                tile = self._tiles.get(part)
                if tile is None:
                    tile = next(loaded)
                    if tile.nbytes <= self._left:
                        self._left -= tile.nbytes
                        self._tiles[part] = tile
                yield tile
                del tile
