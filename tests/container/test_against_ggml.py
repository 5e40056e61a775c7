"""The reader and the content check next to ggml's own."""

from __future__ import annotations

import random
import struct
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantkit.container.content import first_nonfinite
from quantkit.container.reader import GgufFile, read_gguf
from quantkit.errors import GgufError
from quantkit.types import GgmlType
from tests.builders.gguf import finite_bytes
from tests.container import ggml
from tests.container.hostile import HOSTILE
from tests.container.test_reader import N_HEADER, VALID, mutate

# Hostile files that ggml takes: it checks the data's extent only when it loads the data, reads
# text as bytes and any non-zero byte as true, leaves it to its callers what to do with empty or
# oddly named tensors, and as of release 0.20.2 misses the last four, where sizes wrap.
LAX_IN_GGML = {
    "key of 65536 bytes",
    "key with NUL",
    "key that is not UTF-8",
    "truth value 2",
    "truth value 255 in an array",
    "array beyond any vocabulary",
    "string that is not UTF-8",
    "string that encodes a surrogate",
    "second string not UTF-8",
    "tensor without a name",
    "tensor name with NUL",
    "tensor name that is not UTF-8",
    "no dimensions",
    "empty dimension",
    "exabyte tensor in a small file",
    "two sizes that wrap to 0",
    "activation type Q8_1",
    "activation type Q8_K",
    "data one byte short",
    "no data",
    "bytes behind the data",
    "bytes behind a header",
    "alignment 2^31",
    "product that wraps to 0",
    "product that wraps in four steps",
    "padding that wraps to 0",
}


def test_ggml_refuses_the_hostile_files_too_but_for_a_known_list():
    accepted = {case for case, (content, _) in HOSTILE.items() if ggml.parse(content)}
    assert accepted <= LAX_IN_GGML


def as_parsed(file: GgufFile) -> ggml.Parsed:
    return ggml.Parsed(
        alignment=file.alignment,
        kvs=[(key.encode(), kv.type, kv.item) for key, kv in file.kvs.items()],
        tensors=[
            (t.name.encode(), t.type, (*t.shape[::-1], 1, 1, 1)[:4], t.begin, t.n_bytes)
            for t in file.tensors
        ],
    )


def mutants() -> Iterator[bytes]:
    """Every header of `VALID` with one bit flipped, then random mutations."""
    for at in range(8 * N_HEADER):
        content = bytearray(VALID)
        content[at // 8] ^= 1 << at % 8
        yield bytes(content)
    rng = random.Random(7)
    for _ in range(2000):
        yield mutate(rng.randint)


def test_what_the_reader_accepts_ggml_accepts_and_understands_alike(tmp_path):
    path = tmp_path / "file.gguf"
    n_accepted = 0
    for content in mutants():
        path.write_bytes(content)
        try:
            ours = read_gguf(path)
        except GgufError:
            continue
        n_accepted += 1
        assert ggml.parse(content) == as_parsed(ours)
    assert n_accepted > 400


def test_an_unmutated_file_is_understood_alike(tmp_path):
    path = tmp_path / "file.gguf"
    path.write_bytes(VALID)
    assert ggml.parse(VALID) == as_parsed(read_gguf(path))


@pytest.mark.parametrize("type_", GgmlType)
def test_sizes_are_those_of_ggml(type_):
    lib = ggml.library()
    lib.ggml_blck_size.restype = lib.ggml_type_size.restype = ggml.ctypes.c_int64
    assert type_.block_size == lib.ggml_blck_size(int(type_))
    assert type_.block_bytes == lib.ggml_type_size(int(type_))


@pytest.mark.parametrize("type_", GgmlType)
def test_any_single_byte_of_a_block_is_judged_as_ggml_judges_it(type_):
    good = finite_bytes(5 * type_.block_bytes, seed=int(type_))
    assert first_nonfinite(type_, good) is None
    for at in range(2 * type_.block_bytes, 3 * type_.block_bytes):
        for value in (0x7C, 0x7F, 0x80, 0xFC, 0xFF):
            data = bytearray(good)
            data[at] = value
            expected = None if ggml.rows_are_valid(type_, bytes(data)) else 2
            assert first_nonfinite(type_, data) == expected


@settings(max_examples=400, deadline=None)
@given(type_=st.sampled_from(list(GgmlType)), n=st.integers(0, 9), seed=st.integers(0, 2**32))
def test_random_blocks_are_judged_as_ggml_judges_them(type_, n, seed):
    # Every other byte is one that exponents of all ones are made of.
    rng = np.random.default_rng(seed)
    data = rng.integers(0, 256, n * type_.block_bytes, dtype=np.uint8)
    extreme = rng.random(data.size) < rng.choice([0.02, 0.3])
    data[extreme] = rng.choice([0x7C, 0x7F, 0x80, 0xFF], int(extreme.sum()))
    raw = data.tobytes()
    step = type_.block_bytes
    blocks = [raw[i : i + step] for i in range(0, len(raw), step)]
    bad = [i for i, block in enumerate(blocks) if not ggml.rows_are_valid(type_, block)]
    assert first_nonfinite(type_, raw) == (bad[0] if bad else None)


@pytest.mark.parametrize(
    ("type_", "value", "is_finite"),
    [
        ("f", 3.4028235e38, True),
        ("f", float("inf"), False),
        ("f", float("-inf"), False),
        ("f", float("nan"), False),
        ("d", 1e38, True),
        ("d", 1e39, False),
        ("d", float("nan"), False),
        ("e", 65504.0, True),
        ("e", float("-inf"), False),
    ],
)
def test_plain_floats_are_judged_by_value(type_, value, is_finite):
    ggml_type = {"f": GgmlType.F32, "d": GgmlType.F64, "e": GgmlType.F16}[type_]
    data = struct.pack(f"<4{type_}", 0, 1, value, -1)
    assert first_nonfinite(ggml_type, data) == (None if is_finite else 2)


def test_a_signalling_nan_is_found_without_a_warning():
    data = struct.pack("<3Q", 0, 0x7FF0_0000_0000_0001, 0)
    assert first_nonfinite(GgmlType.F64, data) == 1


def test_the_first_bad_block_is_told():
    data = np.zeros((10, 34), np.uint8)
    data[[4, 7], 1] = 0x7C
    assert first_nonfinite(GgmlType.Q8_0, memoryview(data.tobytes())) == 4


def test_no_blocks_are_finite():
    assert first_nonfinite(GgmlType.IQ1_M, b"") is None
