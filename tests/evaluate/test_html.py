"""The report's page: self-contained, harmless, and showing every figure."""

from __future__ import annotations

import json
import re
import struct
import zlib
from base64 import b64decode
from html import unescape
from html.parser import HTMLParser
from itertools import pairwise
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantkit.errors import UsageError
from quantkit.evaluate.html import report_html
from quantkit.evaluate.labels import figure_name, number
from quantkit.evaluate.report import Coverage
from quantkit.evaluate.svg import png
from tests.evaluate.reports import EVIL, a_quant, a_report

SVG = "{http://www.w3.org/2000/svg}"
VOID = {"meta", "br"}


class Page(HTMLParser):
    """Reads a page strictly: tags nest, and what is where."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def charts(html: str) -> list[ElementTree.Element]:
    found = re.findall(r"<svg.*?</svg>", html, re.S)
    return [ElementTree.fromstring(part) for part in found]  # noqa: S314 - our own output


def marks(chart: ElementTree.Element) -> list[ElementTree.Element]:
    return [g for g in chart.iter(f"{SVG}g") if "mark" in g.get("class", "")]


def sections(html: str) -> list[str]:
    return re.findall(r"<h2>(.*?)</h2>", html)


ALL = [
    "Size and divergence", "How the divergence is distributed", "Layer by layer", "Experts",
    "Types by role", "Every figure", "How it was measured",
]  # fmt: skip


def test_page_has_every_section_and_needs_nothing_else():
    html = report_html(a_report())
    page = Page(html)
    assert sections(html) == ALL
    assert {tag for tag, _ in page.tags}.isdisjoint({"script", "link", "iframe", "object", "base"})
    for _, attributes in page.tags:
        assert not any(name.startswith("on") for name in attributes)
        for name in ("src", "href", "action"):
            assert (attributes.get(name) or "data:").startswith("data:")
    outside = html.replace('xmlns="http://www.w3.org/2000/svg"', "")
    assert "//" not in re.sub(r"data:image/png;base64,[A-Za-z0-9+/=]*", "", outside)
    assert "url(" not in outside
    assert "default-src 'none'" in html


def test_every_figure_of_every_quant_is_on_the_page():
    quants = [a_quant("m-A.gguf", 10**6, 0.01, odd_figure=0.123456), a_quant("m-B.gguf", 10**7)]
    text = Page(report_html(a_report(quants))).text
    for quant in quants:
        for key, value in quant.figures.items():
            if key.endswith("_error"):
                assert f"{number(quant.figure(key[:-6]), 5)} ± {number(value, 2)}" in text
                continue
            assert figure_name(key) in text
            for item in value if isinstance(value, tuple) else (value,):
                assert number(item, 5) in text


def test_method_says_what_was_measured_and_how():
    text = Page(report_html(a_report())).text
    for word in (
        "core: 42 windows of 512 tokens", "ab" * 32, "18.000 ± 0.25", "torch", "kv_cache f16",
        "threads 2", "beta 32", "exact yes", "quantkit 0",
    ):  # fmt: skip
        assert word in text


def test_types_of_a_role_show_count_bits_and_size():
    assert "routed_expert.up Q4_K × 3 4.500 bpw, 144 kB" in Page(report_html(a_report())).text


def test_hostile_strings_are_text_and_nothing_else():
    line = {"role": EVIL, "type": EVIL, "n_tensors": 1, "weights": 1, "bytes": 1}
    plain = a_report()
    report = json.loads(json.dumps(plain))
    report |= {"model": EVIL, "engine": EVIL, "quantkit": EVIL, "constants": {EVIL: EVIL}}
    report["text"] |= {"corpus": EVIL, "digest": EVIL}
    report["base"]["path"] = EVIL
    report["quants"][0] |= {"path": EVIL, "types": [line], EVIL[:-1]: 1.5}
    html = report_html(report)
    html.encode()  # no lone surrogate is left
    names = [tag for tag, _ in Page(html).tags]
    assert set(names) == {tag for tag, _ in Page(report_html(plain)).tags}
    assert "<script" not in html
    assert "alert('" not in html
    assert not {"\u202e", "\x1b"} & set(html)
    assert "&lt;script&gt;alert(&#x27;x&#x27;)&lt;/script&gt;&quot;&amp;\\u202e\\x1b[31m" in html
    assert charts(html)  # each is well-formed


def test_one_quant_of_a_dense_model_has_no_expert_section():
    report = a_report(
        [a_quant(n_layers=2).model_copy(update={"layers": ()})], coverage=None, constants={}
    )
    html = report_html(report)
    assert sections(html) == [name for name in ALL if name not in ("Experts", "Layer by layer")]
    assert "1 quant," in Page(html).text


def test_a_quant_with_nothing_but_a_size_still_makes_a_page():
    bare = {"path": "a.gguf", "bytes": 0, "bpw": None}
    html = report_html(a_report() | {"quants": [bare], "coverage": None})
    assert sections(html) == ["Size and divergence", "How it was measured"]
    assert charts(html) == []


def test_dots_lie_where_the_figures_say_and_carry_their_names():
    quants = [a_quant(f"m-{k}.gguf", 10**6 * (k + 1), 10.0**-k) for k in range(4)]
    chart = charts(report_html(a_report(quants[::-1])))[0]
    dots = [(float(c.get("cx")), float(c.get("cy"))) for c in chart.iter(f"{SVG}circle")]
    assert len(dots) == 4
    across, down = zip(*dots, strict=True)  # drawn from the smallest to the largest
    assert np.diff(across) == pytest.approx(np.diff(across)[0], abs=0.11)
    assert np.diff(down) == pytest.approx(np.diff(down)[0], abs=0.11)
    assert np.diff(across)[0] > 50
    assert np.diff(down)[0] > 50
    for k, mark in enumerate(marks(chart)):
        assert [t.text for t in mark.iter(f"{SVG}text")] == [str(k)]
        assert mark.find(f"{SVG}title").text.startswith(f"{k}\n{k + 1}.0 MB")


@pytest.mark.parametrize("kld", [0.0, -1e-9, None])
def test_a_quant_that_a_log_axis_cannot_show_is_named_below(kld):
    quants = [a_quant("m-same.gguf", 9_000_000, kld_mean=kld), a_quant("m-other.gguf")]
    html = report_html(a_report(quants))
    assert "no mean KLD above zero is known: same." in Page(html).text
    assert len(marks(charts(html)[0])) == 1


def test_stairs_join_only_quants_that_no_smaller_one_beats():
    quants = [a_quant("m-a.gguf", 10, 0.3), a_quant("m-b.gguf", 20, 0.4), a_quant("m-c.gguf", 30)]
    (chart, *_) = charts(report_html(a_report(quants)))
    (stairs,) = (p.get("d") for p in chart.iter(f"{SVG}path") if p.get("class") == "frontier")
    assert stairs.count("M") == stairs.count("H") == 1


def test_forty_quants_fit_on_a_page_of_moderate_size():
    quants = [
        a_quant(f"m-TYPE_{k}.gguf", 10**9 + 10**8 * k, 0.9**k, n_layers=61) for k in range(40)
    ]
    html = report_html(a_report(quants))
    assert len(html) < 500_000
    names = Page(html).text
    assert all(f"TYPE_{k} " in names for k in range(40))
    scatter, _, errors, *_ = charts(html)
    assert len(marks(scatter)) == 40
    assert len([p for p in errors.iter(f"{SVG}path") if p.get("class") == "line"]) == 40


def test_lines_break_where_a_layer_has_no_figure():
    # Layer 0 is dense: it has no router.
    html = report_html(a_report([a_quant(n_layers=5)]))
    router = charts(html)[3]
    (line,) = (p.get("d") for p in router.iter(f"{SVG}path") if p.get("class") == "line")
    assert (line.count("M"), line.count("L")) == (1, 3)
    assert float(re.match(r"M([\d.]+)", line)[1]) > 62


def test_a_single_layer_is_a_dot():
    chart = charts(report_html(a_report([a_quant(n_layers=1)])))[2]
    assert len([c for c in chart.iter(f"{SVG}circle") if c.get("class") == "dot"]) == 1


def test_page_is_the_same_every_time():
    assert report_html(a_report()) == report_html(a_report())


def test_what_is_no_report_is_refused():
    with pytest.raises(UsageError):
        report_html({"version": 1})


# --- the map of experts


def read_png(data: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Indices u8[height, width] and palette u8[n, 3] of an unfiltered indexed PNG."""
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    chunks, at = {}, 8
    while at < len(data):
        (length,) = struct.unpack_from(">I", data, at)
        kind, content = data[at + 4 : at + 8], data[at + 8 : at + 8 + length]
        (check,) = struct.unpack_from(">I", data, at + 8 + length)
        assert check == zlib.crc32(kind + content)
        chunks[kind] = content
        at += 12 + length
    assert list(chunks) == [b"IHDR", b"PLTE", b"IDAT", b"IEND"]
    width, height, *rest = struct.unpack(">IIBBBBB", chunks[b"IHDR"])
    assert rest == [8, 3, 0, 0, 0]
    rows = np.frombuffer(zlib.decompress(chunks[b"IDAT"]), np.uint8).reshape(height, width + 1)
    assert not rows[:, 0].any()
    return rows[:, 1:], np.frombuffer(chunks[b"PLTE"], np.uint8).reshape(-1, 3)


@given(st.integers(1, 9), st.integers(1, 70), st.integers(0, 2**32 - 1))
def test_png_holds_the_pixels(height, width, seed):
    rng = np.random.default_rng(seed)
    palette = [tuple(map(int, colour)) for colour in rng.integers(0, 256, (256, 3))]
    pixels = rng.integers(0, 256, (height, width), np.uint8)
    indices, colours = read_png(png(pixels, palette))
    assert np.array_equal(indices, pixels)
    assert [tuple(colour) for colour in colours.tolist()] == palette


def coverage_chart(coverage: Coverage) -> tuple[ElementTree.Element, np.ndarray, np.ndarray, str]:
    html = report_html(a_report(coverage=coverage))
    (image,) = (i for chart in charts(html) for i in chart.iter(f"{SVG}image"))
    (chart,) = (c for c in charts(html) if list(c.iter(f"{SVG}image")))
    data = b64decode(image.get("href").removeprefix("data:image/png;base64,"))
    return chart, *read_png(data), html


def test_experts_darken_with_the_logarithm_of_their_tokens_and_the_never_routed_stand_out():
    counts = [[0, 1, 10, 100], [1000, 10000, 0, 0]]
    _, pixels, palette, html = coverage_chart(Coverage(layers=[1, 2], counts=counts, n_tokens=9))
    light = palette.astype(int).sum(axis=1)[pixels]
    seen = [light[0, 1], light[0, 2], light[0, 3], light[1, 0], light[1, 1]]
    assert all(b < a for a, b in pairwise(seen))
    assert np.diff([pixels[0, 1], pixels[0, 2], pixels[0, 3], pixels[1, 0]]).tolist() == (
        pytest.approx([63.5] * 3, abs=1)
    )
    never = palette[pixels[0, 0]]
    assert (pixels == pixels[0, 0]).sum() == 3
    assert never[0] > 200 > 2 * never[2]  # orange, while the ramp is blue
    text = Page(html).text
    assert "Of 8 experts 3 were never chosen and 5 by fewer than 32 of 9 tokens" in text
    assert "layer 1: 0 layer 2: 2, 3" in text


def test_a_kimi_sized_map_is_small_and_tells_each_layer():
    counts = np.random.default_rng(0).poisson(300, (60, 384))
    coverage = Coverage(layers=list(range(1, 61)), counts=counts, n_tokens=14_400)
    chart, pixels, _, html = coverage_chart(coverage)
    assert pixels.shape == (60, 384)
    assert len(html) < 120_000
    titles = [t.text for t in chart.iter(f"{SVG}title")]
    row = counts[9]
    assert titles[9] == (
        f"layer 10: {row.min()} to {row.max()} tokens per expert, median {np.median(row):.0f}; "
        "0 never routed"
    )


def test_long_lists_of_never_routed_experts_are_cut():
    coverage = Coverage(layers=[7], counts=[[0] * 50 + [9]], n_tokens=9)
    text = Page(report_html(a_report(coverage=coverage))).text
    assert "layer 7: 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11 and 38 more" in text


def test_titles_and_attributes_are_unescaped_to_the_name():
    html = report_html(a_report([a_quant("m-<&>.gguf")]))
    titles = [unescape(t) for t in re.findall(r'title="([^"]*)"', html)]
    assert titles and set(titles) == {"m-<&>"}
