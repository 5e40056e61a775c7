"""llama-perplexity's file of base log-probabilities: its bytes, its numbers, and impostors."""

from __future__ import annotations

import math
import struct
import time
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from quantkit.errors import NonFiniteError, SourceError, UsageError
from quantkit.evaluate.logits_file import BaseFile, LogitsWriter, RecordEncoder

F = np.float32
N_CTX, N_CHUNKS = 8, 3
N_ROWS = N_CHUNKS * 3  # positions 4, 5 and 6 of each chunk


def twin_record(row) -> bytes:
    """One record by the tool's rules, one f32 operation after another."""
    row = [F(x) for x in row]
    top = max(row)
    least = max(min(row), F(top - F(16)))
    total = 0.0
    for x in row:
        total += float(F(math.exp(float(F(x - top)))))
    log_total = F(math.log(total))
    scale = F(F(top - least) / F(65535))
    words = struct.pack("<ff", scale, F(F(least - top) - log_total))
    for x in row:
        code = int(np.rint(F(F(F(1) / scale) * F(x - least)))) if scale and x > least else 0
        words += struct.pack("<H", code)
    return words + b"\0\0" * (len(row) % 2)


def twin_row(record: bytes, n_vocab: int):
    scale, least = (F(x) for x in struct.unpack_from("<ff", record))
    codes = struct.unpack_from(f"<{n_vocab}H", record, 8)
    return np.array([F(F(scale * F(code)) + least) for code in codes])


def make_tokens(n_vocab: int, n_chunks: int = N_CHUNKS, n_ctx: int = N_CTX):
    return np.random.default_rng(0).integers(0, n_vocab, (n_chunks, n_ctx)).astype(np.int32)


def make_logits(n_rows: int = N_ROWS, n_vocab: int = 101):
    return (4 * np.random.default_rng(1).standard_normal((n_rows, n_vocab))).astype(np.float32)


def write(path, logits, tokens) -> bytes:
    with LogitsWriter(path, tokens, logits.shape[1]) as writer:
        writer.write_rows(0, logits)
        writer.commit()
    return path.read_bytes()


def encode(row) -> bytes:
    encoder = RecordEncoder(1)
    encoder.measure(row[None])
    codes = encoder.encode(row[None])
    return encoder.heads().tobytes() + codes.tobytes() + b"\0\0" * (len(row) % 2)


@pytest.mark.parametrize("n_vocab", [100, 101])
def test_a_file_is_header_tokens_and_records(tmp_path, n_vocab):
    logits, tokens = make_logits(n_vocab=n_vocab), make_tokens(n_vocab)
    expected = b"_logits_" + struct.pack("<iii", N_CTX, n_vocab, N_CHUNKS)
    expected += struct.pack(f"<{tokens.size}i", *tokens.ravel().tolist())
    expected += b"".join(map(twin_record, logits))
    assert write(tmp_path / "base.kld", logits, tokens) == expected


@settings(max_examples=200, deadline=None)
@given(
    row=hnp.arrays(
        np.float32,
        st.integers(1, 40),
        elements=st.floats(-50, 50, width=32, allow_subnormal=False) | st.sampled_from([0.0, 1.0]),
    )
)
def test_any_row_is_encoded_as_the_tool_does(row):
    record = encode(row)
    assert record == twin_record(row)
    codes = np.frombuffer(record, "<u2")[4:]
    assert codes[row.argmax()] == (65535 if np.ptp(row) else 0)


@pytest.mark.parametrize(
    "row",
    [[3.0] * 5, [2.5], [0.0, -np.inf, -1.0], [0.0, -16.0, -16.5, -400.0], [1e30, 0.0, -1e30]],
    ids=["all equal", "one token", "a masked token", "the floor", "far apart"],
)
def test_unusual_rows_are_encoded_as_the_tool_does(row):
    assert encode(np.array(row, np.float32)) == twin_record(row)


def test_a_spread_too_small_to_divide_by_has_codes_of_zero():
    row = np.array([0, 1e-38], np.float32)
    assert np.frombuffer(encode(row), "<u2")[4:].tolist() == [0, 0]


@pytest.mark.parametrize("width", [1, 13, 101])
def test_vocabulary_tiles_in_two_passes_give_the_bytes_of_whole_rows(tmp_path, width):
    logits, tokens = make_logits(), make_tokens(101)
    whole = write(tmp_path / "whole.kld", logits, tokens)
    path = tmp_path / "tiles.kld"
    with LogitsWriter(path, tokens, 101) as writer:
        for begin in range(0, N_ROWS, 4):
            rows = logits[begin : begin + 4]
            encoder = RecordEncoder(len(rows))
            tiles = [(first, rows[:, first : first + width]) for first in range(0, 101, width)]
            for _, tile in tiles:
                encoder.measure(tile)
            for first, tile in tiles:
                writer.write_tile(begin, first, encoder, tile)
            writer.write_heads(begin, encoder)
        writer.commit()
    assert path.read_bytes() == whole


@pytest.mark.parametrize("n_vocab", [100, 101])
def test_rows_are_decoded_as_the_tool_does(tmp_path, n_vocab):
    logits, tokens = make_logits(n_vocab=n_vocab), make_tokens(n_vocab)
    write(tmp_path / "base.kld", logits, tokens)
    base = BaseFile(tmp_path / "base.kld")
    assert (base.n_ctx, base.n_vocab, base.n_chunks) == (N_CTX, n_vocab, N_CHUNKS)
    assert (base.rows_per_chunk, base.n_rows) == (3, N_ROWS)
    np.testing.assert_array_equal(base.tokens, tokens)
    expected = np.array([twin_row(twin_record(row), n_vocab) for row in logits])
    assert base.chunk(1).dtype == np.float32
    for number in range(N_CHUNKS):
        np.testing.assert_array_equal(base.chunk(number), expected[3 * number : 3 * number + 3])
    np.testing.assert_array_equal(base.tile(2, 7, 10, 33), expected[2:7, 10:33])


def test_decoded_log_probabilities_are_off_by_half_a_step_or_on_the_floor(tmp_path):
    logits, tokens = make_logits(), make_tokens(101)
    write(tmp_path / "base.kld", logits, tokens)
    base = BaseFile(tmp_path / "base.kld")
    exact = logits.astype(np.float64)
    top = exact.max(axis=1, keepdims=True)
    exact -= top + np.log(np.exp(exact - top).sum(axis=1, keepdims=True))
    seen = base.tile(0, N_ROWS, 0, 101)
    above = logits > top - 16
    assert above.any()
    assert not above.all()
    assert np.abs(seen - exact)[above].max() < 0.5 * 16 / 65535 + 4e-6
    floor = np.broadcast_to(seen.min(axis=1, keepdims=True), seen.shape)
    np.testing.assert_array_equal(seen[~above], floor[~above])


def test_a_large_vocabulary_is_written_and_read_in_little_memory(tmp_path):
    n_rows, n_vocab, width = 511, 16_000, 400
    path, tokens = tmp_path / "base.kld", make_tokens(n_vocab, 1, 1024)
    pieces = make_logits(n_rows, width)
    tracemalloc.start()
    try:
        with LogitsWriter(path, tokens, n_vocab) as writer:
            encoder = RecordEncoder(n_rows)
            for first in range(0, n_vocab, width):
                encoder.measure(pieces + np.float32(first / n_vocab))
            for first in range(0, n_vocab, width):
                writer.write_tile(0, first, encoder, pieces + np.float32(first / n_vocab))
            writer.write_heads(0, encoder)
            writer.commit()
        base = BaseFile(path)
        for first in range(0, n_vocab, width):
            base.tile(0, n_rows, first, first + width)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < n_rows * n_vocab * 4 / 3


def content(n_ctx=N_CTX, n_vocab=4, n_chunks=1, tokens=None, rows=b"", magic=b"_logits_"):
    tokens = [0] * N_CTX if tokens is None else tokens
    head = magic + struct.pack("<iii", n_ctx, n_vocab, n_chunks)
    return head + struct.pack(f"<{len(tokens)}i", *tokens) + rows


RECORD = twin_record([1.0, 2.0, 3.0, 4.0])
SOUND = content(rows=3 * RECORD)
HUGE = 2**31 - 1

HOSTILE = {
    "empty": (b"", "not a file of base log-probabilities"),
    "header cut": (SOUND[:19], "not a file of base log-probabilities"),
    "another magic": (b"GGUF" + SOUND[4:], "not a file of base log-probabilities"),
    "no chunks": (content(n_chunks=0), "0 chunks"),
    "negative chunks": (content(n_chunks=-1), "-1 chunks"),
    "no vocabulary": (content(n_vocab=0, rows=3 * RECORD), "vocabulary of 0"),
    "negative vocabulary": (content(n_vocab=-4, rows=3 * RECORD), "vocabulary of -4"),
    "negative context": (content(n_ctx=-8, rows=3 * RECORD), "-8 tokens"),
    "context of two": (content(n_ctx=2, rows=3 * RECORD), "2 tokens"),
    "huge chunks": (content(n_chunks=HUGE, rows=3 * RECORD), "bytes, expected"),
    "huge vocabulary": (content(n_vocab=HUGE, rows=3 * RECORD), "vocabulary of 2147483647"),
    "huge context": (content(n_ctx=HUGE, rows=3 * RECORD), "2147483647 tokens"),
    "largest in everything": (
        content(n_ctx=1 << 24, n_vocab=1 << 24, n_chunks=HUGE),
        "bytes, expected",
    ),
    "tokens cut": (SOUND[:40], "bytes, expected"),
    "a byte short": (SOUND[:-1], "bytes, expected"),
    "a record short": (content(rows=2 * RECORD), "bytes, expected"),
    "a byte long": (SOUND + b"\0", "bytes, expected"),
    "negative token": (content(tokens=[-1] + [0] * 7, rows=3 * RECORD), "tokens outside"),
    "token past the vocabulary": (
        content(tokens=[0] * 7 + [4], rows=3 * RECORD),
        "tokens outside the vocabulary of 4",
    ),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_reader_refuses(tmp_path, case):
    data, message = HOSTILE[case]
    path = tmp_path / "base.kld"
    path.write_bytes(data)
    tracemalloc.start()
    start = time.process_time()
    try:
        with pytest.raises(SourceError) as caught:
            BaseFile(path)
        seconds = time.process_time() - start
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert message in caught.value.message
    assert caught.value.where == str(path)
    assert seconds < 0.1
    assert peak < 1 << 20


def test_the_file_that_the_hostile_ones_are_made_from_is_accepted(tmp_path):
    (tmp_path / "base.kld").write_bytes(SOUND)
    assert BaseFile(tmp_path / "base.kld").chunk(0).shape == (3, 4)


def test_a_file_cut_short_is_said_to_be_unfinished(tmp_path):
    (tmp_path / "base.kld").write_bytes(SOUND[:-10])
    with pytest.raises(SourceError) as caught:
        BaseFile(tmp_path / "base.kld")
    assert "did not finish" in caught.value.hint


@pytest.mark.parametrize("kind", ["missing", "folder"])
def test_what_is_no_file_is_refused(tmp_path, kind):
    path = tmp_path / "base.kld"
    if kind == "folder":
        path.mkdir()
    with pytest.raises(SourceError, match="regular file" if kind == "folder" else "No such file"):
        BaseFile(path)


@pytest.mark.parametrize(
    ("scale", "least"),
    [
        (math.nan, -5.0),
        (math.inf, -5.0),
        (1e-5, math.nan),
        (1e-5, -math.inf),
        (-1e-5, -5.0),
        (1e-3, -5.0),  # probabilities of e^60
        (0.0, 0.1),
        (3e38, -5.0),
    ],
)
def test_rows_that_are_no_log_probabilities_are_refused_when_read(tmp_path, scale, least):
    bad = struct.pack("<ff", scale, least) + RECORD[8:]
    (tmp_path / "base.kld").write_bytes(content(rows=RECORD + bad + RECORD))
    base = BaseFile(tmp_path / "base.kld")
    base.tile(0, 1, 0, 4)
    with pytest.raises(SourceError, match="row 1 "):
        base.chunk(0)


def test_nothing_is_left_of_a_file_that_was_not_committed(tmp_path):
    with (
        pytest.raises(RuntimeError),
        LogitsWriter(tmp_path / "base.kld", make_tokens(101), 101) as writer,
    ):
        writer.write_rows(0, make_logits())
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_a_file_has_its_name_only_when_it_is_complete(tmp_path):
    path = tmp_path / "base.kld"
    with LogitsWriter(path, make_tokens(101), 101) as writer:
        writer.write_rows(0, make_logits(N_ROWS - 1))
        with pytest.raises(ValueError, match="missing"):
            writer.commit()
        assert not path.exists()
        writer.write_rows(N_ROWS - 1, make_logits(1))
        writer.commit()
    assert [p.name for p in tmp_path.iterdir()] == ["base.kld"]


def test_rows_without_their_heads_are_not_complete(tmp_path):
    with LogitsWriter(tmp_path / "base.kld", make_tokens(101), 101) as writer:
        encoder = RecordEncoder(N_ROWS)
        encoder.measure(make_logits())
        writer.write_tile(0, 0, encoder, make_logits())
        with pytest.raises(ValueError, match="missing"):
            writer.commit()


def test_what_an_earlier_run_left_is_overwritten(tmp_path):
    logits, tokens = make_logits(), make_tokens(101)
    expected = write(tmp_path / "base.kld", logits, tokens)
    (tmp_path / "base.kld.partial").write_bytes(b"x" * 10 * len(expected))
    assert write(tmp_path / "base.kld", logits, tokens) == expected


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("width", [20, 101])
def test_logits_that_are_not_finite_are_refused(value, width):
    logits = make_logits()
    logits[4, 77] = value
    encoder = RecordEncoder(N_ROWS)
    for first in range(0, 101, width):
        encoder.measure(logits[:, first : first + width])
    with pytest.raises(NonFiniteError, match="row 4"):
        encoder.encode(logits[:, :width])


@pytest.mark.parametrize("tokens", [[[0, 1, 101]], [[-1, 1, 2]], np.zeros((0, 3))], ids=str)
def test_tokens_outside_the_vocabulary_are_not_written(tmp_path, tokens):
    with pytest.raises(UsageError):
        LogitsWriter(tmp_path / "base.kld", np.array(tokens, np.int32), 101)
    assert list(tmp_path.iterdir()) == []
