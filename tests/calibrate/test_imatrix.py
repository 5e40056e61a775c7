"""Imatrix files: written, read back, and refused when they lie."""

from __future__ import annotations

import os
import struct

import numpy as np
import pytest
from gguf import GGUFReader
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from quantkit.calibrate.dat import write_dat
from quantkit.calibrate.imatrix import N_TOKENS, read_imatrix, write_imatrix
from quantkit.calibrate.statistics import Statistics, Sums, add
from quantkit.container.kv import string, u32
from quantkit.errors import GgufError, NonFiniteError, OutputError, UsageError
from tests.builders.gguf import ARRAY, F32, STRING, U16, U32, U64, array, kv, text
from tests.calibrate.builders import (
    PAIR,
    RECORDED,
    dat_bytes,
    dat_entry,
    dat_tail,
    equal,
    f32s,
    gguf_imatrix,
    statistics,
)

# Every example overwrites the one file.
ONE_FOLDER = [HealthCheck.function_scoped_fixture]
SHAPES = {"blk.0.attn_q_a.weight": (1, 8), "blk.1.ffn_down_exps.weight": (4, 6)}


def test_a_file_of_llama_imatrix_is_written_back_byte_for_byte(tmp_path):
    write_imatrix(tmp_path / "m.gguf", read_imatrix(RECORDED))
    assert (tmp_path / "m.gguf").read_bytes() == RECORDED.read_bytes()
    assert os.listdir(tmp_path) == ["m.gguf"]


def test_a_file_of_llama_imatrix_reads_as_the_gguf_package_reads_it():
    stats = read_imatrix(RECORDED)
    reader = GGUFReader(RECORDED)
    tensors = {t.name: t.data for t in reader.tensors}
    assert len(stats.sums) * 2 == len(tensors) == 98
    for name, sums in stats.sums.items():
        assert np.array_equal(sums.sum2.ravel(), tensors[f"{name}.in_sum2"].ravel())
        assert np.array_equal(sums.counts, tensors[f"{name}.counts"].ravel())
    assert stats.sums["blk.2.ffn_down_exps.weight"].sum2.shape == (8, 256)
    assert stats.sums["blk.2.attn_k_b.weight"].sum2.shape == (1, 512)
    assert (stats.chunk_size, stats.n_chunks, stats.n_tokens) == (512, 60, 30720)
    assert stats.datasets == ("tiny-kimi.calibration.txt",)


def test_what_quantkit_writes_the_gguf_package_reads(tmp_path):
    stats = statistics(SHAPES)
    add(stats.priors, "blk.1.ffn_down_exps.weight", np.arange(6.0), 3, row=1, n_rows=4)
    write_imatrix(tmp_path / "m.gguf", stats)
    tensors = {t.name: t.data for t in GGUFReader(tmp_path / "m.gguf").tensors}
    assert len(tensors) == 6
    for name, sums in stats.sums.items():
        assert np.array_equal(tensors[f"{name}.in_sum2"].ravel(), np.float32(sums.sum2.ravel()))
        assert np.array_equal(tensors[f"{name}.counts"].ravel(), np.float32(sums.counts))
    prior = tensors["blk.1.ffn_down_exps.weight@all.in_sum2"]
    assert prior.tolist() == [[0] * 6, [0, 1, 2, 3, 4, 5], [0] * 6, [0] * 6]


_names = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1)
_squares = st.floats(0, 2.0**120, width=32)


@st.composite
def _sums(draw):
    m, n = draw(st.integers(1, 4)), draw(st.integers(1, 5))
    counts = np.array(draw(st.lists(st.integers(0, 2**24), min_size=m, max_size=m)), np.float64)
    sum2 = np.array(draw(st.lists(_squares, min_size=m * n, max_size=m * n)), np.float64)
    sum2 = sum2.reshape(m, n)
    sum2[counts == 0] = 0
    return Sums(sum2, counts)


@settings(max_examples=100, deadline=None, suppress_health_check=ONE_FOLDER)
@given(
    table=st.dictionaries(
        _names.filter(lambda s: len(s.encode()) <= 50 and not s.endswith("@all")),
        _sums(),
        min_size=1,
        max_size=4,
    ),
    with_priors=st.booleans(),
    chunk_size=st.integers(1, 2**32 - 1),
    n_tokens=st.integers(0, 2**32 - 1),
    datasets=st.lists(st.text(st.characters(exclude_categories=["Cs"])), max_size=3),
)
def test_statistics_are_read_as_they_were_written(
    tmp_path, table, with_priors, chunk_size, n_tokens, datasets
):
    stats = Statistics(chunk_size, n_tokens, tuple(datasets), table, dict(table))
    if not with_priors:
        stats.priors = {}
    stats.kvs = {"quantkit.corpus": string("mine"), "other.key": u32(3)}
    write_imatrix(tmp_path / "m.gguf", stats)
    read = read_imatrix(tmp_path / "m.gguf")
    assert equal(read.sums, stats.sums)
    assert equal(read.priors, stats.priors)
    assert (read.chunk_size, read.n_tokens) == (chunk_size, n_tokens)
    assert (read.datasets, read.kvs) == (stats.datasets, stats.kvs)


def test_metadata_given_at_writing_is_read_back_but_cannot_replace_the_format_s_own(tmp_path):
    kvs = {"quantkit.corpus": string("core"), "general.type": string("model")}
    write_imatrix(tmp_path / "m.gguf", statistics(SHAPES), kvs)
    assert read_imatrix(tmp_path / "m.gguf").kvs == {"quantkit.corpus": string("core")}


def test_the_legacy_form_keeps_means(tmp_path):
    stats = read_imatrix(RECORDED)
    assert write_dat(tmp_path / "m.dat", stats) == ()
    read = read_imatrix(tmp_path / "m.dat")
    assert (read.n_chunks, read.chunk_size, read.datasets) == (60, 512, stats.datasets)
    for name, sums in stats.sums.items():
        assert read.sums[name].sum2.shape == (1, sums.sum2.size)
        np.testing.assert_allclose(read.mean(name).ravel(), sums.mean().ravel(), rtol=2e-7)


def test_the_legacy_form_has_ones_for_an_unseen_expert_and_leaves_out_unseen_weights(tmp_path):
    stats = Statistics(chunk_size=4)
    add(stats.sums, "e.weight", [6.0, 9.0], 3, row=1, n_rows=2)
    add(stats.sums, "u.weight", [0.0], 0)
    assert write_dat(tmp_path / "m.dat", stats) == ("u.weight",)
    expected = dat_bytes(dat_entry("e.weight", (1, 1, 2, 3), n_chunks=1), tail=dat_tail(0, b""))
    assert (tmp_path / "m.dat").read_bytes() == expected


@pytest.mark.parametrize(
    ("tail", "n_tokens", "datasets"),
    [
        (b"", 2 * 100, ()),
        (struct.pack("<i", 7), 700, ()),
        (dat_tail(7, b""), 700, ()),
        (dat_tail(7, b"caf\xe9.txt"), 700, ("caf\ufffd.txt",)),
    ],
)
def test_a_legacy_file_may_end_in_three_ways(tmp_path, tail, n_tokens, datasets):
    (tmp_path / "m").write_bytes(dat_bytes(dat_entry(values=(1, 2)), tail=tail))
    read = read_imatrix(tmp_path / "m", dat_chunk_size=100)
    assert (read.n_tokens, read.datasets) == (n_tokens, datasets)
    assert read.mean("a.weight").tolist() == [[0.5, 1.0]]


def test_plain_sums_that_some_builds_add_are_passed_over(tmp_path):
    sums = {"a.weight.in_sum": f32s(-1, 0, 1, 2)}
    (tmp_path / "m").write_bytes(gguf_imatrix(PAIR | sums))
    assert read_imatrix(tmp_path / "m").mean("a.weight").tolist() == [
        [1 / 1024, 2 / 1024, 3 / 1024, 4 / 1024]
    ]


INF, NAN = float("inf"), float("nan")
GGUF_LIES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "ends early"),
    "magic alone": (b"GGUF", "ends early"),
    "no tensors": (gguf_imatrix({}), "holds no statistics"),
    "a model": (
        gguf_imatrix(kvs={"general.type": kv("general.type", STRING, text("model"))}),
        "'model', not 'imatrix'",
    ),
    "type missing": (gguf_imatrix(kvs={"general.type": None}), "general.type is missing"),
    "type a number": (
        gguf_imatrix(kvs={"general.type": kv("general.type", U32, bytes(4))}),
        "general.type is U32, expected STRING",
    ),
    "datasets missing": (gguf_imatrix(kvs={"imatrix.datasets": None}), "datasets is missing"),
    "datasets one text": (
        gguf_imatrix(kvs={"imatrix.datasets": kv("imatrix.datasets", STRING, text("a"))}),
        "is STRING, expected ARRAY",
    ),
    "datasets numbers": (
        gguf_imatrix(
            kvs={"imatrix.datasets": kv("imatrix.datasets", ARRAY, array(U32, 1, bytes(4)))}
        ),
        "an array of texts",
    ),
    "chunk count missing": (gguf_imatrix(kvs={"imatrix.chunk_count": None}), "count is missing"),
    "chunk count short": (
        gguf_imatrix(kvs={"imatrix.chunk_count": kv("imatrix.chunk_count", U16, bytes(2))}),
        "is U16, expected U32",
    ),
    "chunk size missing": (gguf_imatrix(kvs={"imatrix.chunk_size": None}), "size is missing"),
    "chunk size 0": (
        gguf_imatrix(kvs={"imatrix.chunk_size": kv("imatrix.chunk_size", U32, bytes(4))}),
        "chunks of 0 tokens",
    ),
    "chunk size a float": (
        gguf_imatrix(kvs={"imatrix.chunk_size": kv("imatrix.chunk_size", F32, bytes(4))}),
        "is F32, expected U32",
    ),
    "tokens that are not the chunks": (
        gguf_imatrix(kvs={N_TOKENS: kv(N_TOKENS, U64, struct.pack("<Q", 5))}),
        "5 tokens are not 2 chunks of 512",
    ),
    "a shard": (
        gguf_imatrix(kvs={"split.count": kv("split.count", U16, b"\2\0")}),
        "one shard of several",
    ),
    "no counts": (gguf_imatrix({"a.in_sum2": f32s(1)}), "without .counts, or the reverse"),
    "no sums": (gguf_imatrix({"a.counts": f32s(1)}), "without .counts, or the reverse"),
    "only plain sums": (gguf_imatrix({"a.in_sum": f32s(1)}), "without .counts, or the reverse"),
    "plain sums of another size": (
        gguf_imatrix(PAIR | {"a.weight.in_sum": f32s(1)}),
        ".in_sum does not go with .in_sum2",
    ),
    "a weight among them": (gguf_imatrix(PAIR | {"a.weight": f32s(1)}), "no part of an imatrix"),
    "a suffix alone": (
        gguf_imatrix({".in_sum2": f32s(1), ".counts": f32s(1)}),
        "no part of an imatrix",
    ),
    "a prior of nothing": (
        gguf_imatrix({"@all.in_sum2": f32s(1), "@all.counts": f32s(1)}),
        "no part of an imatrix",
    ),
    "a prior of another shape": (
        gguf_imatrix(PAIR | {"a.weight@all.in_sum2": f32s(1), "a.weight@all.counts": f32s(1)}),
        "another shape",
    ),
    "sums as f16": (
        gguf_imatrix(
            {"a.in_sum2": bytes(8), "a.counts": f32s(1)}, types={"a.in_sum2": 1, "a.counts": 0}
        ),
        "expected F32, got F16",
    ),
    "counts as i32": (gguf_imatrix(PAIR, types={"a.weight.counts": 26}), "expected F32, got I32"),
    "rows that do not divide": (
        gguf_imatrix({"a.in_sum2": f32s(1, 2, 3), "a.counts": f32s(1, 2)}),
        "3 sums do not divide into 2 rows",
    ),
    "more counts than sums": (
        gguf_imatrix({"a.in_sum2": f32s(1), "a.counts": f32s(1, 2)}),
        "1 sums do not divide into 2 rows",
    ),
    "a negative sum": (gguf_imatrix({"a.in_sum2": f32s(-1), "a.counts": f32s(1)}), "negative"),
    "a negative count": (gguf_imatrix({"a.in_sum2": f32s(1), "a.counts": f32s(-1)}), "negative"),
    "half a token": (gguf_imatrix({"a.in_sum2": f32s(1), "a.counts": f32s(0.5)}), "no numbers of"),
    "NaN tokens": (gguf_imatrix({"a.in_sum2": f32s(1), "a.counts": f32s(NAN)}), "no numbers of"),
    "infinite tokens": (
        gguf_imatrix({"a.in_sum2": f32s(1), "a.counts": f32s(INF)}),
        "no numbers of",
    ),
    "too many tokens": (
        gguf_imatrix({"a.in_sum2": f32s(1), "a.counts": f32s(1e20)}),
        "no numbers of",
    ),
    "sums of no tokens": (
        gguf_imatrix({"a.in_sum2": f32s(1), "a.counts": f32s(0)}),
        "over no tokens",
    ),
    "cut off": (gguf_imatrix()[:-32], "its data ends at"),
    "more behind": (gguf_imatrix() + bytes(64), "behind the last tensor"),
}

DAT_LIES: dict[str, tuple[bytes, str]] = {
    "no entries": (dat_bytes(n=0), "neither"),
    "negative entries": (dat_bytes(dat_entry(), n=-1), "neither"),
    "more entries than bytes": (dat_bytes(dat_entry(), n=2**31 - 1), "neither"),
    "a text": (b"hello world, this is no imatrix", "neither"),
    "three bytes": (b"\1\0\0", "ends early"),
    "one entry fewer than told": (dat_bytes(dat_entry(), dat_entry("b")[:20], n=2), "ends early"),
    "no name": (dat_bytes(dat_entry("", values=(1, 2, 3))), "a name of 0 bytes"),
    "a negative name": (dat_bytes(dat_entry(length=-1)), "a name of -1 bytes"),
    "a huge name": (dat_bytes(dat_entry(length=2**31 - 1)), "a name of 2147483647 bytes"),
    "a long name": (dat_bytes(dat_entry("n" * 64)), "a name of 64 bytes"),
    "a name past the end": (dat_bytes(dat_entry(length=60)), "ends early"),
    "a name that is not UTF-8": (dat_bytes(dat_entry(b"\xff\xfe")), "not UTF-8"),
    "a name with NUL": (dat_bytes(dat_entry(b"a\0b")), "NUL"),
    "no values": (dat_bytes(dat_entry(values=()), tail=bytes(8)), "0 values"),
    "negative values": (dat_bytes(dat_entry(n_values=-1)), "-1 values"),
    "a huge number of values": (dat_bytes(dat_entry(n_values=2**31 - 1)), "8589934588 bytes"),
    "no chunks": (dat_bytes(dat_entry(n_chunks=0)), "of 0 chunks"),
    "negative chunks": (dat_bytes(dat_entry(n_chunks=-5)), "of -5 chunks"),
    "a negative value": (dat_bytes(dat_entry(values=(1, -1))), "negative"),
    "one name twice": (dat_bytes(dat_entry(), dat_entry()), "two entries"),
    "a negative count behind": (dat_bytes(dat_entry(), tail=dat_tail(-1)), "negative number"),
    "half a count behind": (dat_bytes(dat_entry(), tail=b"\1\0"), "ends early"),
    "a negative data set": (dat_bytes(dat_entry(), tail=dat_tail(length=-1)), "ends early"),
    "a huge data set": (dat_bytes(dat_entry(), tail=dat_tail(length=2**30)), "ends early"),
    "more behind": (dat_bytes(dat_entry(), tail=dat_tail() + b"x"), "1 bytes behind the end"),
}

NON_FINITE = {
    "gguf nan": gguf_imatrix({"x.in_sum2": f32s(1, NAN), "x.counts": f32s(1)}),
    "gguf inf": gguf_imatrix({"x.in_sum2": f32s(1, INF), "x.counts": f32s(1)}),
    "dat nan": dat_bytes(dat_entry("x", values=(1, NAN))),
    "dat inf": dat_bytes(dat_entry("x", values=(1, INF))),
}


@pytest.mark.parametrize(
    ("content", "message"),
    [*GGUF_LIES.values(), *DAT_LIES.values()],
    ids=[*(f"gguf: {name}" for name in GGUF_LIES), *(f"dat: {name}" for name in DAT_LIES)],
)
def test_a_file_that_lies_is_refused_with_its_name(tmp_path, content, message):
    (tmp_path / "m").write_bytes(content)
    with pytest.raises(GgufError, match=message) as caught:
        read_imatrix(tmp_path / "m").check()
    assert str(tmp_path / "m") in str(caught.value)
    assert caught.value.exit_code == 6


@pytest.mark.parametrize("content", NON_FINITE.values(), ids=NON_FINITE)
def test_nan_and_infinity_are_refused_with_file_tensor_and_column(tmp_path, content):
    (tmp_path / "m").write_bytes(content)
    with pytest.raises(NonFiniteError, match=r"m, tensor x: (nan|inf) in column 1") as caught:
        read_imatrix(tmp_path / "m").check()
    assert caught.value.exit_code == 7


@settings(max_examples=250, deadline=None, suppress_health_check=ONE_FOLDER)
@given(data=st.data(), legacy=st.booleans())
def test_damage_anywhere_is_refused_or_harmless(tmp_path, data, legacy):
    whole = (
        dat_bytes(dat_entry(), dat_entry("b.weight", (1, 2, 3)), tail=dat_tail())
        if legacy
        else gguf_imatrix(PAIR | {"b.in_sum2": f32s(1, 2), "b.counts": f32s(0, 3)[4:]})
    )
    content = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    end = data.draw(st.none() | st.integers(0, len(content)))
    content = content[:end]
    (tmp_path / "m").write_bytes(content)
    try:
        stats = read_imatrix(tmp_path / "m")
        stats.check()
    except (GgufError, NonFiniteError):
        return
    for sums in stats.sums.values():
        assert np.isfinite(sums.sum2).all()
        assert (sums.sum2 >= 0).all()
        assert (sums.counts >= 0).all()


def test_a_file_too_large_to_be_an_imatrix_is_not_read(tmp_path):
    with (tmp_path / "m").open("wb") as file:
        file.truncate((32 << 30) + 1)
    with pytest.raises(GgufError, match="too many for an imatrix"):
        read_imatrix(tmp_path / "m")


def test_what_is_no_file_is_refused(tmp_path):
    for path in (tmp_path, tmp_path / "absent"):
        with pytest.raises(GgufError):
            read_imatrix(path)


@pytest.mark.parametrize("write", [write_imatrix, write_dat])
def test_nothing_is_left_of_a_file_that_cannot_be_written(tmp_path, write):
    stats = statistics(SHAPES)
    stats.sums["z.weight"] = Sums(np.array([[1.0, 1e300]]), np.ones(1))
    with pytest.raises(NonFiniteError, match=r"z\.weight"):
        write(tmp_path / "m", stats)
    assert os.listdir(tmp_path) == []
    with pytest.raises(UsageError, match="no statistics to write"):
        write(tmp_path / "m", Statistics())
    with pytest.raises(OutputError):
        write(tmp_path / "absent" / "m", statistics(SHAPES))


@pytest.mark.parametrize("name", ["a@all", "n" * 56, "a\0b", ""])
def test_names_that_the_file_cannot_hold_are_refused(tmp_path, name):
    with pytest.raises(GgufError):
        write_imatrix(tmp_path / "m", statistics({name: (1, 2)}))
    assert os.listdir(tmp_path) == []


def test_a_number_too_large_for_the_legacy_form_is_refused(tmp_path):
    stats = statistics({"a": (1, 2)}, chunk_size=1, n_tokens=2**31)
    with pytest.raises(GgufError, match=r"write a \.gguf file"):
        write_dat(tmp_path / "m", stats)
