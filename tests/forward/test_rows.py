"""Hidden states in memory and in a file are the same to whoever uses them."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantkit.forward.rows import FileRows, RamRows, rows_within

N_ROWS = 23


@st.composite
def operations(draw):
    """(name, first row or index, seed) triples."""
    kind = draw(st.sampled_from(["read", "write", "take", "add"]))
    if kind in ("read", "write"):
        begin = draw(st.integers(0, N_ROWS))
        return kind, (begin, draw(st.integers(begin, N_ROWS))), draw(st.integers(0, 99))
    index = draw(st.sets(st.integers(0, N_ROWS - 1)))
    return kind, sorted(index), draw(st.integers(0, 99))


def perform(rows, operation):
    kind, where, seed = operation
    if kind == "read":
        return rows.read(*where)
    n = where[1] - where[0] if kind == "write" else len(where)
    x = torch.randn(n, rows.n_cols, generator=torch.Generator().manual_seed(seed))
    if kind == "write":
        return rows.write(where[0], x)
    index = torch.tensor(where, dtype=torch.int64)
    return rows.take(index) if kind == "take" else rows.add(index, x)


@settings(max_examples=150, deadline=None)
@given(st.lists(operations(), max_size=12), st.integers(1, 5))
def test_a_file_behaves_as_memory_does(tmp_path_factory, steps, n_cols):
    ram = RamRows(N_ROWS, n_cols)
    file = FileRows(N_ROWS, n_cols, tmp_path_factory.getbasetemp() / "rows")
    for step in [*steps, ("read", (0, N_ROWS), 0)]:
        a, b = perform(ram, step), perform(file, step)
        assert (a is None and b is None) or torch.equal(a, b)


@pytest.mark.parametrize("in_memory", [True, False])
def test_what_was_read_is_a_copy(in_memory, tmp_path):
    rows = rows_within(tmp_path, in_memory=in_memory)(4, 2)
    for copy in (rows.read(0, 4), rows.take(torch.arange(4))):
        copy.fill_(1)
    assert not rows.read(0, 4).any()


def test_more_than_one_piece_is_moved_whole(tmp_path, monkeypatch):
    monkeypatch.setattr("quantkit.forward.rows._PIECE", 28)
    rows = FileRows(9, 3, tmp_path)
    x = torch.arange(27, dtype=torch.float32).view(9, 3)
    rows.write(0, x)
    assert torch.equal(rows.read(1, 9), x[1:])


def test_a_transposed_block_is_written_in_order(tmp_path):
    rows = FileRows(2, 3, tmp_path)
    x = torch.arange(6, dtype=torch.float32).view(3, 2).T
    rows.write(0, x)
    assert torch.equal(rows.read(0, 2), x)


def test_nothing_is_left_in_the_folder(tmp_path):
    rows = FileRows(100, 8, tmp_path)
    rows.write(0, torch.ones(100, 8))
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_left_of_a_killed_process(tmp_path):
    code = (
        "import sys, time, torch\n"
        "from pathlib import Path\n"
        "from quantkit.forward.rows import FileRows\n"
        "rows = FileRows(1000, 64, Path(sys.argv[1]))\n"
        "rows.write(0, torch.ones(1000, 64))\n"
        "print('written', flush=True)\n"
        "time.sleep(60)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, tmp_path], stdout=subprocess.PIPE)
    with process:
        assert process.stdout.readline() == b"written\n"
        process.kill()
        process.wait(timeout=20)
    assert list(tmp_path.iterdir()) == []


def test_resident_memory_is_not_what_the_file_holds(tmp_path):
    """The file is not mapped: its pages count as cache, not as the process's."""
    rows = FileRows(1 << 16, 512, tmp_path)  # 128 MiB
    before = resident_bytes()
    x = torch.ones(1 << 10, 512)
    for begin in range(0, 1 << 16, 1 << 10):
        rows.write(begin, x)
        rows.read(begin, begin + (1 << 10))
    assert resident_bytes() - before < 40 << 20


def resident_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


def test_take_of_nothing_is_empty(tmp_path):
    assert FileRows(3, 2, tmp_path).take(torch.empty(0, dtype=torch.int64)).shape == (0, 2)
    assert np.array_equal(RamRows(3, 2).take(torch.empty(0, dtype=torch.int64)).shape, (0, 2))
