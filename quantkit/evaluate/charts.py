"""The report's charts: dots with names, lines over layers, distributions, maps of counts.

Functions take plain numbers and return SVG markup.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

import numpy as np
import numpy.typing as npt

from quantkit.evaluate.svg import (
    LINE,
    Axis,
    Dot,
    frame,
    leader,
    linear_axis,
    log_axis,
    place_labels,
    png,
    round_step,
    side_label,
    spread,
    steps,
    svg,
    tag,
    text,
    text_width,
    title,
    x_axis,
)

WIDTH = 760.0
N_COLOURS = 8

_LEFT, _RIGHT, _TOP, _BOTTOM = 62.0, 16.0, 14.0, 44.0
_DASHES = ("", "7 3", "2 3", "9 3 2 3", "1 5")


@dataclass(frozen=True, slots=True)
class Point:
    """A dot at (x, y) with its label; `hover` is what pointing at it shows."""

    x: float
    y: float
    label: str
    hover: str
    colour: int


@dataclass(frozen=True, slots=True)
class Line:
    """A series over integer x; a gap where y is None."""

    label: str
    x: Sequence[int]
    y: Sequence[float | None]
    colour: int


@dataclass(frozen=True, slots=True)
class Row:
    """A distribution: shares per bin, and marks (x, kind) of kind `median`, `mean` or `tail`."""

    label: str
    hover: str
    shares: Sequence[float]
    marks: Sequence[tuple[float, str]]
    colour: int


def scatter(points: Sequence[Point], frontier: Sequence[Point], x_label: str, y_label: str) -> str:
    """Dots over a linear x and a logarithmic y, all y > 0; `frontier` is joined by stairs."""
    height = 380.0 + 5.0 * max(0, len(points) - 10)
    x = linear_axis([point.x for point in points], _LEFT, WIDTH - _RIGHT, zero=False)
    y = log_axis([point.y for point in points], height - _BOTTOM, _TOP)
    stairs = steps([(x.at(point.x), y.at(point.y)) for point in frontier])
    parts = [frame(x, y, x_label, y_label), tag("path", d=stairs, class_="frontier")]
    dots = [(x.at(point.x), y.at(point.y)) for point in points]
    labels = [cut_middle(point.label) for point in points]
    boxes = place_labels(dots, labels, (_LEFT + 2, _TOP, WIDTH - 2, height - _BOTTOM - 2))
    for point, dot, label, box in zip(points, dots, labels, boxes, strict=True):
        inner = title(point.hover)
        if box:
            inner += leader(dot, box) + text(label, box[0], box[3] - 4)
        inner += tag("circle", cx=dot[0], cy=dot[1], r=5.0, class_="dot")
        parts.append(_mark(inner, point.colour))
    return svg(parts, WIDTH, height, f"{y_label} over {x_label}")


def lines(series: Sequence[Line], x_label: str, y_label: str, *, log: bool) -> str:
    """Series over integer x, each named at its right end; on a log axis only y > 0 is drawn."""
    labels = [cut_middle(line.label, 26) for line in series]
    right = max(map(text_width, labels)) + 26
    height = max(300.0, _TOP + _BOTTOM + (LINE - 1) * len(series))
    columns = [x for line in series for x in line.x]
    values = [v for line in series for v in line.y if v is not None and (v > 0 or not log)]
    x = Axis(min(columns), max(*columns, min(columns) + 1), _LEFT, WIDTH - right, whole=True)
    make = log_axis if log else linear_axis
    y = make(values or [1.0], height - _BOTTOM, _TOP)
    parts = [frame(x, y, x_label, y_label)]
    ends = []
    for line in series:
        dots = [
            (x.at(i), y.at(v)) if v is not None and (v > 0 or not log) else None
            for i, v in zip(line.x, line.y, strict=True)
        ]
        ends.append(next((dot for dot in reversed(dots) if dot), (x.end, y.begin)))
        dash = _DASHES[line.colour // N_COLOURS % len(_DASHES)]
        path = tag("path", d=_broken_path(dots), class_="line", stroke_dasharray=dash)
        lone = [tag("circle", cx=at, cy=top, r=2.5, class_="dot") for at, top in _lone(dots)]
        parts.append(_mark(title(line.label) + path + "".join(lone), line.colour))
    heights = spread([dot[1] for dot in ends], y.end, y.begin)
    for line, label, end, at in zip(series, labels, ends, heights, strict=True):
        reach = f"M{end[0]:.1f} {end[1]:.1f}L{x.end + 18:.1f} {at:.1f}"
        inner = title(line.label) + tag("path", d=reach, class_="leader")
        parts.append(_mark(inner + text(label, x.end + 21, at + 4), line.colour))
    return svg(parts, WIDTH, height, f"{y_label} over {x_label}")


def _lone(dots: Sequence[Dot | None]) -> list[Dot]:
    """Those that no line touches."""
    around = [None, *dots, None]
    return [dot for k, dot in enumerate(dots) if dot and not around[k] and not around[k + 2]]


def _broken_path(dots: Sequence[Dot | None]) -> str:
    path, pen = [], "M"
    for dot in dots:
        if dot:
            path.append(f"{pen}{dot[0]:.1f} {dot[1]:.1f}")
        pen = "L" if dot else "M"
    return "".join(path)


def distributions(rows: Sequence[Row], log10_edges: Sequence[float], x_label: str) -> str:
    """One histogram per row over a shared logarithmic axis, each as high as its row."""
    labels = [cut_middle(row.label, 26) for row in rows]
    left = max(map(text_width, labels)) + 16
    step = 46.0 if len(rows) <= 12 else 30.0
    bottom = _TOP + step * len(rows)
    used = [k for row in rows for k, share in enumerate(row.shares) if share > 0] or [0]
    first, last = min(used), max(used) + 1
    x = Axis(10 ** log10_edges[first], 10 ** log10_edges[last], left, WIDTH - _RIGHT, log=True)
    edges = [x.at(10**edge) for edge in log10_edges[first : last + 1]]
    parts = [x_axis(x, _TOP, bottom, x_label)]
    for k, (row, label) in enumerate(zip(rows, labels, strict=True)):
        base, tallest = _TOP + step * (k + 1), max(row.shares, default=0.0) or 1.0
        path = f"M{x.begin:.1f} {base:.1f}"
        for share, end in zip(row.shares[first:last], edges[1:], strict=True):
            path += f"V{base - (step - 8) * share / tallest:.1f}H{end:.1f}"
        inner = title(row.hover) + tag("path", d=f"{path}V{base:.1f}Z", class_="area")
        for value, kind in row.marks:
            inner += _quantile(x.at(value), base, step - 8, kind)
        parts.append(_mark(inner + text(label, left - 8, base - 4, "end"), row.colour))
    return svg(parts, WIDTH, bottom + _BOTTOM, f"distribution of {x_label}")


def _quantile(x: float, base: float, height: float, kind: str) -> str:
    """A bar for the median, a dot for the mean, a ring for the tail."""
    if kind == "median":
        return tag("path", d=f"M{x:.1f} {base:.1f}V{base - height:.1f}", class_="median")
    return tag("circle", cx=x, cy=base - 5, r=4.0, class_="dot" if kind == "mean" else "ring")


def heat_map(
    pixels: npt.NDArray[np.uint8],
    palette: Sequence[tuple[int, int, int]],
    rows: Sequence[tuple[str, str]],
    x_label: str,
    y_label: str,
) -> str:
    """A cell per entry of u8[rows, columns], coloured by `palette`; `rows` are (name, hover)."""
    n_rows, n_columns = pixels.shape
    cell = min(26.0, (WIDTH - _LEFT - _RIGHT) / n_columns), min(24.0, max(5.0, 460.0 / n_rows))
    place = {"x": _LEFT, "y": _TOP, "width": n_columns * cell[0], "height": n_rows * cell[1]}
    right, bottom = _LEFT + place["width"], _TOP + place["height"]
    image = base64.b64encode(png(pixels, palette)).decode("ascii")
    parts = [
        tag(
            "image", **place, preserveAspectRatio="none", class_="pixels",
            href=f"data:image/png;base64,{image}",
        ),
        tag("rect", **place, class_="border"),
    ]  # fmt: skip
    for k, (name, hover) in enumerate(rows):
        top = _TOP + k * cell[1]
        strip = place | {"y": top, "height": cell[1]}
        parts.append(tag("g", title(hover) + tag("rect", **strip, class_="glass")))
        if k % ceil(LINE / cell[1]) == 0:
            parts.append(text(name, _LEFT - 6, top + cell[1] / 2 + 4, "end"))
    parts += [
        text(str(k), _LEFT + (k + 0.5) * cell[0], bottom + 15, "middle")
        for k in range(0, n_columns, max(1, int(round_step(float(n_columns)))))
    ]
    parts.append(text(x_label, (_LEFT + max(right, _LEFT + 80)) / 2, bottom + 34, "middle", "name"))
    parts.append(side_label(y_label, (_TOP + bottom) / 2))
    return svg(parts, WIDTH, bottom + _BOTTOM, f"{y_label} by {x_label}")


def cut_middle(name: str, n_chars: int = 34) -> str:
    """Both ends of a long name: what tells quants apart is mostly at its end."""
    if len(name) <= n_chars:
        return name
    return f"{name[: n_chars // 3]}…{name[-(n_chars - n_chars // 3 - 1) :]}"


def _mark(content: str, colour: int) -> str:
    return tag("g", content, class_=f"mark c{colour % N_COLOURS}")
