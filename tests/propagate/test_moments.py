"""Moments are the sums over tokens that they are said to be, in two folds."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantkit.propagate.moments import Moments, Sums


def tokens(n_tok: int, m: int, n: int, n_out: int, seed: int = 0):
    """x, student [n_tok, m, n], residual [n_tok, n_out], weight [n_tok], held [n_tok]."""
    make = torch.Generator().manual_seed(seed)
    x, student = (torch.randn(n_tok, m, n, generator=make) for _ in range(2))
    residual = torch.randn(n_tok, n_out, generator=make)
    weight = torch.rand(n_tok, generator=make)
    return x, student, residual, weight, torch.rand(n_tok, generator=make) < 0.3


def direct(x, student, residual, weight) -> tuple[np.ndarray, ...]:
    """(gram, drift, residual) of one matrix in float64, token by token."""
    x, s, r, w = (t.double().numpy() for t in (x, student, residual, weight))
    gram = sum(w[t] * np.outer(s[t], s[t]) for t in range(len(s)))
    drift = sum(w[t] * np.outer(x[t] - s[t], s[t]) for t in range(len(s)))
    written = sum(w[t] * np.outer(r[t], s[t]) for t in range(len(s)))
    return gram, drift, written


def assert_sums(sums: Sums, matrix: int, expected: tuple[np.ndarray, ...]) -> None:
    one = sums.of(matrix)
    found = (one.gram, one.drift, one.residual)
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours[0].double().numpy(), theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("m", [1, 3])
def test_sums_are_the_products_of_each_token_in_its_fold(m, weighted):
    x, student, residual, weight, held = tokens(57, m, 5, 4)
    moments = Moments(m, 5, 4)
    for part in torch.arange(57).split(10):
        moments.add(
            held[part], x[part], student[part], residual[part], weight[part] if weighted else None
        )
    if not weighted:
        weight = torch.ones(57)
    for sums, fold in ((moments.fitted(), ~held), (moments.held(), held)):
        assert sums.n_tokens == int(fold.sum()) > 0
        for matrix in range(m):
            parts = (x[fold, matrix], student[fold, matrix], residual[fold], weight[fold])
            assert_sums(sums, matrix, direct(*parts))
            total = float(weight[fold].double().sum())
            assert float(sums.of(matrix).weight) == pytest.approx(total, rel=1e-6)
    for matrix in range(m):
        parts = (x[:, matrix], student[:, matrix], residual, weight)
        assert_sums(moments.all(), matrix, direct(*parts))
    assert moments.all().n_tokens == 57


@settings(max_examples=40, deadline=None)
@given(st.lists(st.booleans(), min_size=1, max_size=40), st.integers(1, 7), st.booleans())
def test_every_token_is_in_one_fold_however_they_are_cut(held, step, weighted):
    fold = torch.tensor(held)
    x, student, residual, weight, _ = tokens(len(held), 2, 3, 2, seed=step)
    whole, cut = Moments(2, 3, 2), Moments(2, 3, 2)
    w = weight if weighted else None
    whole.add(fold, x, student, residual, w)
    for p in torch.arange(len(held)).split(step):
        cut.add(fold[p], x[p], student[p], residual[p], None if w is None else w[p])
    for ours, theirs in ((cut.fitted(), whole.fitted()), (cut.held(), whole.held())):
        assert ours.n_tokens == theirs.n_tokens
        torch.testing.assert_close(ours.gram, theirs.gram)
        torch.testing.assert_close(ours.residual, theirs.residual)
    assert whole.fitted().n_tokens + whole.held().n_tokens == whole.all().n_tokens == len(held)


def test_no_tokens_are_no_sums():
    moments = Moments(2, 3)
    moments.add(torch.zeros(0, dtype=torch.bool), torch.zeros(0, 2, 3), torch.zeros(0, 2, 3))
    assert moments.all().n_tokens == 0
    assert not moments.all().gram.any()


def test_a_weight_that_writes_no_residual_has_no_sums_of_it():
    moments = Moments(1, 3)
    moments.add(torch.tensor([False]), torch.ones(1, 1, 3), torch.ones(1, 1, 3))
    assert moments.all().residual is None
    with pytest.raises(ValueError, match="writes a residual"):
        _ = Moments(1, 3, 2).all() + moments.all()


def test_sums_of_two_parts_of_the_tokens_are_those_of_all():
    x, student, residual, weight, held = tokens(40, 1, 4, 3)
    first, second, both = (Moments(1, 4, 3) for _ in range(3))
    first.add(held[:25], x[:25], student[:25], residual[:25], weight[:25])
    second.add(held[25:], x[25:], student[25:], residual[25:], weight[25:])
    both.add(held, x, student, residual, weight)
    total, expected = first.all() + second.all(), both.all()
    torch.testing.assert_close(total.gram, expected.gram)
    torch.testing.assert_close(total.drift, expected.drift)
    torch.testing.assert_close(total.residual, expected.residual)
    torch.testing.assert_close(total.weight, expected.weight)
    assert total.n_tokens == 40
