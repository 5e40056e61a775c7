"""Chunks through lanes: the bytes of the plain way, never more at once than there are lanes.

The first tests run on a stand-in for torch.cuda, the last on a GPU, where there is one:
`pytest tests/quantize/torch/test_lanes.py tests/forward/test_loading.py -k gpu`.
"""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from quantkit.quantize.codec import How, codec_of
from quantkit.quantize.torch import _lanes, supported, torch_codec
from quantkit.types import GgmlType
from tests.quantize import laws
from tests.quantize.torch import cuda
from tests.quantize.torch.cuda import needs_cuda

CPU = torch.device("cpu")
ROWS = laws.student(6)


@pytest.fixture
def lanes(monkeypatch) -> _lanes.Lanes:
    monkeypatch.setattr(_lanes, "torch", cuda.stand_in)
    monkeypatch.setattr(cuda.Stream, "made", 0)
    return _lanes.Lanes(CPU)


def halved(x: torch.Tensor) -> torch.Tensor:
    """Stands for a search: half as many bytes as columns."""
    return (x[:, ::2] * 50).abs().to(torch.uint8)


def through(lanes: _lanes.Lanes, x: np.ndarray, search=halved) -> np.ndarray:
    out = np.empty((len(x), x.shape[1] // 2), np.uint8)
    with lanes.one() as lane:
        lane.encode(x, search, out)
    return out


def test_blocks_are_read_only_when_they_have_come_back(lanes):
    expected = halved(torch.from_numpy(ROWS)).numpy()
    assert np.array_equal(through(lanes, ROWS), expected)
    assert np.array_equal(through(lanes, ROWS[::-1]), expected[::-1])
    assert np.array_equal(through(lanes, np.asfortranarray(ROWS)), expected)


def test_pinned_memory_is_used_again_and_grows_when_it_must(lanes):
    for rows in (ROWS[:2], ROWS, ROWS[:1]):
        assert np.array_equal(through(lanes, rows), halved(torch.from_numpy(rows)).numpy())
    with lanes.one() as lane:
        assert len(lane._pinned) == ROWS.nbytes
    assert cuda.Stream.made == 1


def test_never_more_at_once_than_lanes(lanes, monkeypatch):
    monkeypatch.setattr(cuda, "CURRENT", PerThread())
    lock, now, most = threading.Lock(), 0, 0

    def slow(x: torch.Tensor) -> torch.Tensor:
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
        time.sleep(0.02)
        with lock:
            now -= 1
        return halved(x)

    with ThreadPoolExecutor(12) as pool:
        parts = list(pool.map(lambda k: through(lanes, ROWS * np.float32(k), slow), range(24)))
    assert most == cuda.Stream.made == _lanes.LANES
    for k, part in enumerate(parts):
        expected = halved(torch.from_numpy(ROWS * np.float32(k))).numpy()
        assert np.array_equal(part, expected)


class PerThread(threading.local):
    """A list of each thread's own, as torch's current stream is."""

    def __init__(self) -> None:
        self.items: list[cuda.Stream] = []

    def append(self, item: cuda.Stream) -> None:
        self.items.append(item)

    def pop(self) -> cuda.Stream:
        return self.items.pop()

    def __getitem__(self, k: int) -> cuda.Stream:
        return self.items[k]


def test_a_search_that_fails_leaves_its_lane_to_others(lanes):
    def fail(x: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    for _ in range(_lanes.LANES + 1):
        with pytest.raises(torch.OutOfMemoryError):
            through(lanes, ROWS, fail)
    assert through(lanes, ROWS).any()


@needs_cuda
@pytest.mark.parametrize("type_", sorted(supported()), ids=lambda t: t.name)
def test_on_a_gpu_blocks_are_those_of_the_kernels(type_: GgmlType) -> None:
    x, q = np.concatenate([laws.gauss(24), laws.student(24)]), laws.log_normal()
    theirs, ours = (
        codec_of(type_).encode(x, q, How()),
        torch_codec(type_, "cuda").encode(x, q, How()),
    )
    same = (ours == theirs).reshape(-1, type_.block_bytes).all(axis=1)
    assert same.mean() >= 0.98


@needs_cuda
def test_on_a_gpu_bytes_do_not_depend_on_threads() -> None:
    encode, x = torch_codec(GgmlType.Q4_K, "cuda").encode, laws.student(64)
    whole = encode(x, None, How())
    with ThreadPoolExecutor(8) as pool:
        for _ in range(4):
            parts = list(pool.map(lambda k: encode(x[8 * k : 8 * k + 8], None, How()), range(8)))
            assert np.array_equal(np.concatenate(parts), whole)
