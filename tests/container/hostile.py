"""GGUF files that break one rule each, for the reader's tests and the comparison with ggml."""

from __future__ import annotations

import struct

from quantkit.types import GgmlType
from tests.builders.gguf import (
    ARRAY,
    BOOL,
    I32,
    STRING,
    U8,
    U32,
    U64,
    array,
    gguf_bytes,
    info,
    kv,
    text,
)

ONE = struct.pack("<I", 1)
F32_ROW = b"\0" * 128  # data of one 32-wide F32 row
Q8_1, Q8_K = 9, 15


def aligned_to(value: int, type_: int = U32) -> bytes:
    return kv("general.alignment", type_, struct.pack("<I", value))


def one_tensor(entry: bytes, data: bytes = F32_ROW, **lies: int) -> bytes:
    return gguf_bytes(infos=[entry], data=data, **lies)


# name: (file, part of the message)
HOSTILE: dict[str, tuple[bytes, str]] = {
    # preamble
    "empty file": (b"", "ends early"),
    "three bytes": (b"GGU", "ends early"),
    "magic alone": (b"GGUF", "ends early"),
    "other magic": (gguf_bytes(magic=b"FUGG"), "not a GGUF file"),
    "GGML's old magic": (gguf_bytes(magic=b"tjgg"), "not a GGUF file"),
    "big-endian magic": (gguf_bytes(magic=b"FUGG", version=0x03000000), "not a GGUF file"),
    "version 0": (gguf_bytes(version=0), "version 0"),
    "version 1": (gguf_bytes(version=1), "version 1"),
    "version 4": (gguf_bytes(version=4), "version 4"),
    "big-endian version": (gguf_bytes(version=0x03000000), "big-endian"),
    "no counts": (gguf_bytes()[:8], "ends early"),
    "half a count": (gguf_bytes()[:20], "ends early"),
    "negative number of tensors": (gguf_bytes(n_tensors=-1), "cannot be in"),
    "negative number of KVs": (gguf_bytes(n_kvs=-1), "cannot be in"),
    "exabytes of tensors": (gguf_bytes(n_tensors=1 << 60), "cannot be in"),
    "exabytes of KVs": (gguf_bytes(n_kvs=1 << 60), "cannot be in"),
    "a hundred tensors in 60 bytes": (
        gguf_bytes(infos=[info("a")], n_tensors=100, alignment=1),
        "cannot be in",
    ),
    "a hundred KVs in 60 bytes": (
        gguf_bytes([kv("a", U32, ONE)], n_kvs=100, data=b"\0" * 32),
        "cannot be in",
    ),
    "one KV more than there are": (
        gguf_bytes([kv("a", U32, ONE)], n_kvs=2, data=b"\0" * 64),
        "empty name",
    ),
    "one tensor more than there are": (
        one_tensor(info("a"), data=F32_ROW * 2, n_tensors=2),
        "empty name",
    ),
    # keys
    "key of 2^64 - 1 bytes": (
        gguf_bytes([text("a" * 9, length=2**64 - 1) + ONE + ONE]),
        "a name of 18446744073709551615 bytes",
    ),
    "key past the end": (gguf_bytes([text("a" * 9, length=500) + ONE + ONE]), "ends early"),
    "empty key": (gguf_bytes([kv("", U32, ONE + ONE)]), "empty name"),
    "key of 65536 bytes": (gguf_bytes([kv("k" * 65536, U32, ONE)]), "a name of 65536 bytes"),
    "key with NUL": (gguf_bytes([kv("a\0b", U32, ONE)]), "NUL"),
    "key that is not UTF-8": (gguf_bytes([kv(b"\xff\xfe", U32, ONE)]), "not UTF-8"),
    "key given twice": (gguf_bytes([kv("a", U32, ONE)] * 2), "two values"),
    # values
    "value type 13": (gguf_bytes([kv("a", 13, ONE)]), "unknown value type"),
    "negative value type": (gguf_bytes([kv("a", -1, ONE)]), "unknown value type"),
    "value cut off": (gguf_bytes([kv("a", U64, b"\1\2\3")], alignment=1), "ends early"),
    "no value": (gguf_bytes([kv("abcdef", U32, b"")], alignment=1), "ends early"),
    "truth value 2": (gguf_bytes([kv("a", BOOL, b"\2")]), "no truth value"),
    "truth value 255 in an array": (
        gguf_bytes([kv("a", ARRAY, array(BOOL, 3, b"\1\0\xff"))]),
        "no truth value",
    ),
    "array of arrays": (
        gguf_bytes([kv("a", ARRAY, array(ARRAY, 1, array(U8, 1, b"\0")))]),
        "arrays of arrays",
    ),
    "array of type 13": (gguf_bytes([kv("a", ARRAY, array(13, 1, ONE))]), "unknown value type"),
    "array of 2^64 - 1 bytes": (
        gguf_bytes([kv("a", ARRAY, array(U8, 2**64 - 1))]),
        "cannot be in",
    ),
    "array whose size wraps to 0": (
        gguf_bytes([kv("a", ARRAY, array(U64, 1 << 61))]),
        "cannot be in",
    ),
    "array of 100 million in 113 bytes": (
        gguf_bytes([kv("a", ARRAY, array(U8, 100_000_000))], data=b"\0" * 49),
        "cannot be in",
    ),
    "array one longer than the file": (
        gguf_bytes([kv("a", ARRAY, array(U8, 65, b"\0" * 64))], alignment=1),
        "cannot be in",
    ),
    "array beyond any vocabulary": (
        gguf_bytes([kv("a", ARRAY, array(U8, 5 << 20, b"\0" * (5 << 20)))]),
        "cannot be in",
    ),
    "string of 2^62 bytes": (gguf_bytes([kv("a", STRING, text("x", 1 << 62))]), "ends early"),
    "string of 2^64 - 1 bytes": (
        gguf_bytes([kv("a", STRING, text("x", 2**64 - 1))]),
        "ends early",
    ),
    "string that is not UTF-8": (gguf_bytes([kv("a", STRING, text(b"\xc0\x80"))]), "not UTF-8"),
    "string that encodes a surrogate": (
        gguf_bytes([kv("a", STRING, text(b"\xed\xa0\x80"))]),
        "not UTF-8",
    ),
    "2^40 strings": (gguf_bytes([kv("a", ARRAY, array(STRING, 1 << 40))]), "cannot be in"),
    "strings past the end": (
        gguf_bytes([kv("a", ARRAY, array(STRING, 2, text("x") + text("y", 1 << 40)))]),
        "ends early",
    ),
    "second string not UTF-8": (
        gguf_bytes([kv("a", ARRAY, array(STRING, 2, text("x") + text(b"\xff")))]),
        "string 1 of 2",
    ),
    # alignment
    "alignment that is signed": (gguf_bytes([aligned_to(32, I32)]), "expected U32"),
    "alignment 0": (gguf_bytes([aligned_to(0)]), "power of two"),
    "alignment 13": (gguf_bytes([aligned_to(13)]), "power of two"),
    "alignment 2^31": (gguf_bytes([aligned_to(1 << 31)]), "power of two"),
    # tensors
    "tensor without a name": (one_tensor(info("")), "empty name"),
    "tensor name of 64 bytes": (one_tensor(info("n" * 64)), "a name of 64 bytes"),
    "tensor name of 2^64 - 1 bytes": (
        one_tensor(text("n", 2**64 - 1) + info("a")),
        "a name of 18446744073709551615 bytes",
    ),
    "tensor name with NUL": (one_tensor(info("a\0b")), "NUL"),
    "tensor name that is not UTF-8": (one_tensor(info(b"\xff")), "not UTF-8"),
    "two tensors of one name": (
        gguf_bytes(infos=[info("a"), info("a", offset=128)], data=F32_ROW * 2),
        "two tensors",
    ),
    "no dimensions": (one_tensor(info("a", ne=()) + b"\0" * 8), "0 dimensions"),
    "five dimensions": (one_tensor(info("a", ne=(32, 1, 1, 1, 1))), "5 dimensions"),
    "2^32 - 1 dimensions": (one_tensor(info("a", n_dims=2**32 - 1)), "4294967295 dimensions"),
    "empty dimension": (one_tensor(info("a", ne=(32, 0)), data=b""), "cannot be stored"),
    "negative dimension": (one_tensor(info("a", ne=(32, 2**64 - 1))), "cannot be stored"),
    "product that wraps to 0": (
        one_tensor(info("a", ne=(1 << 32, 1 << 32)), data=b""),
        "cannot be stored",
    ),
    "product that wraps in four steps": (
        one_tensor(info("a", ne=(1 << 16,) * 4), data=b""),
        "cannot be stored",
    ),
    "bytes that wrap to 0": (
        one_tensor(info("a", ne=(1 << 61,), type_=GgmlType.I64), data=b""),
        "more than a file can have",
    ),
    "padding that wraps to 0": (
        one_tensor(info("a", ne=(4, (1 << 30) - 1, (1 << 30) + 1)), data=b""),
        "more than a file can have",
    ),
    "two sizes that wrap to 0": (
        gguf_bytes(
            infos=[
                info("a", ne=(0x7FFFFFFFFFFFFFC0,), type_=GgmlType.I8),
                info("b", (0x7FFFFFFFFFFFFFC0,), GgmlType.I8, 0x7FFFFFFFFFFFFFC0),
            ],
            data=F32_ROW,
        ),
        "its data ends at",
    ),
    "exabyte tensor in a small file": (
        one_tensor(info("a", ne=(1 << 30, 1 << 28), type_=GgmlType.Q8_0)),
        "its data ends at",
    ),
    "removed type 4": (one_tensor(info("a", type_=4)), "unknown tensor type 4"),
    "removed type 31": (one_tensor(info("a", type_=31)), "unknown tensor type 31"),
    "activation type Q8_1": (one_tensor(info("a", type_=Q8_1)), "unknown tensor type 9"),
    "activation type Q8_K": (one_tensor(info("a", (256,), Q8_K), b"\0" * 320), "tensor type 15"),
    "type 43": (one_tensor(info("a", type_=43)), "unknown tensor type 43"),
    "type of ik_llama.cpp": (one_tensor(info("a", type_=137)), "ik_llama.cpp"),
    "negative type": (one_tensor(info("a", type_=-1)), "unknown tensor type -1"),
    "rows that cut a block": (
        one_tensor(info("a", ne=(48,), type_=GgmlType.Q4_0)),
        "no multiple of the block",
    ),
    "offset that is not aligned": (one_tensor(info("a", offset=16)), "leaves a gap"),
    "offset of 2^63": (one_tensor(info("a", offset=1 << 63)), "leaves a gap"),
    "tensors with a gap": (
        gguf_bytes(infos=[info("a"), info("b", offset=256)], data=F32_ROW * 3),
        "leaves a gap",
    ),
    "tensors that overlap": (
        gguf_bytes(infos=[info("a"), info("b", offset=96)], data=F32_ROW * 2),
        "overlaps",
    ),
    "tensors in another order than their data": (
        gguf_bytes(infos=[info("a", offset=128), info("b")], data=F32_ROW * 2),
        "leaves a gap",
    ),
    "offsets padded for another alignment": (
        gguf_bytes(
            [aligned_to(64)],
            [info("a", ne=(8,)), info("b", offset=32)],
            F32_ROW * 2,
            alignment=64,
        ),
        "overlaps",
    ),
    "data one byte short": (one_tensor(info("a"), data=F32_ROW[:-1]), "its data ends at"),
    "no data": (one_tensor(info("a"), data=b""), "its data ends at"),
    "bytes behind the data": (one_tensor(info("a"), data=F32_ROW + b"\0"), "behind the last"),
    "bytes behind a header": (gguf_bytes(data=b"\0"), "behind the last"),
}
