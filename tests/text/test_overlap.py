"""The share of windows that two sets have in common, against plain sets of tuples."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantkit.errors import UsageError
from quantkit.text import overlap as module
from quantkit.text.overlap import Hashes, overlap, refuse_overlap
from quantkit.text.tokens import Ids
from tests.text.support import token_set

few = st.lists(st.integers(0, 2), min_size=1, max_size=60)


def windows(ids: list[int], n: int) -> list[tuple[int, ...]]:
    return [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]


def check(a: list[int], b: list[int], n: int) -> None:
    found = overlap(token_set(a), token_set(b), n)
    known = set(windows(a, n))
    shared = [window for window in windows(b, n) if window in known]
    assert (found.n_shared, found.n_windows) == (len(shared), len(windows(b, n)))
    assert found.share == (len(shared) / len(windows(b, n)) if windows(b, n) else 0)
    if shared:
        assert found.example is not None
        assert tuple(found.example) == shared[0]
    else:
        assert found.example is None


@settings(deadline=None)
@given(few, few, st.integers(1, 8))
def test_the_overlap_is_that_of_sets_of_windows(a: list[int], b: list[int], n: int) -> None:
    check(a, b, n)


@settings(deadline=None)
@given(a=few, b=few, n=st.integers(1, 6), n_hashes=st.integers(1, 3))
def test_colliding_hashes_change_nothing(a: list[int], b: list[int], n: int, n_hashes: int) -> None:
    real = module._hashes

    def weak(rows: Ids) -> Hashes:
        hashes: Hashes = real(rows) % np.uint64(n_hashes)
        return hashes

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_hashes", weak)
        check(a, b, n)


@settings(deadline=None)
@given(
    st.lists(st.integers(0, 2**31 - 1), min_size=64, max_size=200), st.integers(0, 30), st.data()
)
def test_a_copied_passage_is_found(train: list[int], before: int, data: st.DataObject) -> None:
    begin = data.draw(st.integers(0, len(train) - 40))
    fresh = [2**31 - 1 - i for i in range(before)]
    test = [*fresh, *train[begin : begin + 40], *fresh]
    found = overlap(token_set(train), token_set(test))
    assert found.n_shared >= 9
    assert found.example is not None


def test_a_text_overlaps_itself_and_not_a_shuffled_one() -> None:
    ids = np.random.default_rng(1).integers(0, 1000, 5000)
    assert overlap(token_set(ids), token_set(ids)).share == 1
    assert overlap(token_set(ids), token_set(ids[::-1])).share == 0


def test_a_million_tokens_and_a_dull_text_take_seconds() -> None:
    rng = np.random.default_rng(1)
    start = time.monotonic()
    train = rng.integers(0, 150_000, 1_000_000)
    train[::2_000] = 7
    assert overlap(token_set(train), token_set(train[500_000:700_000])).share == 1
    dull = np.zeros(1_000_000, np.int32)
    assert overlap(token_set(dull), token_set(dull)).share == 1
    assert time.monotonic() - start < 30


def test_too_much_in_common_is_refused_unless_forced() -> None:
    ids = np.random.default_rng(1).integers(0, 1000, 10_000)
    train, test = token_set(ids, name="train"), token_set(ids[9_000:], name="test")
    with pytest.raises(UsageError, match=r"100.00% of test's windows .* train") as caught:
        refuse_overlap(train, test)
    assert "another text" in caught.value.hint
    assert refuse_overlap(train, test, force=True).share == 1


def test_the_limit_is_still_allowed() -> None:
    train = token_set(range(1000))
    fresh = list(range(5000, 5000 + 4000))
    test = token_set([*range(32 + 38), *fresh], n_vocab=10_000)
    found = refuse_overlap(train, test)
    assert 0 < found.share <= 0.01
    with pytest.raises(UsageError):
        refuse_overlap(train, test, limit=found.share / 2)


def test_sets_of_two_tokenizers_are_not_compared() -> None:
    with pytest.raises(UsageError, match="different tokenizers"):
        overlap(token_set([1]), token_set([1], tokenizer="u" * 64))


def test_a_window_of_no_tokens_is_refused() -> None:
    with pytest.raises(UsageError, match="window"):
        overlap(token_set([1]), token_set([1]), 0)
