"""Typed values: the bytes of each, and everything that is no value of its type."""

from __future__ import annotations

import math
import time

import numpy as np
import pytest

from quantkit.container.kv import (
    boolean,
    encode_kv,
    f32,
    f32s,
    i32,
    i32s,
    string,
    strings,
    u16,
    u32,
    u32s,
)
from quantkit.errors import GgufError
from quantkit.types import Kv, KvType

KEY = "0100000000000000" + "6b"  # length, then "k"


@pytest.mark.parametrize(
    ("kv", "expected"),
    [
        (Kv(KvType.U8, 255), "00000000 ff"),
        (Kv(KvType.I8, -128), "01000000 80"),
        (u16(0x1234), "02000000 3412"),
        (Kv(KvType.I16, -2), "03000000 feff"),
        (u32(0x12345678), "04000000 78563412"),
        (i32(-2), "05000000 feffffff"),
        (f32(1.5), "06000000 0000c03f"),
        (boolean(True), "07000000 01"),
        (string("é"), "08000000 0200000000000000 c3a9"),
        (string(""), "08000000 0000000000000000"),
        (Kv(KvType.U64, 1 << 63), "0a000000 0000000000000080"),
        (Kv(KvType.I64, -1), "0b000000 ffffffffffffffff"),
        (Kv(KvType.F64, 1.5), "0c000000 000000000000f83f"),
        (i32s([1, -1]), "09000000 05000000 0200000000000000 01000000 ffffffff"),
        (u32s([1]), "09000000 04000000 0100000000000000 01000000"),
        (f32s([1.5]), "09000000 06000000 0100000000000000 0000c03f"),
        (strings(["a", ""]), "09000000 08000000 0200000000000000 0100000000000000 61 " + "00" * 8),
        (strings([]), "09000000 08000000 0000000000000000"),
    ],
)
def test_the_bytes_of_a_value(kv, expected):
    assert encode_kv("k", kv).hex() == KEY + expected.replace(" ", "")


@pytest.mark.parametrize(
    ("kv", "message"),
    [
        (u32(-1), "does not fit U32"),
        (u32(1 << 32), "does not fit U32"),
        (u16(1 << 16), "does not fit U16"),
        (i32(1 << 31), "does not fit I32"),
        (i32s([0, -(1 << 31) - 1]), "does not fit I32"),
        (u32(True), "expected U32, got bool"),
        (u32(1.0), "expected U32, got float"),
        (u32("1"), "expected U32, got str"),
        (u32(None), "expected U32, got NoneType"),
        (u32(np.uint32(1)), "expected U32, got uint32"),
        (i32s([1, True]), "expected I32, got bool"),
        (boolean(1), "expected BOOL, got int"),
        (string(b"x"), "expected STRING, got bytes"),
        (string("\ud800"), "not Unicode"),
        (strings(["a", "\udfff"]), "string 1 is not Unicode"),
        (strings(["a", None]), "expected STRING, got NoneType"),
        (Kv(KvType.F32, 1e39), "does not fit F32"),
        (Kv(KvType.F32, True), "expected F32, got bool"),
        (Kv(KvType.F32, 10**400), "does not fit F32"),
        (Kv(KvType.F32, math.nan), "NaN and infinity"),
        (Kv(KvType.F64, math.inf), "NaN and infinity"),
        (Kv(KvType.F64, 10**400), "does not fit F64"),
        (Kv(KvType.ARRAY, [1]), "needs an item type"),
        (Kv(KvType.ARRAY, [[1]], KvType.ARRAY), "needs an item type"),
        (Kv(KvType.ARRAY, "abc", KvType.STRING), "expected a list, got str"),
        (Kv(KvType.U32, 1, KvType.U32), "has no item type"),
    ],
)
def test_what_is_no_value_of_its_type_is_refused_with_its_key(kv, message):
    with pytest.raises(GgufError, match=message) as error:
        encode_kv("some.key", kv)
    assert error.value.where == "KV some.key"


@pytest.mark.parametrize("value", [1e39, -1e39, 10**400], ids=["large", "small", "int"])
def test_a_number_beyond_f32_makes_no_f32(value):
    with pytest.raises(GgufError, match="does not fit F32"):
        f32(value)


@pytest.mark.parametrize("value", [True, "1", None])
def test_what_is_no_number_makes_no_f32(value):
    with pytest.raises(GgufError, match="expected a number"):
        f32s([value])


def test_an_f32_is_rounded_when_it_is_made():
    assert f32(0.1).value == float(np.float32(0.1))
    assert f32s([0.1, 3]).value == [float(np.float32(0.1)), 3.0]


@pytest.mark.parametrize("key", ["", "k" * 65536, "a\0b", "\ud800"])
def test_an_illegal_key_is_refused(key):
    with pytest.raises(GgufError):
        encode_kv(key, u32(1))


def test_a_large_vocabulary_is_encoded_fast():
    vocabulary = strings([f"token{i}é" for i in range(163_840)])
    best = math.inf
    for _ in range(3):
        start = time.process_time()
        encode_kv("tokenizer.ggml.tokens", vocabulary)
        best = min(best, time.process_time() - start)
    assert best < 0.3
