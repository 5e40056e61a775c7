"""Rows of weights on their way to the device: in order, one ahead, and exactly what is stored."""

from __future__ import annotations

import threading
import time
from contextlib import closing

import numpy as np
import pytest
import torch

from quantkit.errors import SourceError
from quantkit.forward import loading
from quantkit.forward.loading import Loader, Part
from tests.forward.support import ArrayWeights
from tests.quantize.torch import cuda
from tests.quantize.torch.cuda import needs_cuda

CPU = torch.device("cpu")
RNG = np.random.default_rng(5)
ARRAYS = {
    "wide": RNG.standard_normal((40, 16)).astype(np.float32),
    "experts": RNG.standard_normal((4, 10, 16)).astype(np.float32),
}
PARTS = [Part("wide", 0, 7), Part("experts", 10, 20), Part("wide", 7, 40), Part("experts", 39, 40)]


class Watched(ArrayWeights):
    """Weights that note what is read, and by which thread."""

    def __init__(self) -> None:
        super().__init__({}, ARRAYS)
        self.read_: list[tuple[str, int, int]] = []
        self.threads: set[int] = set()
        self.broken = ""

    def read(self, name: str, begin: int, end: int) -> np.ndarray:
        if name == self.broken:
            raise SourceError("ends early", where=name)
        self.read_.append((name, begin, end))
        self.threads.add(threading.get_ident())
        return super().read(name, begin, end)


def stored(part: Part) -> np.ndarray:
    array = ARRAYS[part.name]
    return array.reshape(-1, array.shape[-1])[part.first : part.last]


@pytest.mark.parametrize("n", range(len(PARTS) + 1))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_parts_come_in_order_and_exactly(n, dtype):
    tiles = list(Loader(Watched(), CPU, dtype).load(PARTS[:n]))
    assert len(tiles) == n
    for part, tile in zip(PARTS, tiles, strict=False):
        assert torch.equal(tile, torch.from_numpy(stored(part)).to(dtype))


@pytest.mark.parametrize("n_readers", [0, 1, 3, 16])
def test_several_threads_read_what_one_reads(n_readers):
    weights, part = Watched(), Part("experts", 5, 35)
    rows = torch.empty(30, 16)
    Loader(weights, CPU, torch.float32).fill(rows, part, n_readers)
    assert torch.equal(rows, torch.from_numpy(stored(part)))
    assert len(weights.read_) == max(1, n_readers)
    assert sum(end - begin for _, begin, end in weights.read_) == 30


@pytest.mark.parametrize("n_readers", [1, 3])
def test_a_thread_that_cannot_read_says_so(n_readers):
    weights = Watched()
    weights.broken = "experts"
    with pytest.raises(SourceError, match="ends early"):
        Loader(weights, CPU, torch.float32).fill(
            torch.empty(9, 16), Part("experts", 0, 9), n_readers
        )


def test_one_part_is_read_ahead_and_no_more():
    weights = Watched()
    with closing(Loader(weights, CPU, torch.float32).load(PARTS)) as tiles:
        for k in range(len(PARTS)):
            next(tiles)
            time.sleep(0.05)
            assert len(weights.read_) == min(k + 2, len(PARTS))


def test_nothing_is_read_any_more_once_it_is_closed():
    class Slow(Watched):
        def read(self, name: str, begin: int, end: int) -> np.ndarray:
            time.sleep(0.05)
            return super().read(name, begin, end)

    weights = Slow()
    with closing(Loader(weights, CPU, torch.float32).load(PARTS)) as tiles:
        next(tiles)
    n_read = len(weights.read_)
    time.sleep(0.1)
    assert len(weights.read_) == n_read == 2


@pytest.mark.parametrize("n", [1, 3])
def test_what_cannot_be_read_is_told_where_it_is_used(n):
    weights = Watched()
    weights.broken = "experts"
    with pytest.raises(SourceError, match="ends early"):
        list(Loader(weights, CPU, torch.float32).load([Part("experts", 0, 40)] * n))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_to_a_gpu_they_go_by_pinned_memory_and_are_waited_for(monkeypatch, dtype):
    monkeypatch.setattr(loading, "torch", cuda.stand_in)
    user = cuda.stand_in.default
    n_before = len(user.waited_for)
    with closing(Loader(Watched(), torch.device("cuda"), dtype).load(PARTS)) as tiles:
        for k, (part, tile) in enumerate(zip(PARTS, tiles, strict=True), start=1):
            assert tile.user is user
            assert len(user.waited_for) == n_before + k
            assert torch.equal(
                tile.as_subclass(torch.Tensor), torch.from_numpy(stored(part)).to(dtype)
            )


@needs_cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_on_a_gpu_products_see_what_is_stored(dtype):
    array = RNG.standard_normal((8, 2048, 1024)).astype(np.float32)
    weights = ArrayWeights({}, {"experts": array})
    parts = [Part("experts", 2048 * k, 2048 * (k + 1)) for k in range(8)] * 4
    gpu = torch.device("cuda")
    x = torch.randn(64, 1024, device=gpu, dtype=dtype)
    with closing(Loader(weights, gpu, dtype).load(parts)) as tiles:
        ours = [x @ tile.T for tile in tiles]
    for part, product in zip(parts, ours, strict=True):
        rows = torch.from_numpy(array.reshape(-1, 1024)[part.first : part.last])
        assert torch.equal(product, x @ rows.to(gpu, dtype).T)
