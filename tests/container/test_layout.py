"""Layouts: limits hold, offsets are what readers expect, and what is written is read back."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantkit.container.kv import CODES, boolean, encode_kv, f32, i32, string, strings, u16, u32
from quantkit.container.layout import (
    ShardLayout,
    TensorEntry,
    TensorPlace,
    lay_out,
    padded,
)
from quantkit.container.names import ALIGNMENT, SPLIT_KEYS
from quantkit.container.reader import read_gguf
from quantkit.container.shardset import open_shards
from quantkit.errors import GgufError, UsageError
from quantkit.types import GgmlType, Kv, KvType
from tests.builders.gguf import write_shards

KVS = {
    "general.architecture": string("deepseek2"),
    "deepseek2.block_count": u32(2),
    "deepseek2.rope.freq_base": f32(50000.0),
    "tokenizer.ggml.tokens": strings(["a", "é", ""]),
    "flag": boolean(False),
    "signed": i32(-5),
}
TENSORS = [
    TensorEntry("token_embd.weight", (4, 64), GgmlType.Q8_0),
    TensorEntry("blk.0.norm.weight", (3,), GgmlType.F32),
    TensorEntry("blk.0.up.weight", (2, 3, 256), GgmlType.IQ2_XXS),
    TensorEntry("output.weight", (2, 2, 2, 32), GgmlType.Q4_0),
]


def rows(n: int, n_cols: int = 32) -> list[TensorEntry]:
    return [TensorEntry(f"t{i}", (n_cols,), GgmlType.F32) for i in range(n)]


def test_a_single_file_has_no_split_keys(tmp_path):
    (layout,) = lay_out("m", KVS, TENSORS, max_shard_bytes=None)
    write_shards(tmp_path, [layout])
    assert layout.file_name == "m.gguf"
    assert read_gguf(tmp_path / "m.gguf").kvs == KVS


def test_shards_are_numbered_and_only_the_first_carries_the_metadata(tmp_path):
    layouts = lay_out("m", KVS, TENSORS, max_shard_bytes=None, max_shard_tensors=2)
    write_shards(tmp_path, layouts)
    assert [layout.file_name for layout in layouts] == [
        "m-00001-of-00002.gguf",
        "m-00002-of-00002.gguf",
    ]
    first, second = (read_gguf(tmp_path / layout.file_name) for layout in layouts)
    split = {"split.count": u16(2), "split.tensors.count": i32(4)}
    assert first.kvs == KVS | split | {"split.no": u16(0)}
    assert second.kvs == split | {"split.no": u16(1)}


def test_what_is_laid_out_is_what_is_read(tmp_path):
    layouts = lay_out("m", KVS, TENSORS, max_shard_bytes=900)
    write_shards(tmp_path, layouts)
    assert len(layouts) > 1
    for layout in layouts:
        file = read_gguf(tmp_path / layout.file_name)
        assert file.tensors == layout.tensors
        assert (file.data_begin, file.n_bytes) == (layout.data_begin, layout.n_bytes)
        assert len(layout.header) == layout.data_begin


def test_sizes_and_padding_are_those_of_ggml():
    (layout,) = lay_out("m", {}, TENSORS, max_shard_bytes=None)
    sizes = [4 * 2 * 34, 3 * 4, 2 * 3 * 66, 8 * 18]
    begins = np.cumsum([0] + [padded(n, 32) for n in sizes]) + layout.data_begin
    assert [t.n_bytes for t in layout.tensors] == sizes
    assert [*(t.begin for t in layout.tensors), layout.n_bytes] == begins.tolist()


def test_a_file_is_filled_to_the_last_byte_of_its_limit():
    (whole,) = lay_out("m", KVS, rows(10), max_shard_bytes=None)
    assert len(lay_out("m", KVS, rows(10), max_shard_bytes=whole.n_bytes)) == 1
    assert len(lay_out("m", KVS, rows(10), max_shard_bytes=whole.n_bytes - 1)) == 2


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.integers(1, 4096), min_size=1, max_size=40),
    st.integers(1, 40_000),
    st.none() | st.integers(1, 8),
    st.sampled_from([1, 32, 256]),
)
def test_limits_hold_and_no_shard_could_take_the_next_tensor(sizes, limit, n_most, alignment):
    tensors = [TensorEntry(f"t{i}", (n,), GgmlType.I8) for i, n in enumerate(sizes)]

    def lay(part: list[TensorEntry], **limits: int | None) -> tuple[ShardLayout, ...]:
        return lay_out("m", KVS, part, alignment=alignment, **limits)

    layouts = lay(tensors, max_shard_bytes=limit, max_shard_tensors=n_most)
    placed = [place.name for layout in layouts for place in layout.tensors]
    assert placed == [tensor.name for tensor in tensors]
    for layout in layouts:
        assert len(layout.tensors) == 1 or layout.n_bytes <= limit
        assert n_most is None or len(layout.tensors) <= n_most
        assert layout.n_bytes % alignment == 0
    if len(layouts) > 1:
        for no, layout in enumerate(layouts):
            assert layout.n_bytes == file_bytes(no, layout.tensors, alignment)
    for no, (here, after) in enumerate(pairwise(layouts)):
        taken = [*here.tensors, after.tensors[0]]
        assert len(here.tensors) == n_most or file_bytes(no, taken, alignment) > limit


def file_bytes(no: int, tensors: Sequence[TensorPlace], alignment: int) -> int:
    """Size of shard `no` if it held these one-dimensional tensors, by the format's own rules."""
    kvs = {"split.no": u16(0), "split.count": u16(0), "split.tensors.count": i32(0)}
    kvs |= KVS if no == 0 else {}
    kvs |= {} if alignment == 32 else {"general.alignment": u32(alignment)}
    n_header = 24 + sum(len(encode_kv(key, kv)) for key, kv in kvs.items())
    n_header += sum(8 + len(tensor.name) + 4 + 8 + 4 + 8 for tensor in tensors)
    sizes = [n_header, *(tensor.n_bytes for tensor in tensors)]
    return sum(math.ceil(n / alignment) * alignment for n in sizes)


def test_a_tensor_larger_than_the_limit_has_a_file_of_its_own():
    tensors = [*rows(1), TensorEntry("big", (1 << 20,), GgmlType.F32), *rows(3)[1:]]
    layouts = lay_out("m", KVS, tensors, max_shard_bytes=4096)
    assert [len(layout.tensors) for layout in layouts] == [1, 1, 2]


def test_one_tensor_larger_than_the_limit_is_not_split():
    (layout,) = lay_out("m", KVS, rows(1), max_shard_bytes=10)
    assert layout.file_name == "m.gguf"


def test_a_model_without_tensors_is_one_file(tmp_path):
    (layout,) = lay_out("vocab", KVS, [], max_shard_bytes=1)
    write_shards(tmp_path, [layout])
    assert read_gguf(tmp_path / "vocab.gguf").tensors == ()


def test_every_shard_states_an_unusual_alignment(tmp_path):
    layouts = lay_out("m", KVS, TENSORS, max_shard_bytes=None, max_shard_tensors=1, alignment=64)
    write_shards(tmp_path, layouts)
    for layout in layouts:
        assert read_gguf(tmp_path / layout.file_name).alignment == 64
        assert layout.data_begin % 64 == 0
    assert open_shards(tmp_path / layouts[2].file_name).kvs == KVS


def test_more_shards_than_can_be_numbered_are_refused():
    with pytest.raises(GgufError, match="65536 shards"):
        lay_out("m", {}, rows(65536, 1), max_shard_bytes=None, max_shard_tensors=1)
    assert len(lay_out("m", {}, rows(65535, 1), max_shard_bytes=None, max_shard_tensors=1)) == 65535


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (TensorEntry("", (32,), GgmlType.F32), "empty name"),
        (TensorEntry("x" * 64, (32,), GgmlType.F32), "64 bytes"),
        (TensorEntry("a\0", (32,), GgmlType.F32), "NUL"),
        (TensorEntry("t0", (32,), GgmlType.F32), "two tensors"),
        (TensorEntry("a", (), GgmlType.F32), "0 dimensions"),
        (TensorEntry("a", (1, 1, 1, 1, 32), GgmlType.F32), "5 dimensions"),
        (TensorEntry("a", (0, 32), GgmlType.F32), "cannot be stored"),
        (TensorEntry("a", (-1, 32), GgmlType.F32), "cannot be stored"),
        (TensorEntry("a", (1 << 40, 1 << 40), GgmlType.F32), "cannot be stored"),
        (TensorEntry("a", (1 << 61,), GgmlType.F64), "more than a file"),
        (TensorEntry("a", (2, 128), GgmlType.Q4_K), "no multiple of the block of Q4_K, 256"),
    ],
)
def test_a_tensor_that_gguf_cannot_hold_is_refused(tensor, message):
    with pytest.raises(GgufError, match=message):
        lay_out("m", {}, [*rows(1), tensor], max_shard_bytes=None)


@pytest.mark.parametrize(
    "key", ["split.no", "split.count", "split.tensors.count", "general.alignment"]
)
def test_keys_of_the_layout_are_refused(key):
    with pytest.raises(GgufError, match="sets this key itself"):
        lay_out("m", {key: u32(32)}, rows(1), max_shard_bytes=None)


@pytest.mark.parametrize(
    "limits",
    [
        {"max_shard_bytes": 0},
        {"max_shard_bytes": None, "max_shard_tensors": 0},
        {"max_shard_bytes": None, "alignment": 0},
        {"max_shard_bytes": None, "alignment": 48},
        {"max_shard_bytes": None, "alignment": 8192},
    ],
)
def test_limits_that_cannot_be_meant_are_refused(limits):
    with pytest.raises(UsageError):
        lay_out("m", {}, rows(1), **limits)


@pytest.mark.parametrize("n_tensors", [None, 3])
def test_gguf_py_reads_the_same_values(tmp_path, n_tensors):
    layouts = lay_out("m", KVS, TENSORS, max_shard_bytes=None, max_shard_tensors=n_tensors)
    data = write_shards(tmp_path, layouts)
    readers = [gguf.GGUFReader(tmp_path / layout.file_name) for layout in layouts]
    contents = {key: readers[0].fields[key].contents() for key in KVS}
    assert contents == {key: kv.value for key, kv in KVS.items()}
    types = {key: readers[0].fields[key].types for key in KVS}
    assert types == {
        key: [kv.type] if kv.item is None else [kv.type, kv.item] for key, kv in KVS.items()
    }
    places = [place for layout in layouts for place in layout.tensors]
    read = [tensor for reader in readers for tensor in reader.tensors]
    assert len(read) == len(places)
    for tensor, place in zip(read, places, strict=True):
        assert tensor.name == place.name
        assert tensor.shape.tolist() == list(place.shape[::-1])
        assert tensor.tensor_type == place.type
        assert (tensor.data_offset, tensor.n_bytes) == (place.begin, place.n_bytes)
        assert tensor.data.tobytes() == data[place.name]


def item_values(type_: KvType) -> st.SearchStrategy[object]:
    if type_ is KvType.STRING:
        return st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
    if type_ is KvType.BOOL:
        return st.booleans()
    if type_ in (KvType.F32, KvType.F64):
        width = 32 if type_ is KvType.F32 else 64
        return st.floats(allow_nan=False, allow_infinity=False, width=width)
    bits = 8 * np.dtype(CODES[type_]).itemsize
    low = -(1 << (bits - 1)) if CODES[type_].islower() else 0
    return st.integers(low, low + (1 << bits) - 1)


@st.composite
def kv_values(draw) -> Kv:
    item = draw(st.sampled_from([t for t in KvType if t is not KvType.ARRAY]))
    if draw(st.booleans()):
        return Kv(item, draw(item_values(item)))
    return Kv(KvType.ARRAY, draw(st.lists(item_values(item), max_size=8)), item)


@st.composite
def tensor_sets(draw) -> list[TensorEntry]:
    names = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1)
    legal = names.filter(lambda name: len(name.encode()) <= 63)
    tensors = []
    for name in draw(st.lists(legal, max_size=6, unique=True)):
        type_ = draw(st.sampled_from(list(GgmlType)))
        axes = draw(st.lists(st.integers(1, 4), max_size=3))
        n_cols = type_.block_size * draw(st.integers(1, 2))
        tensors.append(TensorEntry(name, (*axes, n_cols), type_))
    return tensors


@settings(max_examples=500, deadline=None)
@given(
    kvs=st.dictionaries(
        st.text(
            st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1
        ).filter(lambda key: key not in (*SPLIT_KEYS, ALIGNMENT)),
        kv_values(),
        max_size=6,
    ),
    tensors=tensor_sets(),
    limit=st.none() | st.integers(100, 5000),
    alignment=st.sampled_from([1, 16, 32, 128]),
)
def test_reading_returns_what_was_written(tmp_path_factory, kvs, tensors, limit, alignment):
    folder = tmp_path_factory.mktemp("set")
    layouts = lay_out("m", kvs, tensors, max_shard_bytes=limit, alignment=alignment)
    write_shards(folder, layouts)
    shards = open_shards(folder / layouts[-1].file_name)
    assert shards.kvs == kvs
    assert list(shards.kvs) == list(kvs)
    assert [place for _, place in shards.tensors()] == [
        place for layout in layouts for place in layout.tensors
    ]


def test_floats_keep_their_sign_and_every_bit(tmp_path):
    kvs = {"zero": f32(-0.0), "small": Kv(KvType.F64, 5e-324)}
    write_shards(tmp_path, lay_out("m", kvs, [], max_shard_bytes=None))
    read = read_gguf(tmp_path / "m.gguf").kvs
    assert math.copysign(1, read["zero"].value) == -1
    assert read["small"].value == 5e-324
