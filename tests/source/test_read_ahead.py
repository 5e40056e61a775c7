"""Which tensors the system is asked to fetch while others are read."""

from __future__ import annotations

import os
import threading

import numpy as np
import pytest

from quantkit.source.checkpoint import open_checkpoint
from quantkit.source.files import _AHEAD_BYTES, ReadAhead
from quantkit.types import TensorRef
from tests.builders.safetensors import bf16, write_checkpoint

MIB = 1 << 20


def refs(*sizes: int, file: str = "a") -> list[TensorRef]:
    """Tensors one behind the other."""
    made, at = [], 100
    for n, size in enumerate(sizes):
        made.append(TensorRef(f"t{n}", "U8", (size,), file, at, at + size))
        at += size
    return made


def names(fetched: list[TensorRef]) -> list[str]:
    return [ref.name for ref in fetched]


def test_so_many_are_fetched_that_the_next_mebibytes_are_there():
    tensors = refs(*[6 * MIB] * 8)
    ahead = ReadAhead(tensors)
    assert _AHEAD_BYTES == 16 * MIB
    assert names(ahead.start()) == ["t0", "t1", "t2"]
    assert names(ahead.reading("a", tensors[0].begin)) == ["t3"]
    assert names(ahead.reading("a", tensors[0].begin + MIB)) == []  # is being read
    assert names(ahead.reading("a", tensors[1].end - 1)) == ["t4"]
    assert names(ahead.reading("a", tensors[4].begin)) == ["t5", "t6", "t7"]
    assert names(ahead.reading("a", tensors[7].begin)) == []


def test_what_is_read_out_of_turn_changes_nothing():
    tensors = refs(*[6 * MIB] * 8)
    ahead = ReadAhead(tensors)
    ahead.start()
    assert ahead.reading("b", tensors[0].begin) == []
    assert ahead.reading("a", tensors[7].begin) == []
    assert ahead.reading("a", 0) == []
    assert names(ahead.reading("a", tensors[0].begin)) == ["t3"]


def test_one_that_is_larger_than_all_that_is_fetched_is_left_to_the_system():
    tensors = refs(MIB, 400 * MIB, MIB)
    ahead = ReadAhead(tensors)
    assert names(ahead.start()) == ["t0"]
    assert names(ahead.reading("a", tensors[0].begin)) == []
    assert names(ahead.reading("a", tensors[1].begin)) == ["t2"]


def test_the_order_is_taken_from_its_source_no_sooner_than_it_is_needed():
    taken = []

    def supply():
        for ref in refs(*[8 * MIB] * 100):
            taken.append(ref.name)
            yield ref

    ahead = ReadAhead(supply())
    assert taken == []
    ahead.start()
    assert taken == ["t0", "t1"]


def test_many_threads_fetch_each_tensor_once():
    tensors = refs(*[MIB] * 500)
    ahead = ReadAhead(tensors)
    fetched = names(ahead.start())
    lock = threading.Lock()

    def read(number: int) -> None:
        for ref in tensors[number::4]:
            more = names(ahead.reading("a", ref.begin))
            with lock:
                fetched.extend(more)

    threads = [threading.Thread(target=read, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(fetched) == len(set(fetched))


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="the system has no such call")
def test_a_checkpoint_asks_for_whole_tensors_in_the_order_that_it_was_told(tmp_path, monkeypatch):
    matrices = {f"m{n}.weight": bf16(np.ones((4, 32 + n))) for n in range(3)}
    write_checkpoint(tmp_path, {"model.safetensors": matrices}, {"model_type": "llama"})
    asked = []
    monkeypatch.setattr(os, "posix_fadvise", lambda fd, begin, n, how: asked.append((begin, n)))
    with open_checkpoint(tmp_path) as checkpoint:
        order = [checkpoint.weights[f"m{n}.weight"] for n in (2, 0)]
        checkpoint.will_read(order)
        assert asked == [(w.data.begin, w.data.n_bytes) for w in order]
        checkpoint.pread(order[0].data, 0, 4)
