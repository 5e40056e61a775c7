"""Axes with round ticks, labels that keep clear of each other, names and numbers for people."""

from __future__ import annotations

from itertools import combinations, pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from quantkit.evaluate.labels import binary_size, figure_name, number, short_names
from quantkit.evaluate.svg import (
    Axis,
    linear_axis,
    log_axis,
    place_labels,
    spread,
    text_width,
    tick_label,
)


@given(st.lists(st.floats(1e-12, 1e12), min_size=1, max_size=9))
def test_a_log_axis_shows_all_values_at_round_ticks(values):
    axis = log_axis(values, 300.0, 0.0)
    assert axis.low < min(values) and max(values) < axis.high
    assert 1 <= len(axis.ticks()) <= 10
    assert all(axis.low * 0.999 <= tick <= axis.high * 1.001 for tick in axis.ticks())
    places = [axis.at(value) for value in sorted(values)]
    assert all(0 <= place <= 300 for place in places)
    assert places == sorted(places, reverse=True)


@given(st.lists(st.floats(0, 1e12), min_size=1, max_size=9), st.booleans())
@example(values=[5e-324], zero=False)
def test_a_linear_axis_shows_all_values_at_round_ticks(values, zero):
    axis = linear_axis(values, 0.0, 100.0, zero=zero)
    assert axis.low <= min(values) and max(values) <= axis.high
    assert 2 <= len(axis.ticks()) <= 9
    assert all(0 <= axis.at(value) <= 100 for value in values)


def test_layers_have_whole_numbers():
    assert Axis(0, 3, 0, 100, whole=True).ticks() == [0, 1, 2, 3]
    assert Axis(0, 60, 0, 100, whole=True).ticks() == [0, 10, 20, 30, 40, 50, 60]


@given(st.lists(st.tuples(st.floats(0, 700), st.floats(0, 400), st.integers(1, 30)), max_size=30))
def test_labels_cover_no_other_label_and_no_dot(wishes):
    bounds = (0.0, 0.0, 700.0, 400.0)
    dots = [(x, y) for x, y, _ in wishes]
    labels = ["m" * n for _, _, n in wishes]
    placed = place_labels(dots, labels, bounds)
    boxes = [box for box in placed if box]
    for label, box in zip(labels, placed, strict=True):
        if box:
            assert box[2] - box[0] == pytest.approx(text_width(label))
            assert box[0] >= 0 and box[1] >= 0 and box[2] <= 700 and box[3] <= 400
            assert not any(box[0] < x < box[2] and box[1] < y < box[3] for x, y in dots)
    for a, b in combinations(boxes, 2):
        assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]


def test_a_lone_label_has_a_place():
    assert place_labels([(350, 200)], ["name"], (0, 0, 700, 400)) != [None]


@given(st.lists(st.floats(0, 300), min_size=1, max_size=20))
def test_line_names_keep_their_order_and_a_line_apart(tops):
    placed = spread(tops, 0.0, 300.0)
    order = sorted(range(len(tops)), key=lambda k: (tops[k], k))
    heights = [placed[k] for k in order]
    assert all(b - a >= 13 - 1e-6 for a, b in pairwise(heights))
    assert min(heights) >= 0 and max(heights) <= 300
    if all(b - a >= 13 for a, b in pairwise(sorted(tops))):
        assert placed == pytest.approx(tops)


# --- names and numbers


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0.01, "0.01"), (1.0, "1"), (20000.0, "20000"), (1e5, "10⁵"), (1e-5, "10⁻⁵"),
        (2e-5, "2·10⁻⁵"), (0.0, "0"), (0.001, "0.001"), (5e-4, "5·10⁻⁴"),
    ],
)  # fmt: skip
def test_ticks_read(value, shown):
    assert tick_label(value) == shown


@pytest.mark.parametrize(
    ("value", "digits", "shown"),
    [
        (None, 4, "–"), (0.0, 4, "0"), (1234567, 4, "1,234,567"), (18.2068, 4, "18.21"),
        (0.072, 4, "0.07200"), (0.000072, 2, "0.000072"), (7.2e-9, 4, "7.2·10⁻⁹"),
        (-0.5, 2, "-0.50"), (123456.7, 4, "123,457"), (1e20, 4, "10²⁰"), (90.386, 4, "90.39"),
    ],
)  # fmt: skip
def test_figures_read(value, digits, shown):
    assert number(value, digits) == shown


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("ppl", "PPL"),
        ("ppl_base_error", "PPL of the base, standard error"),
        ("kld_mean", "mean KLD"),
        ("kld_mean_ci", "mean KLD, 95 % interval"),
        ("kld_p99_9", "99.9 % KLD"),
        ("dp_p0_1", "0.1 % Δp, %"),
        ("mean_dp", "mean Δp, %"),
        ("rms_dp_error", "RMS Δp, %, standard error"),
        ("same_top_p", "same top token, %"),
        ("kld_of_doom", "kld_of_doom"),
        ("_error", "_error"),
    ],
)
def test_summary_keys_have_names(key, name):
    assert figure_name(key) == name


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["/m/Kimi-K2.5-Q2_K-00001-of-00009.gguf"], ["Kimi-K2.5-Q2_K"]),
        (["a/m-Q2_K.gguf", "b/m-Q2_K_S.gguf"], ["Q2_K", "Q2_K_S"]),
        (["m-UD-Q2_K.gguf", "m-Q2_K.gguf"], ["UD-Q2_K", "Q2_K"]),
        (["one/m.gguf", "two/m.gguf"], ["m (1)", "m (2)"]),
        (["m.gguf", "m-Q8_0.gguf"], ["m", "m-Q8_0"]),
        (["C:\\models\\m-Q8_0.gguf", "n-Q8_0.gguf"], ["m-Q8_0", "n-Q8_0"]),
        ([".gguf", ""], [".gguf", "?"]),
    ],
)
def test_short_names(paths, names):
    assert short_names(paths) == names


@pytest.mark.parametrize(
    ("n_bytes", "shown"),
    [(0, "0 bytes"), (1023, "1023 bytes"), (1024, "1.00 KiB"), (383_420_000_000, "357.09 GiB")],
)
def test_binary_sizes(n_bytes, shown):
    assert binary_size(n_bytes) == shown
