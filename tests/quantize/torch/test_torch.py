"""The torch searches, on CPU tensors: the kernels' blocks, up to ties."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import get_args

import numpy as np
import pytest
import torch

from quantkit.errors import UsageError
from quantkit.quantize import decode
from quantkit.quantize.codec import Blocks, Effort, How, Weighting, codec_of, encodable
from quantkit.quantize.torch import _run, supported, torch_codec
from quantkit.types import GgmlType
from tests.quantize import laws
from tests.quantize.ggml import ggml_decode, ggml_valid

TYPES = sorted(supported(), key=lambda t: t.name)
EFFORTS: tuple[Effort, ...] = get_args(Effort)
WEIGHTINGS: tuple[Weighting, ...] = get_args(Weighting)
every_type = pytest.mark.parametrize("type_", TYPES, ids=lambda t: t.name)
every_effort = pytest.mark.parametrize(
    "effort", [pytest.param(e, marks=[pytest.mark.slow] * (e == "best")) for e in EFFORTS]
)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def both(type_: GgmlType, x: laws.F32, q: laws.F32 | None, how: How) -> tuple[Blocks, Blocks]:
    return codec_of(type_).encode(x, q, how), torch_codec(type_, "cpu").encode(x, q, how)


def error(x: laws.F32, blocks: Blocks, type_: GgmlType, q: laws.F32 | None) -> float:
    """sum w (x - x^)^2."""
    w = np.ones(x.shape[1]) if q is None else q.astype(np.float64)
    return float((w * (x.astype(np.float64) - decode(blocks, type_.name)) ** 2).sum())


@every_type
@every_effort
@pytest.mark.parametrize(
    ("weighted", "weighting"),
    [(True, "importance"), (True, "ggml"), (False, "importance")],
    ids=["importance", "ggml", "uniform"],
)
def test_blocks_are_those_of_the_kernels(
    type_: GgmlType, effort: Effort, weighted: bool, weighting: Weighting
) -> None:
    """Candidates that are equal but for rounding turn up in one block of a few hundred at most."""
    x = np.concatenate([laws.gauss(24), laws.student(24)])
    q = laws.log_normal() if weighted else None
    theirs, ours = both(type_, x, q, How(effort, weighting))
    same = (ours == theirs).reshape(-1, type_.block_bytes).all(axis=1)
    assert same.mean() >= 0.98
    assert error(x, ours, type_, q) == pytest.approx(error(x, theirs, type_, q), rel=0.01)


@every_type
@pytest.mark.parametrize("data", ["lattice", "positive"])
def test_ties_cost_nothing(type_: GgmlType, data: str) -> None:
    """Which of two equals wins may decide what a search finds next, for better or worse."""
    x = laws.lattice(32) if data == "lattice" else laws.positive(32)
    for q in (None, laws.log_normal()):
        theirs, ours = (error(x, b, type_, q) for b in both(type_, x, q, How()))
        assert ours == pytest.approx(theirs, rel=2e-3, abs=1e-12)


@every_type
def test_blocks_decode_to_ggmls_floats(type_: GgmlType) -> None:
    for q in (None, laws.log_normal()):
        blocks = torch_codec(type_, "cpu").encode(laws.student(8), q, How())
        ours, theirs = decode(blocks, type_.name), ggml_decode(blocks, type_)
        assert np.array_equal(ours.view(np.uint32), theirs.view(np.uint32))


@every_type
@every_effort
def test_hostile_weights_stay_finite(type_: GgmlType, effort: Effort) -> None:
    """Every hostile row under every hostile importance, side by side."""
    columns = [q for q in laws.hostile_importance(512).values() if q is not None]
    row = np.stack(list(laws.hostile_rows(512).values()))
    x = np.concatenate([row] * len(columns), axis=1)
    encode = torch_codec(type_, "cpu").encode
    for q in (None, np.concatenate(columns)):
        for weighting in WEIGHTINGS:
            blocks = encode(x, q, How(effort, weighting))
            decoded = decode(blocks, type_.name)
            assert np.isfinite(decoded).all(), weighting
            assert ggml_valid(blocks, type_), weighting
            assert not decoded[:2].any(), weighting


@every_type
def test_bytes_do_not_depend_on_tiles_chunks_or_threads(
    type_: GgmlType, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode, q, how = torch_codec(type_, "cpu").encode, laws.log_normal(), How()
    x = laws.student(8)
    whole = encode(x, q, how)
    assert np.array_equal(encode(x, q, how), whole)
    parts = [encode(x[i : i + 5], q, how) for i in range(0, 8, 5)]
    assert np.array_equal(np.concatenate(parts), whole)
    with ThreadPoolExecutor(2) as pool:
        halves = pool.map(lambda part: encode(part, q, how), (x[:3], x[3:]))
        assert np.array_equal(np.concatenate(list(halves)), whole)
    monkeypatch.setattr(_run, "CHUNK_CPU", 1)
    assert np.array_equal(encode(x, q, how), whole)


@every_type
def test_weights_in_any_memory_order_are_read_and_left_alone(type_: GgmlType) -> None:
    encode = torch_codec(type_, "cpu").encode
    for cols in (type_.block_size, laws.COLS):
        x = laws.gauss(1, cols)
        x.setflags(write=False)
        frozen = encode(x, None, How())
        loose = x.copy()
        assert np.array_equal(encode(loose, None, How()), frozen)
        assert np.array_equal(loose, x)
    x = laws.gauss(4)
    assert np.array_equal(encode(np.asfortranarray(x), None, How()), encode(x, None, How()))


@every_type
def test_no_rows_make_no_blocks(type_: GgmlType) -> None:
    blocks = torch_codec(type_, "cpu").encode(np.empty((0, laws.COLS), np.float32), None, How())
    assert blocks.shape == (0, type_.row_bytes(laws.COLS))


def test_a_row_longer_than_a_chunk_is_one_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    encode, x = torch_codec(GgmlType.Q4_K, "cpu").encode, laws.gauss(3, 4096)
    whole = encode(x, None, How())
    monkeypatch.setattr(_run, "CHUNK_CPU", 512)
    assert np.array_equal(encode(x, None, How()), whole)


def test_only_floats_are_left_to_the_kernels() -> None:
    floats = {GgmlType.F32, GgmlType.F16, GgmlType.BF16}
    assert encodable() - supported() == floats
    for type_ in floats:
        assert torch_codec(type_, "cpu") is codec_of(type_)


def test_types_that_cannot_be_encoded_are_refused() -> None:
    with pytest.raises(UsageError, match="I32 cannot be encoded"):
        torch_codec(GgmlType.I32, "cpu")


@pytest.mark.parametrize("device", ["graphics", "cuda:99", "meta", ""])
def test_a_device_that_is_not_there_is_refused(device: str) -> None:
    with pytest.raises(UsageError, match=f"device '{device}' cannot be used"):
        torch_codec(GgmlType.Q4_K, device)


def test_torch_is_imported_only_for_a_codec() -> None:
    code = (
        "import sys, quantkit.quantize, quantkit.quantize.torch as backend\n"
        "backend.supported()\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_without_torch_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    code = (
        "import sys\n"
        "sys.modules['torch'] = None\n"
        "from quantkit.quantize.torch import torch_codec\n"
        "from quantkit.types import GgmlType\n"
        "from quantkit.errors import UsageError\n"
        "try:\n"
        "    torch_codec(GgmlType.Q4_K, 'cuda')\n"
        "except UsageError as error:\n"
        "    assert 'quantkit[calibrate]' in str(error)\n"
        "else:\n"
        "    raise SystemExit('no error')\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
