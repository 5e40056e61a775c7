"""Shares of a comparison: files that are taken as they are or not at all."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from quantkit.errors import OutputError
from quantkit.evaluate.compare import Comparison, Windows, compare
from quantkit.evaluate.shares import clear, merge_shares, run_share
from quantkit.forward.spans import shares
from tests.evaluate.test_compare import CHUNKS, N_CTX, moe_model, party, perturbed, settings

SPAN = 2 * N_CTX  # two chunks, the last span has one
TEXT = Windows.of(CHUNKS, None, SPAN)


@pytest.fixture(scope="module")
def models():
    return party(moe_model(), "base"), [perturbed(1), perturbed(2)]


def job_in(folder: Path, models, identity: str = "identity", text: Windows = TEXT) -> Comparison:
    base, quants = models
    return Comparison(base, quants, text, settings(folder), identity)


def unheard(part: float) -> None:
    pass


def run_all(job: Comparison, n_workers: int = 2) -> None:
    for share in shares(len(job.text.spans), n_workers):
        run_share(job, share, unheard)


def assert_same(found, wanted) -> None:
    for name in ("nll_base", "nll", "kld", "same_top", "dp"):
        ours, theirs = getattr(found[0], name), getattr(wanted[0], name)
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(ours, theirs)
    np.testing.assert_array_equal(found[1].sums, wanted[1].sums)
    np.testing.assert_array_equal(found[1].hidden, wanted[1].hidden)
    np.testing.assert_array_equal(found[1].router, wanted[1].router)


@pytest.mark.parametrize("n_workers", [1, 2, 3, 7])
def test_shares_make_what_one_process_makes(models, tmp_path, n_workers):
    job = job_in(tmp_path / "shared", models)
    run_all(job, n_workers)
    assert_same(merge_shares(job), compare(job_in(tmp_path / "alone", models), unheard))
    clear(tmp_path / "shared")
    assert not (tmp_path / "shared").exists()


def test_portions_of_a_span_are_numbered_over_the_whole_text(monkeypatch):
    monkeypatch.setattr("quantkit.evaluate.compare._HEAD_TOKENS", 3)
    whole = [
        (row + k, place)
        for span in TEXT.spans.all()
        for row, places in TEXT.portions(span, TEXT.spans.all())
        for k, place in enumerate(places.tolist())
    ]
    n_scored = N_CTX - 1 - N_CTX // 2
    assert [row for row, _ in whole] == list(range(len(CHUNKS) * n_scored))
    assert [place % N_CTX for _, place in whole] == list(range(8, 15)) * len(CHUNKS)
    alone = [places for _, places in TEXT.portions(1, range(1, 2))]
    assert np.concatenate(alone).tolist() == [*range(8, 15), *range(24, 31)]


def test_what_is_there_is_not_done_again(models, tmp_path, monkeypatch):
    run_all(job_in(tmp_path, models), 3)
    monkeypatch.delattr("quantkit.evaluate.shares.compare_share")
    run_all(job_in(tmp_path, models), 2)


@pytest.mark.parametrize(
    "other",
    [
        {"identity": "another model"},
        {"text": Windows.of(CHUNKS[::-1].copy(), None, SPAN)},
        {"text": Windows.of(CHUNKS, 7, SPAN)},
        {"text": Windows.of(CHUNKS, None, N_CTX)},
    ],
    ids=["model", "text", "bos", "spans"],
)
def test_what_another_comparison_left_is_not_taken(models, tmp_path, other):
    run_all(job_in(tmp_path, models))
    with pytest.raises(OutputError, match="lacks this file"):
        merge_shares(job_in(tmp_path, models, **other))


def flipped(data: bytes) -> bytes:
    return data[:-100] + bytes([data[-100] ^ 1]) + data[-99:]


DAMAGE = {
    "empty": lambda data, first: b"",
    "one byte": lambda data, first: data[:1],
    "only the first line": lambda data, first: data[: data.index(b"\n") + 1],
    "cut": lambda data, first: data[:-50],
    "longer": lambda data, first: data + b"\0",
    "a bit has flipped": lambda data, first: flipped(data),
    "zeros": lambda data, first: bytes(len(data)),
    "no newline": lambda data, first: data.replace(b"\n", b" "),
    "deeply nested": lambda data, first: b"[" * 100_000 + b"\n" + data,
    "a huge shape": lambda data, first: data.replace(b"[2, 14]", b"[2, 99999999999]"),
    "that of another span": lambda data, first: first,
}


@pytest.mark.parametrize("what", ["missing", *DAMAGE])
def test_scores_that_are_not_whole_are_refused_and_made_anew(models, tmp_path, what):
    job = job_in(tmp_path, models)
    run_all(job)
    whole = merge_shares(job)
    first, path = sorted(tmp_path.glob("scores-*"))[:2]
    if what == "missing":
        path.unlink()
    else:
        data = DAMAGE[what](path.read_bytes(), first.read_bytes())
        assert data != path.read_bytes()
        path.write_bytes(data)
    with pytest.raises(OutputError, match="lacks this file, or it is damaged") as caught:
        merge_shares(job)
    assert path.name in caught.value.where
    run_all(job)
    assert_same(merge_shares(job), whole)
