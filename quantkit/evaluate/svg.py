"""SVG by hand: elements with everything escaped, axes with round ticks, places for labels.

Colours are classes of the page's style sheet, so that a picture follows a light or dark theme;
what pointing at a thing shows is in its `<title>`.
"""

from __future__ import annotations

import struct
import unicodedata
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from math import ceil, cos, floor, log10, radians, sin

import numpy as np
import numpy.typing as npt

from quantkit.container.names import escaped

FONT = 12.0  # px
LINE = 14.0

_DOT = 6.0  # half the side of the square that a dot keeps free
_RADII = (9.0, 20.0, 32.0, 46.0, 62.0, 80.0, 100.0, 125.0, 150.0, 180.0)  # from a dot to its label
_ANGLES = (-40, 40, -140, 140, 0, 180, -75, 75, -105, 105)  # degrees, clockwise
_NEAR = 13.0  # a label farther off gets a leader
_HUGE = 1e30  # an axis ends here whatever the data say
_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
Dot = tuple[float, float]
Box = tuple[float, float, float, float]  # left, top, right, bottom


def clean(text: str) -> str:
    """Text for HTML and SVG: markup escaped, characters that are not printable spelled out."""
    return escape(escaped(text), quote=True)


def tag(name: str, content: str = "", /, **attributes: str | float) -> str:
    """An element around markup; `class_` is class, other underscores are hyphens."""
    words = [name]
    for key, value in attributes.items():
        word = value if isinstance(value, str) else f"{value:.1f}".removesuffix(".0")
        if word:
            words.append(f'{key.rstrip("_").replace("_", "-")}="{clean(word)}"')
    return f"<{' '.join(words)}>{content}</{name}>" if content else f"<{' '.join(words)}/>"


def title(text: str) -> str:
    """What pointing at the surrounding element shows; lines are kept."""
    return f"<title>{chr(10).join(map(clean, text.split(chr(10))))}</title>"


def text(words: str, x: float, y: float, anchor: str = "", class_: str = "") -> str:
    """A line of text whose base line starts, ends (`end`) or has its `middle` at (x, y)."""
    return tag("text", clean(words), x=x, y=y, text_anchor=anchor, class_=class_)


def svg(parts: Iterable[str], width: float, height: float, label: str) -> str:
    """The picture; `label` says what it is to those who cannot see it."""
    return tag(
        "svg", "".join(parts), xmlns="http://www.w3.org/2000/svg", role="img", aria_label=label,
        viewBox=f"0 0 {width:.0f} {height:.0f}",
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Axis:
    """Maps values from `low` to `high` onto pixels from `begin` to `end`."""

    low: float
    high: float
    begin: float
    end: float
    log: bool = False
    whole: bool = False  # ticks at integers only

    def at(self, value: float) -> float:
        """Pixel of a value, kept within the axis."""
        low, high = self._scaled(self.low), self._scaled(self.high)
        share = (self._scaled(max(value, self.low)) - low) / (high - low)
        return self.begin + min(share, 1.0) * (self.end - self.begin)

    def _scaled(self, value: float) -> float:
        return log10(value) if self.log else value

    def ticks(self) -> list[float]:
        """At most about nine round values between the ends."""
        if not self.log:
            step = max(round_step(self.high - self.low), 1.0 if self.whole else 0.0)
            first, last = ceil(self.low / step - 1e-9), floor(self.high / step + 1e-9)
            return [k * step for k in range(first, last + 1)]
        first, last = floor(log10(self.low) + 1e-9), ceil(log10(self.high) - 1e-9)
        digits = (1, 2, 5) if last - first <= 2 else (1,)
        every = -(-(last - first) // 8) or 1
        decades = range(first, last + 1, every)
        values = [digit * 10.0**decade for decade in decades for digit in digits]
        return [v for v in values if self.low * (1 - 1e-9) <= v <= self.high * (1 + 1e-9)]


def linear_axis(values: Sequence[float], begin: float, end: float, *, zero: bool = True) -> Axis:
    """A little beyond values >= 0: from 0, or with `zero` False from below the smallest."""
    high = min(max((*values, 0.0)) or 1.0, _HUGE)
    low = min(0.0 if zero else min(values), high)
    # Some width also for one value only, or one so small that sums with it round off.
    margin = max(0.06 * (high - low or high), 1 / _HUGE)
    return Axis(max(0.0, low - margin), high + margin, begin, end)


def log_axis(values: Sequence[float], begin: float, end: float) -> Axis:
    """Around positive values, to the next of 1, 2 and 5 on either side, at least half a decade."""
    low, high = max(min(values), 1 / _HUGE) / 1.1, min(max(values), _HUGE) * 1.1
    if high / low < 4:
        middle = (low * high) ** 0.5
        low, high = middle / 2, middle * 2
    low = max(v for v in _rounds(floor(log10(low))) if v <= low * (1 + 1e-9))
    high = min(v for v in _rounds(floor(log10(high))) if v >= high * (1 - 1e-9))
    return Axis(low, high, begin, end, log=True)


def _rounds(decade: int) -> list[float]:
    return [digit * 10.0**decade for digit in (1, 2, 5, 10)]


def round_step(span: float) -> float:
    """1, 2 or 5 times a power of ten that divides `span` into at most eight."""
    scale = 10.0 ** floor(log10(span / 6))
    return scale * min((k for k in (1, 2, 5, 10) if span / (k * scale) <= 8), default=10)


def tick_label(value: float) -> str:
    """0.02, 5, 300, 2·10⁻⁵."""
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        return f"{value:.10g}"
    decade = floor(log10(abs(value)) + 1e-9)
    digit = f"{value / 10.0**decade:.3g}"
    power = f"10{str(decade).translate(_SUPERSCRIPTS)}"
    return power if digit == "1" else f"{digit}·{power}"


def text_width(words: str) -> float:
    """Pixels that a text takes at most, by a rough measure of its characters."""
    wide = sum(unicodedata.east_asian_width(c) in "WF" for c in words)
    return FONT * (0.6 * (len(words) - wide) + 1.05 * wide)


def frame(x: Axis, y: Axis, x_label: str, y_label: str) -> str:
    """Both axes with grid lines, ticks and names."""
    parts = [x_axis(x, y.end, y.begin, x_label)]
    for value in y.ticks():
        at = y.at(value)
        parts.append(tag("path", d=f"M{x.begin:.1f} {at:.1f}H{x.end:.1f}", class_="grid"))
        parts.append(text(tick_label(value), x.begin - 6, at + 4, "end"))
    parts.append(tag("path", d=f"M{x.begin:.1f} {y.end:.1f}V{y.begin:.1f}", class_="axis"))
    parts.append(side_label(y_label, (y.begin + y.end) / 2))
    return "".join(parts)


def x_axis(x: Axis, top: float, bottom: float, label: str) -> str:
    """A horizontal axis at `bottom`, its grid lines reaching up to `top`."""
    parts = []
    for value in x.ticks():
        at = x.at(value)
        parts.append(tag("path", d=f"M{at:.1f} {top:.1f}V{bottom:.1f}", class_="grid"))
        parts.append(text(tick_label(value), at, bottom + 16, "middle"))
    parts.append(tag("path", d=f"M{x.begin:.1f} {bottom:.1f}H{x.end:.1f}", class_="axis"))
    parts.append(text(label, (x.begin + x.end) / 2, bottom + 36, "middle", "name"))
    return "".join(parts)


def side_label(label: str, middle: float) -> str:
    """The name of a vertical axis, turned."""
    turned = f"rotate(-90 13 {middle:.1f})"
    return tag(
        "text", clean(label), x=13.0, y=middle, text_anchor="middle", class_="name",
        transform=turned,
    )  # fmt: skip


def leader(dot: Dot, box: Box) -> str:
    """A thin line from a dot to its label, where that is not right beside it."""
    end = _nearest(dot, box)
    if (end[0] - dot[0]) ** 2 + (end[1] - dot[1]) ** 2 < _NEAR**2:
        return ""
    return tag("path", d=f"M{dot[0]:.1f} {dot[1]:.1f}L{end[0]:.1f} {end[1]:.1f}", class_="leader")


def place_labels(dots: Sequence[Dot], labels: Sequence[str], bounds: Box) -> list[Box | None]:
    """A box for each label near its dot, inside `bounds`, clear of all dots, labels and leaders.

    Greedy in the given order; None where every candidate is taken.
    """
    taken = [(x - _DOT, y - _DOT, x + _DOT, y + _DOT) for x, y in dots]
    leaders: list[tuple[Dot, Dot]] = []
    boxes: list[Box | None] = []
    for k, (dot, label) in enumerate(zip(dots, labels, strict=True)):
        others = [box for box in taken if not _overlap(box, taken[k])]  # dots may overlap
        for box in _candidates(dot, text_width(label)):
            line = (dot, _nearest(dot, box))
            if (
                _inside(box, bounds)
                and not any(_overlap(box, other) for other in taken)
                and not any(_crosses(old, box) for old in leaders)
                and not any(_crosses(line, other) for other in others)
            ):
                taken.append(box)
                leaders.append(line)
                boxes.append(box)
                break
        else:
            boxes.append(None)
    return boxes


def _candidates(dot: Dot, width: float) -> Iterable[Box]:
    for radius in _RADII:
        for angle in _ANGLES:
            across, middle = radius * cos(radians(angle)), dot[1] + radius * sin(radians(angle))
            left = dot[0] + across - (width if across < 0 else 0)
            yield left, middle - LINE / 2, left + width, middle + LINE / 2


def _nearest(dot: Dot, box: Box) -> Dot:
    return min(max(dot[0], box[0]), box[2]), min(max(dot[1], box[1]), box[3])


def _inside(box: Box, bounds: Box) -> bool:
    left, top, right, bottom = bounds
    return box[0] >= left and box[1] >= top and box[2] <= right and box[3] <= bottom


def _overlap(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _crosses(line: tuple[Dot, Dot], box: Box) -> bool:
    (x0, y0), (x1, y1) = line
    steps = [k / 8 for k in range(9)]
    dots = [(x0 + k * (x1 - x0), y0 + k * (y1 - y0)) for k in steps]
    return any(box[0] < x < box[2] and box[1] < y < box[3] for x, y in dots)


def spread(tops: Sequence[float], low: float, high: float, gap: float = LINE - 1) -> list[float]:
    """Heights as near to `tops` as `gap` between neighbours allows, from `low` to about `high`.

    Neighbours that are too close form a group that is centred on its members' wishes.
    """
    order = sorted(range(len(tops)), key=lambda k: tops[k])
    groups: list[tuple[float, int]] = []  # sum of wished first positions, members
    for k in order:
        wish, n = tops[k], 1
        while groups and groups[-1][0] / groups[-1][1] + groups[-1][1] * gap > wish / n:
            before, m = groups.pop()
            wish, n = before + wish - n * m * gap, m + n
        groups.append((wish, n))
    placed = [wish / n + i * gap for wish, n in groups for i in range(n)]
    # What sticks out below is pushed up, then what sticks out above is pushed down.
    for i in reversed(range(len(placed))):
        placed[i] = min(placed[i], high - (len(placed) - 1 - i) * gap)
    for i in range(len(placed)):
        placed[i] = max(placed[i], low + i * gap)
    result = [0.0] * len(tops)
    for k, top in zip(order, placed, strict=True):
        result[k] = top
    return result


def steps(dots: Sequence[Dot]) -> str:
    """Path data of stairs: level to the next dot's x, then down to it."""
    first = "".join(f"M{x:.1f} {y:.1f}" for x, y in dots[:1])
    return first + "".join(f"H{x:.1f}V{y:.1f}" for _, (x, y) in pairwise(dots))


def standalone(picture: str, css: str, ground: str = "") -> str:
    """A picture that carries its own style sheet, with something behind everything else."""
    begin = picture.index(">") + 1
    return f"{picture[:begin]}<style>{css}</style>{ground}{picture[begin:]}"


def png(pixels: npt.NDArray[np.uint8], palette: Sequence[tuple[int, int, int]]) -> bytes:
    """An indexed 8-bit image u8[height, width] (PNG specification, third edition)."""
    height, width = pixels.shape
    scanlines = np.zeros((height, width + 1), np.uint8)  # byte 0: no filter
    scanlines[:, 1:] = pixels

    def chunk(kind: bytes, data: bytes) -> bytes:
        check = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", check)

    return b"\x89PNG\r\n\x1a\n" + b"".join(
        chunk(kind, data)
        for kind, data in (
            (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0)),
            (b"PLTE", b"".join(map(bytes, palette))),
            (b"IDAT", zlib.compress(scanlines.tobytes(), 9)),
            (b"IEND", b""),
        )
    )
