"""The reader accepts the format and nothing else, in bounded time and memory."""

from __future__ import annotations

import math
import os
import random
import struct
import time
import tracemalloc

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from quantkit.container.kv import CODES
from quantkit.container.reader import MAX_HEADER_BYTES, MAX_ITEMS, MAX_STRINGS, GgufFile, read_gguf
from quantkit.errors import GgufError
from quantkit.types import GgmlType, Kv, KvType
from tests.builders.gguf import (
    ARRAY,
    BOOL,
    F32,
    I32,
    STRING,
    U8,
    U32,
    array,
    gguf_bytes,
    info,
    kv,
    text,
)
from tests.container.hostile import F32_ROW, HOSTILE, ONE, aligned_to, one_tensor


@pytest.fixture
def parse(tmp_path):
    path = tmp_path / "file.gguf"

    def parse(content: bytes) -> GgufFile:
        path.write_bytes(content)
        return read_gguf(path)

    return parse


@pytest.mark.parametrize("case", HOSTILE)
def test_reader_refuses(parse, tmp_path, case):
    content, message = HOSTILE[case]
    with pytest.raises(GgufError) as error:
        parse(content)
    assert message in str(error.value)
    assert error.value.where.startswith(str(tmp_path / "file.gguf"))


@pytest.mark.parametrize("case", HOSTILE)
def test_refusing_takes_little_time_and_memory(parse, case):
    content, _ = HOSTILE[case]
    tracemalloc.start()
    start = time.process_time()
    try:
        with pytest.raises(GgufError):
            parse(content)
        seconds = time.process_time() - start
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert seconds < 0.1
    assert peak < 32 << 20


@pytest.mark.parametrize("version", [2, 3])
def test_reader_accepts_versions_2_and_3(parse, version):
    gguf = parse(one_tensor(info("a", ne=(16, 2)), version=version))
    assert gguf.version == version
    (tensor,) = gguf.tensors
    assert (tensor.name, tensor.shape, tensor.type) == ("a", (2, 16), GgmlType.F32)
    assert (tensor.begin, tensor.n_bytes) == (gguf.data_begin, 128)


@pytest.mark.parametrize("type_", [t for t in KvType if t in CODES])
def test_reader_returns_each_scalar_with_its_type(parse, type_):
    value = {KvType.F32: 1.5, KvType.F64: -0.1, KvType.BOOL: True}.get(type_, 100)
    payload = struct.pack("<" + CODES[type_], value)
    assert parse(gguf_bytes([kv("k", type_, payload)])).kvs == {"k": Kv(type_, value)}


@pytest.mark.parametrize(
    ("payload", "kv_read"),
    [
        (array(I32, 2, struct.pack("<2i", -1, 7)), Kv(KvType.ARRAY, [-1, 7], KvType.I32)),
        (array(BOOL, 2, b"\1\0"), Kv(KvType.ARRAY, [True, False], KvType.BOOL)),
        (array(STRING, 2, text("") + text("é\0")), Kv(KvType.ARRAY, ["", "é\0"], KvType.STRING)),
        (array(F32, 0), Kv(KvType.ARRAY, [], KvType.F32)),
    ],
)
def test_reader_returns_arrays_as_lists(parse, payload, kv_read):
    assert parse(gguf_bytes([kv("k", ARRAY, payload)])).kvs == {"k": kv_read}


def test_reader_keeps_the_file_order_of_keys_and_tensors(parse):
    gguf = parse(
        gguf_bytes(
            [kv("z", U32, ONE), kv("a", U32, ONE)],
            [info("z"), info("a", offset=128)],
            F32_ROW * 2,
        )
    )
    assert list(gguf.kvs) == ["z", "a"]
    assert [t.name for t in gguf.tensors] == ["z", "a"]


def test_reader_accepts_a_header_without_padding_if_there_are_no_tensors(parse):
    content = gguf_bytes([kv("a", U32, ONE)], alignment=1)
    gguf = parse(content)
    assert gguf.data_begin == gguf.n_bytes == len(content)


def test_reader_accepts_a_last_tensor_without_padding(parse):
    assert parse(one_tensor(info("a", ne=(3,)), data=b"\0" * 12)).tensors[0].n_bytes == 12


@pytest.mark.parametrize("alignment", [1, 8, 64, 4096])
def test_reader_follows_the_declared_alignment(parse, alignment):
    content = gguf_bytes(
        [aligned_to(alignment)],
        [info("a", ne=(alignment,), type_=GgmlType.I8), info("b", offset=alignment)],
        b"\0" * (alignment + 128),
        alignment=alignment,
    )
    gguf = parse(content)
    assert gguf.alignment == alignment
    assert [t.begin for t in gguf.tensors] == [gguf.data_begin, gguf.data_begin + alignment]
    assert gguf.data_begin % alignment == 0


def test_reader_names_key_and_tensor_without_their_control_characters(parse):
    with pytest.raises(GgufError) as error:
        parse(gguf_bytes([kv("\x1b[31mred\u202e", 99, ONE)]))
    assert "KV \\x1b[31mred\\u202e" in str(error.value)
    with pytest.raises(GgufError) as error:
        parse(one_tensor(info("\x1b]0;title\7", type_=99)))
    assert "tensor \\x1b]0;title\\x07" in str(error.value)


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: None], ids=["fifo", "dir", "-"])
def test_reader_refuses_what_is_no_file(tmp_path, make):
    path = tmp_path / "x.gguf"
    make(path)
    with pytest.raises(GgufError, match=r"not a regular file|cannot be read"):
        read_gguf(path)


def test_reader_does_not_read_tensor_data(tmp_path):
    n = 1 << 40
    path = tmp_path / "sparse.gguf"
    path.write_bytes(one_tensor(info("a", ne=(n,), type_=GgmlType.I8), data=b""))
    os.truncate(path, path.stat().st_size + n)
    tracemalloc.start()
    try:
        (tensor,) = read_gguf(path).tensors
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert tensor.n_bytes == n
    assert peak < 4 << 20


def test_reader_bounds_the_header_of_a_huge_file(tmp_path):
    # 1 TiB of zeros would have room for every count; the cap on the header does not.
    path = tmp_path / "sparse.gguf"
    path.write_bytes(gguf_bytes([kv("a", STRING, text("", length=1 << 39))]))
    os.truncate(path, 1 << 40)
    with pytest.raises(GgufError, match=f"header is larger than {MAX_HEADER_BYTES}"):
        read_gguf(path)
    path.write_bytes(gguf_bytes([kv("a", ARRAY, array(U8, MAX_HEADER_BYTES // 2))]))
    os.truncate(path, 1 << 40)
    with pytest.raises(GgufError, match="cannot be in"):
        read_gguf(path)


def test_the_elements_of_all_arrays_together_are_bounded(parse):
    n = MAX_ITEMS // 2 + 1
    arrays = [kv(key, ARRAY, array(U8, n, b"\0" * n)) for key in ("a", "b")]
    assert len(parse(gguf_bytes(arrays[:1])).kvs["a"].value) == n
    with pytest.raises(GgufError, match="KV b: an array of"):
        parse(gguf_bytes(arrays))


def test_the_texts_of_all_arrays_together_are_bounded(parse):
    n = MAX_STRINGS // 2 + 1
    arrays = [kv(key, ARRAY, array(STRING, n, text("") * n)) for key in ("a", "b")]
    assert len(parse(gguf_bytes(arrays[:1])).kvs["a"].value) == n
    with pytest.raises(GgufError, match="KV b: an array of"):
        parse(gguf_bytes(arrays))


def test_reader_takes_a_large_vocabulary_in_its_stride(parse):
    tokens = [f"token{i}é" for i in range(163_840)]
    content = gguf_bytes([kv("t", ARRAY, array(STRING, len(tokens), b"".join(map(text, tokens))))])
    best = math.inf
    for _ in range(3):
        start = time.process_time()
        gguf = parse(content)
        best = min(best, time.process_time() - start)
    assert gguf.kvs["t"].value == tokens
    assert best < 0.3


@pytest.mark.parametrize("n_long", [(1 << 20) - 30, 3 << 20])
def test_strings_across_read_steps_are_whole(parse, n_long):
    values = ["a" * n_long, "bc", "d" * 40]
    content = gguf_bytes([kv("t", ARRAY, array(STRING, 3, b"".join(map(text, values))))])
    assert parse(content).kvs["t"].value == values


VALID = gguf_bytes(
    [
        kv("general.architecture", STRING, text("deepseek2")),
        aligned_to(32),
        kv("tokens", ARRAY, array(STRING, 3, text("a") + text("bc") + text("\u00e9"))),
        kv("types", ARRAY, array(I32, 3, struct.pack("<3i", 1, 2, 3))),
        kv("flag", BOOL, b"\1"),
        kv("flags", ARRAY, array(BOOL, 2, b"\0\1")),
        kv("scale", F32, struct.pack("<f", 1.25)),
    ],
    [
        info("token_embd.weight", (32, 2), GgmlType.Q8_0),
        info("blk.0.norm", (4,), GgmlType.F32, 96),
        info("blk.0.up", (256, 1, 2), GgmlType.IQ2_XXS, 128),
    ],
    b"\0" * 288,
)
N_HEADER = len(VALID) - 288


def mutate(draw_int) -> bytes:
    """`VALID` after a few changes: bytes set, runs removed, inserted or copied, words made huge."""
    content = bytearray(VALID)
    for _ in range(draw_int(1, 3)):
        at = draw_int(0, N_HEADER - 1)
        kind = draw_int(0, 5)
        if kind <= 1:
            content[at] = draw_int(0, 255)
        elif kind == 2:
            del content[at : at + draw_int(1, 16)]
        elif kind == 3:
            content[at:at] = bytes(draw_int(0, 255) for _ in range(draw_int(1, 8)))
        elif kind == 4:
            content[at : at + 8] = struct.pack("<Q", (1 << draw_int(0, 63)) - draw_int(0, 1))
        else:
            source = draw_int(0, N_HEADER - 1)
            content[at : at + 16] = content[source : source + 16]
    return bytes(content)


def test_the_file_that_is_mutated_is_valid(parse):
    assert len(parse(VALID).tensors) == 3


@settings(
    max_examples=600, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_a_mutated_file_is_refused_or_parsed(parse, data):
    content = mutate(lambda low, high: data.draw(st.integers(low, high)))
    start = time.process_time()
    try:
        gguf = parse(content)
    except GgufError as error:
        assert error.message
    else:
        assert all(t.begin + t.n_bytes <= len(content) for t in gguf.tensors)
    assert time.process_time() - start < 0.1


@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(content=st.binary(max_size=200))
def test_any_bytes_behind_the_magic_are_refused_or_parsed(parse, content):
    try:
        parse(b"GGUF" + struct.pack("<I", 3) + content)
    except GgufError as error:
        assert error.message


def test_every_truncation_of_a_file_is_refused(parse):
    n_needed = len(VALID) - 28  # the padding behind the last tensor may be missing
    parse(VALID[:n_needed])
    for n in range(n_needed):
        with pytest.raises(GgufError):
            parse(VALID[:n])


def test_seeded_mutations_end_in_an_error_or_a_file(parse):
    rng = random.Random(20)
    n_refused = 0
    for _ in range(3000):
        try:
            parse(mutate(rng.randint))
        except GgufError:
            n_refused += 1
    assert 1500 < n_refused < 3000
