"""Rounding with feedback: what block LDLQ, coordinate descent and refitted scales promise."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import pytest
import torch

from quantkit.errors import NonFiniteError, UsageError
from quantkit.quantize import feedback as module
from quantkit.quantize import layout
from quantkit.quantize.codec import How, codec_of
from quantkit.quantize.feedback import Feedback, Metric, encode_with_feedback, supports
from quantkit.quantize.kernels import feedback as kernels
from quantkit.types import GgmlType
from tests.quantize import laws
from tests.quantize.ggml import ggml_valid

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]

TYPES = sorted((*layout.LEVELS, *layout.BOOKS), key=lambda t: t.name)
BOOKS = sorted(layout.BOOKS, key=lambda t: t.name)
HOW = How("default", "importance", 0.0)
FIRST, SECOND = Feedback(n_passes=0), Feedback(n_passes=1)
CODES_ONLY = Feedback(n_passes=1, ridge=1e30)  # such a ridge holds every scale where it is
every_type = pytest.mark.parametrize("type_", TYPES, ids=lambda t: t.name)
every_book = pytest.mark.parametrize("type_", BOOKS, ids=lambda t: t.name)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def autoregressive(n: int, seed: int = 1) -> torch.Tensor:
    """Neighbours correlate by 0.9; columns of very different size."""
    at = np.arange(n)
    size = np.exp(0.5 * np.random.default_rng(seed).standard_normal(n))
    return torch.from_numpy((0.9 ** abs(at[:, None] - at) * np.outer(size, size)).astype("f4"))


def low_rank(n: int, seed: int = 2) -> torch.Tensor:
    """An eighth of the directions carries nearly everything."""
    x = np.random.default_rng(seed).standard_normal((n // 8, n))
    return torch.from_numpy((x.T @ x / (n // 8) + 0.05 * np.eye(n)).astype("f4"))


def white(n: int) -> torch.Tensor:
    return torch.eye(n)


def scattered(n: int, seed: int = 3) -> torch.Tensor:
    """Uncorrelated columns of very different size."""
    return torch.diag(
        torch.from_numpy(np.exp(np.random.default_rng(seed).standard_normal(n)))
    ).float()


GRAMS = {"autoregressive": autoregressive, "low rank": low_rank}


def cost(x: F32, decoded: F32, metric: Metric) -> F64:
    """(x - x^) H (x - x^)' of every row."""
    lost = x.astype(np.float64) - decoded
    return np.asarray(((lost @ metric.gram.double().numpy()) * lost).sum(1))


def rounded(type_: GgmlType, x: F32, metric: Metric, feedback: Feedback = SECOND) -> F32:
    """What x becomes."""
    codec = codec_of(type_)
    return codec.decode(encode_with_feedback(codec, x, metric, HOW, feedback))


def nearest(type_: GgmlType, x: F32, metric: Metric) -> F32:
    codec = codec_of(type_)
    return codec.decode(codec.encode(x, metric.importance, HOW))


def textbook(x: F32, type_: GgmlType, blocks: npt.NDArray[np.uint8], gram: torch.Tensor) -> F64:
    """GPTQ column by column (arXiv 2210.17323), from H^-1 = U'U, the scales of `blocks` given."""
    levels = layout.LEVELS[type_]
    scale, offset = (np.repeat(a, levels.sub, 1) for a in layout.scales_of(type_, blocks))
    u = np.linalg.cholesky(np.linalg.inv(gram.double().numpy())).T
    w, out = x.astype(np.float64), np.empty(x.shape)
    for k in range(x.shape[1]):
        grid = scale[:, k, None] * levels.values.astype(np.float64) + offset[:, k, None]
        best = np.abs(grid - w[:, k, None]).argmin(1)
        out[:, k] = np.take_along_axis(grid, best[:, None], 1)[:, 0]
        w[:, k:] -= np.outer((w[:, k] - out[:, k]) / u[k, k], u[k, k:])
    return out


def test_every_type_with_codes_or_entries_can_be_rounded_with_feedback():
    assert all(supports(type_) for type_ in TYPES)
    assert not any(supports(type_) for type_ in (GgmlType.F32, GgmlType.F16, GgmlType.BF16))


@pytest.mark.parametrize("type_", layout.LEVELS, ids=lambda t: t.name)
def test_codes_are_those_of_the_textbook_given_the_scales(type_):
    x, gram = laws.gauss(8, 512), autoregressive(512)
    metric = Metric(gram, 0.01)
    codec = codec_of(type_)
    blocks = encode_with_feedback(codec, x, metric, HOW, FIRST)
    ours, theirs = codec.decode(blocks), textbook(x, type_, blocks, metric.gram)
    # A tie that f32 breaks otherwise changes the rest of its row.
    same = np.isclose(ours, theirs, rtol=1e-5, atol=1e-9).all(1)
    assert same.mean() >= 0.8
    assert cost(x, ours, metric).sum() == pytest.approx(
        cost(x, theirs.astype("f4"), metric).sum(), rel=5e-3
    )


@every_type
@pytest.mark.parametrize("gram", GRAMS)
def test_feedback_beats_nearest_rounding_on_correlated_inputs(type_, gram):
    x, metric = laws.student(8, 512), Metric(GRAMS[gram](512), 0.01)
    with_feedback = cost(x, rounded(type_, x, metric, FIRST), metric).sum()
    assert with_feedback <= cost(x, nearest(type_, x, metric), metric).sum()


@every_type
@pytest.mark.parametrize("gram", [white, scattered])
def test_without_correlation_nothing_is_lost(type_, gram):
    x, metric = laws.gauss(8, 512), Metric(gram(512), 0.01)
    before = cost(x, nearest(type_, x, metric), metric)
    for feedback in (FIRST, SECOND):
        assert (cost(x, rounded(type_, x, metric, feedback), metric) <= before * 1.002).all()


@every_type
@pytest.mark.parametrize("gram", GRAMS)
def test_going_over_the_codes_once_more_never_raises_the_error(type_, gram):
    x, metric = laws.student(8, 512), Metric(GRAMS[gram](512), 0.01)
    first = cost(x, rounded(type_, x, metric, FIRST), metric)
    second = cost(x, rounded(type_, x, metric, CODES_ONLY), metric)
    assert (second <= first * (1 + 1e-5)).all()
    assert second.sum() < first.sum()


@every_type
@pytest.mark.parametrize("gram", GRAMS)
def test_every_pass_with_new_scales_lowers_the_error_or_leaves_it(type_, gram):
    x, metric = laws.student(8, 512), Metric(GRAMS[gram](512), 0.01)
    costs = [cost(x, rounded(type_, x, metric, Feedback(k)), metric) for k in range(3)]
    for before, after in pairwise(costs):
        assert (after <= before * (1 + 1e-4)).all()
    assert costs[1].sum() < costs[0].sum()


@pytest.mark.parametrize("group", [1, 8])
@pytest.mark.parametrize("gram", GRAMS)
def test_the_factors_give_the_gram_matrix_back(group, gram):
    metric = Metric(GRAMS[gram](96), 0.01)
    upper, d = metric.factor(group)
    assert torch.equal(upper, upper.triu())
    for k in range(0, 96, group):
        block = upper[k : k + group, k : k + group]
        torch.testing.assert_close(block, torch.eye(group), atol=1e-6, rtol=0)
    h, r = metric.gram.double().numpy(), upper.double().numpy()
    inverse = np.linalg.inv(r)
    blocks = (inverse @ h @ inverse.T).reshape(96 // group, group, 96 // group, group)
    for i in range(96 // group):
        for j in range(96 // group):
            if i != j:
                assert abs(blocks[i, :, j]).max() < 1e-4 * h.max()
        own = blocks[i, :, i]
        np.testing.assert_allclose(d[i], own / own.diagonal().mean(), atol=1e-4)


@every_type
def test_neither_chunks_nor_threads_show_in_the_bytes(type_, monkeypatch):
    codec, x, metric = codec_of(type_), laws.student(37, 512), Metric(autoregressive(512), 0.01)
    whole = encode_with_feedback(codec, x, metric, HOW, SECOND)
    np.testing.assert_array_equal(
        whole, encode_with_feedback(codec, np.asfortranarray(x), metric, HOW, SECOND, n_threads=2)
    )
    parts = [encode_with_feedback(codec, x[k : k + 5], metric, HOW, SECOND) for k in (0, 5, 10)]
    np.testing.assert_array_equal(whole[:15], np.concatenate(parts))
    monkeypatch.setattr(module, "ROWS", 7)
    np.testing.assert_array_equal(
        whole, encode_with_feedback(codec, x, metric, HOW, SECOND, n_threads=2)
    )


def dead(n: int) -> torch.Tensor:
    """Channels that are always zero, a super-block of them among others."""
    alive = torch.from_numpy(np.random.default_rng(4).random(n) < 0.5).float()
    alive[: n // 2] = 0
    return autoregressive(n) * torch.outer(alive, alive)


HARD_GRAMS = {
    "dead channels": dead,
    "one direction": lambda n: torch.ones(n, n),
    "nothing": lambda n: torch.zeros(n, n),
    "faint": lambda n: autoregressive(n) * 1e-30,
    "huge": lambda n: autoregressive(n) * 1e30,
    "an outlier": lambda n: autoregressive(n) + 1e6 * torch.diag((torch.arange(n) == 5).float()),
}


@every_type
@pytest.mark.parametrize("gram", HARD_GRAMS)
def test_hostile_weights_and_inputs_give_valid_finite_blocks(type_, gram):
    codec, rows = codec_of(type_), laws.hostile_rows(512)
    blocks = encode_with_feedback(
        codec, np.stack(list(rows.values())), Metric(HARD_GRAMS[gram](512), 0.01), HOW, SECOND
    )
    assert ggml_valid(blocks, type_)
    decoded = codec.decode(blocks)
    bad = [name for name, row in zip(rows, decoded, strict=True) if not np.isfinite(row).all()]
    assert not bad
    assert not decoded[:2].any()


@every_type
def test_dead_channels_cost_the_others_nothing(type_):
    """Whatever is done to columns without input, the rest is rounded as well as before."""
    x, metric = laws.gauss(8, 512), Metric(dead(512), 1e-6)
    assert (
        cost(x, rounded(type_, x, metric), metric).sum()
        <= cost(x, nearest(type_, x, metric), metric).sum()
    )


@pytest.mark.parametrize("n", [32, 64, 96, 128, 320])
@pytest.mark.parametrize("name", ["Q4_0", "Q5_1", "Q8_0", "IQ4_NL", "MXFP4"])
def test_rows_need_not_fill_a_super_block(name, n):
    x, metric = laws.gauss(8, n), Metric(autoregressive(n), 0.01)
    costs = [cost(x, rounded(GgmlType[name], x, metric, f), metric).sum() for f in (FIRST, SECOND)]
    before = cost(x, nearest(GgmlType[name], x, metric), metric).sum()
    assert costs[1] <= costs[0] * (1 + 1e-5)
    assert costs[1] < before


def test_no_rows_give_no_blocks():
    codec = codec_of(GgmlType.Q4_K)
    x = np.empty((0, 256), np.float32)
    assert encode_with_feedback(codec, x, Metric(white(256), 0.01), HOW, SECOND).shape == (0, 144)


@pytest.mark.parametrize(
    "gram",
    [torch.ones(64, 64), torch.diag(torch.linspace(-1, 1, 64)), -torch.eye(64)],
    ids=["one direction", "indefinite", "negative"],
)
def test_a_gram_matrix_that_stays_singular_is_refused(gram):
    with pytest.raises(UsageError, match="not positive definite"):
        Metric(gram, 0.0).factor(1)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_gram_matrix_that_is_not_finite_is_refused(value):
    gram = torch.eye(64)
    gram[3, 4] = value
    with pytest.raises(NonFiniteError, match="Gram"):
        Metric(gram, 0.01)


@pytest.mark.parametrize("shape", [(64, 32), (64,), (0, 0)])
def test_a_gram_matrix_that_is_not_square_is_refused(shape):
    with pytest.raises(UsageError, match="square"):
        Metric(torch.ones(shape), 0.01)


def test_a_metric_of_other_columns_is_refused():
    with pytest.raises(UsageError, match="512 columns"):
        rounded(GgmlType.Q4_K, laws.gauss(2, 512), Metric(white(256), 0.01))


def test_a_type_without_codes_is_refused():
    with pytest.raises(UsageError, match="BF16"):
        rounded(GgmlType.BF16, laws.gauss(2, 256), Metric(white(256), 0.01))


def signs_of(type_: GgmlType) -> F64:
    """All signs that eight weights may have, f64[patterns, 8]."""
    minus = (np.arange(256)[:, None] >> np.arange(8)) & 1
    if layout.BOOKS[type_].signs == "even":
        minus = minus[minus.sum(1) % 2 == 0]
    return 1.0 - 2.0 * minus


def least_cost(type_: GgmlType, u: F64, weight: F64, shifts: list[float]) -> float:
    """Least sum of weight (u - value)^2 over everything that eight weights can be coded as."""
    book = layout.BOOKS[type_]
    levels = book.levels.astype(np.float64)
    if book.signs == "none":
        each = [((u - levels - s) ** 2 * weight).sum(1).min() for s in shifts]
        return float(min(each))
    least = np.inf
    for signs in signs_of(type_):
        v, total = u * signs, 0.0
        for k in range(0, 8, book.places):
            part = slice(k, k + book.places)
            total += ((v[part] - levels) ** 2 * weight[part]).sum(1).min()
        least = min(least, total)
    return float(least)


class Groups:
    """A row of groups of eight under a metric that `round_entries` is asked to code."""

    def __init__(self, type_: GgmlType, n: int, metric: F32, seed: int = 5) -> None:
        rng = np.random.default_rng(seed)
        self.type, self.n, self.metric = type_, n, metric
        self.book = layout.BOOKS[type_]
        spread = float(np.sqrt(np.square(self.book.levels).mean()))
        self.z = (rng.standard_normal((1, n)) * spread).astype(np.float32)
        self.scale = np.ones((1, n // self.book.sub), np.float32)
        self.marks = np.zeros((1, n // 8), np.uint8)
        if self.book.shifts == "per-block":
            self.marks[:] = np.repeat(rng.integers(0, 2, (1, n // 32), np.uint8), 4, 1)
        self.given = self.marks.copy()
        self.entries = np.zeros((1, n // self.book.places), np.uint16)

    def code(self, n_scans: int) -> F64:
        """Values chosen, f64[groups, 8]."""
        chosen = np.empty_like(self.z)
        kernels.round_entries(
            self.z.copy(),
            self.z,
            self.scale,
            (
                self.book.places,
                {"free": kernels.FREE, "even": kernels.EVEN, "none": kernels.NONE}[self.book.signs],
                self.book.shifts == "per-group",
            ),
            np.ascontiguousarray(self.book.levels.T).ravel(),
            self.metric.ravel(),
            np.zeros((self.n, self.n), np.float32),
            n_scans,
            False,
            self.entries,
            self.marks,
            chosen,
        )
        return chosen.astype(np.float64).reshape(-1, 8)

    def shifts(self, group: int) -> list[float]:
        """Shifts that a group may have."""
        if self.book.shifts == "per-group":
            return [0.125, -0.125]
        return [-0.125 if self.given[0, group] else 0.125]


@every_book
def test_under_a_diagonal_metric_the_best_of_all_codes_is_found(type_):
    n_groups = 32
    weight = np.exp(np.random.default_rng(6).standard_normal((n_groups, 8))).astype(np.float32)
    metric = np.stack([np.diag(w) for w in weight])
    groups = Groups(type_, 8 * n_groups, metric)
    u, chosen = groups.z.astype(np.float64).reshape(-1, 8), groups.code(1)
    for group in range(n_groups):
        w = weight[group].astype(np.float64)
        ours = float(((u[group] - chosen[group]) ** 2 * w).sum())
        assert ours <= least_cost(type_, u[group], w, groups.shifts(group)) * (1 + 1e-5) + 1e-6


@every_book
def test_further_scans_lower_the_cost_within_groups(type_):
    """Groups whose places correlate: a second look pays, and comes near the best."""
    n_groups = 64
    x = np.random.default_rng(7).standard_normal((n_groups, 16, 8))
    x += x.mean(2, keepdims=True)
    metric = np.asarray(x.transpose(0, 2, 1) @ x / 16, np.float32)
    groups = Groups(type_, 8 * n_groups, metric)
    costs = []
    for n_scans in (1, 2, 4):
        lost = groups.z.astype(np.float64).reshape(-1, 8) - groups.code(n_scans)
        costs.append(np.einsum("gi,gij,gj->g", lost, metric.astype(np.float64), lost).sum())
    assert costs[2] <= costs[1] <= costs[0]


@every_book
def test_what_the_kernel_says_it_chose_is_what_the_blocks_decode_to(type_):
    """Signs of even parity above all: the block holds seven of eight."""
    codec, x, metric = codec_of(type_), laws.student(8, 256), Metric(low_rank(256), 0.01)
    blocks = codec.encode(x, metric.importance, HOW)
    entries, marks = layout.entries_of(type_, blocks)
    book, (upper, d) = layout.BOOKS[type_], metric.factor(8)
    chosen = np.empty_like(x)
    kernels.round_entries(
        x.copy(),
        x,
        layout.book_scales_of(type_, blocks),
        (
            book.places,
            {"free": kernels.FREE, "even": kernels.EVEN, "none": kernels.NONE}[book.signs],
            book.shifts == "per-group",
        ),
        np.ascontiguousarray(book.levels.T).ravel(),
        d.ravel(),
        np.ascontiguousarray(upper.numpy()),
        2,
        False,
        entries,
        marks,
        chosen,
    )
    decoded = codec.decode(layout.with_entries(type_, blocks, entries, marks))
    np.testing.assert_allclose(chosen, decoded, rtol=1e-6)
    if book.signs == "even":
        assert not (np.bitwise_count(marks) % 2).any()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_aims_that_are_not_finite_get_codes_all_the_same(value):
    """Kernels do not check indices, so no float may lead to one that is out of range."""
    z = np.full((2, 8), value, np.float32)
    codes, chosen = np.full(z.shape, 255, np.uint8), np.empty_like(z)
    ones, zeros = np.ones((2, 1), np.float32), np.zeros((2, 1), np.float32)
    for values in (np.arange(4, dtype=np.float32), np.array([-1, 0, 3], np.float32)):
        kernels.round_levels(
            z.copy(), z, ones, zeros, values, np.zeros((8, 8), np.float32), codes, chosen
        )
        assert (codes < len(values)).all()
        assert np.isfinite(chosen).all()
