"""The report as one page: no network, no script, every string from a file escaped."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np

from quantkit.evaluate.charts import (
    N_COLOURS,
    Line,
    Point,
    Row,
    cut_middle,
    distributions,
    heat_map,
    lines,
    scatter,
)
from quantkit.evaluate.labels import binary_size, figure_name, number, short_names
from quantkit.evaluate.report import Base, Coverage, Quant, Report, Text, parse_report
from quantkit.evaluate.style import CSS
from quantkit.evaluate.svg import clean, tick_label
from quantkit.run.events import size

_MEANINGS = (
    ("KLD", "Kullback-Leibler divergence of the next-token distribution from the base's, in nats "
     "per token. 0 means the same distribution."),
    ("PPL", "perplexity, e to the mean negative log-likelihood. A quant may have a lower one than "
     "its base by chance; the divergence cannot flatter like that."),
    ("same top token", "share of positions where quant and base rate the same token highest."),
    ("Δp", "change of the probability given to the token that really follows."),
    ("bpw", "bits per weight, over the tensor data of the files."),
)  # fmt: skip
_PER_TABLE = 6  # quants side by side, where they are columns
_LISTED = 12
_FEW_TOKENS = 32
_NEVER = (213, 94, 0)
_RAMP = ((222, 235, 247), (107, 174, 214), (8, 48, 107))
_DECIMAL = (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3), ("bytes", 1.0))


@dataclass(frozen=True, slots=True)
class _Entry:
    """A quant, the short name it goes by, and its colour: its rank by size."""

    name: str
    quant: Quant
    colour: int


def report_html(report: Mapping[str, Any]) -> str:
    """The page of a report as `report_json` makes it; `UsageError` for anything else."""
    checked = parse_report(report)
    names = short_names([quant.path for quant in checked.quants])
    by_size = sorted(zip(names, checked.quants, strict=True), key=lambda pair: pair[1].bytes)
    entries = [_Entry(name, quant, k) for k, (name, quant) in enumerate(by_size)]
    sections = [
        _section("Size and divergence", _size_and_kld(entries) + _main_table(entries)),
        _section("Questions", _tasks(entries)),
        _section("How the divergence is distributed", _distributions(entries)),
        _section("Layer by layer", _layers(entries)),
        _section("Experts", _coverage(checked.coverage)),
        _section("Types by role", _types(entries)),
        _section("Every figure", _all_figures(entries)),
        _section("How it was measured", _method(checked)),
    ]
    model = clean(checked.model)
    many = f"{len(entries)} quants" if len(entries) > 1 else "1 quant"
    text = checked.text
    lead = f"{many}, {text.n_tokens:,} tokens of {clean(text.corpus)}" if text else many
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; style-src 'unsafe-inline'; img-src data:\">"
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta name="color-scheme" content="light dark"><title>{model}</title>'
        f"<style>{CSS}</style></head>\n<body><header><h1>{model}</h1><p>{lead}</p></header>\n"
        + "\n".join(filter(None, sections))
        + f"\n<footer>quantkit {clean(checked.quantkit)}</footer></body></html>\n"
    )


def _plus_minus(quant: Quant, key: str, digits: int = 4) -> str:
    error = quant.figure(f"{key}_error")
    shown = number(quant.figure(key), digits)
    return shown if error is None else f"{shown} <small>± {number(float(error), 2)}</small>"


def _section(title: str, content: str) -> str:
    return f"<section><h2>{title}</h2>{content}</section>" if content else ""


def _figure(picture: str, caption: str) -> str:
    return f'<figure><div class="wide">{picture}</div><figcaption>{caption}</figcaption></figure>'


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of markup; the first column names the rows."""
    top = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    body = "".join(
        f'<tr><th scope="row">{row[0]}</th>{"".join(f"<td>{cell}</td>" for cell in row[1:])}</tr>'
        for row in rows
    )
    table = f"<table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"
    return f'<div class="wide">{table}</div>'


def _named(entry: _Entry) -> str:
    name = f'<span title="{clean(entry.name)}">{clean(cut_middle(entry.name))}</span>'
    return f'<span class="swatch c{entry.colour % N_COLOURS}"></span>{name}'


def _hover(entry: _Entry) -> str:
    quant = entry.quant
    return (
        f"{entry.name}\n{size(quant.bytes)} ({binary_size(quant.bytes)}), "
        f"{number(quant.bpw)} bpw\nmean KLD {number(quant.figure('kld_mean'))}, "
        f"median {number(quant.figure('kld_median'))}, 99 % {number(quant.figure('kld_p99'))}\n"
        f"PPL {number(quant.figure('ppl'), 5)}, same top {number(quant.figure('same_top_p'))} %"
    )


def _size_and_kld(entries: Sequence[_Entry]) -> str:
    diverging = [(e, kld) for e in entries if (kld := e.quant.figure("kld_mean") or 0.0) > 0]
    if not diverging:
        return ""
    smallest = diverging[0][0].quant.bytes
    unit, scale = next(u for u in _DECIMAL if smallest >= u[1] or u[1] == 1)
    points = [
        Point(entry.quant.bytes / scale, kld, entry.name, _hover(entry), entry.colour)
        for entry, kld in diverging
    ]
    frontier: list[Point] = []
    for point in points:
        if not frontier or point.y < frontier[-1].y:
            frontier.append(point)
    caption = "Lower is closer to the base. The stairs join the quants that no smaller one beats."
    drawn = {point.colour for point in points}
    if absent := [clean(entry.name) for entry in entries if entry.colour not in drawn]:
        caption += f" Not drawn, as no mean KLD above zero is known: {', '.join(absent)}."
    picture = scatter(points, frontier, f"size of the files, {unit}", "mean KLD, nats per token")
    return _figure(picture, caption)


def _main_table(entries: Sequence[_Entry]) -> str:
    head = ("quant", "size", "bpw", "PPL", "mean KLD", "median KLD", "99 % KLD", "largest KLD",
            "same top, %", "RMS Δp, %")  # fmt: skip
    rows = []
    for entry in entries:
        quant = entry.quant
        sizes = f"{size(quant.bytes)} <small>{binary_size(quant.bytes)}</small>"
        plain = [number(quant.figure(key)) for key in ("kld_median", "kld_p99", "kld_max")]
        doubted = [_plus_minus(quant, key) for key in ("same_top_p", "rms_dp")]
        main = [_plus_minus(quant, "ppl", 5), _plus_minus(quant, "kld_mean")]
        rows.append([_named(entry), sizes, number(quant.bpw), *main, *plain, *doubted])
    return _table(head, rows)


def _tasks(entries: Sequence[_Entry]) -> str:
    head = ("quant", "task", "questions", "accuracy, %", "of the base, %", "difference, %",
            "right to wrong", "wrong to right", "wrong to another")  # fmt: skip
    rows = []
    for entry in entries:
        for task in entry.quant.tasks:
            shares = [
                _share(task.accuracy, task.accuracy_error),
                _share(task.accuracy_reference, task.accuracy_reference_error),
                _share(task.difference, task.difference_error),
            ]
            flips = (task.correct_to_wrong, task.wrong_to_correct, task.wrong_to_other_wrong)
            counts = [f"{count:,}" for count in flips]
            rows.append([_named(entry), clean(task.task), f"{task.n:,}", *shares, *counts])
    if not rows:
        return ""
    return _table(head, rows) + "<p>The last columns count answers that the quant changed.</p>"


def _share(value: float | None, error: float | None) -> str:
    """A share and its standard error in percent."""
    if value is None:
        return "–"
    return f"{100 * value:.2f}" + (f" <small>± {100 * error:.2f}</small>" if error else "")


def _distributions(entries: Sequence[_Entry]) -> str:
    edges: Sequence[float] = ()
    rows = []
    for entry in entries:
        histogram = entry.quant.kld_histogram
        if histogram is None or not any(histogram.counts):
            continue
        edges, total = histogram.log10_edges, sum(histogram.counts)
        keys = (("kld_median", "median"), ("kld_mean", "mean"), ("kld_p99", "tail"))
        marks = [(v, kind) for key, kind in keys if (v := entry.quant.figure(key)) is not None]
        shares = [count / total for count in histogram.counts]
        rows.append(Row(entry.name, _hover(entry), shares, marks, entry.colour))
    if not rows:
        return ""
    caption = (
        "Tokens by their KLD, each quant as high as its row. Bar: median, dot: mean, ring: 99 %."
        f" The first bin also holds what is below {tick_label(10.0 ** edges[0])}."
    )
    return _figure(distributions(rows, edges, "KLD of a token, nats"), caption)


def _layers(entries: Sequence[_Entry]) -> str:
    known = [entry for entry in entries if entry.quant.layers]
    errors, routers = [], []
    for entry in known:
        layers = sorted(entry.quant.layers, key=lambda layer: layer.layer)
        numbers = [layer.layer for layer in layers]
        moved = [layer.hidden_error for layer in layers]
        rerouted = [
            None if (share := layer.router_disagreement) is None else 100 * share
            for layer in layers
        ]
        errors.append(Line(entry.name, numbers, moved, entry.colour))
        if any(share is not None for share in rerouted):
            routers.append(Line(entry.name, numbers, rerouted, entry.colour))
    out = ""
    if errors:
        out += _figure(
            lines(errors, "layer", "relative error", log=True),
            "Error of the hidden state after each layer, relative to the base's.",
        )
    if routers:
        out += _figure(
            lines(routers, "layer", "choices that differ, %", log=False),
            "Routing: share of (token, slot) choices of experts that differ from the base's.",
        )
    return out


def _coverage(coverage: Coverage | None) -> str:
    if coverage is None or not coverage.counts or not coverage.counts[0]:
        return ""
    counts = np.array(coverage.counts, np.int64)
    top = max(2, int(counts.max()))
    shade = np.log(np.maximum(counts, 1)) / np.log(top)
    pixels = np.where(counts > 0, 1 + np.round(254 * shade), 0).astype(np.uint8)
    palette = [_NEVER, *(_ramp(k / 254) for k in range(255))]
    rows = [
        (str(layer), f"layer {layer}: {_spread(row)}")
        for layer, row in zip(coverage.layers, coverage.counts, strict=True)
    ]
    stops = ", ".join(f"rgb{_ramp(k / 8)}" for k in range(9))
    n_never, n_few = int((counts == 0).sum()), int((counts < _FEW_TOKENS).sum())
    legend = (
        f'<span class="swatch" style="background:rgb{_NEVER}"></span>never routed &ensp; 1 token '
        f'<span class="ramp" style="background:linear-gradient(to right, {stops})"></span> '
        f"{top:,} tokens (logarithmic). Of {counts.size:,} experts {n_never:,} were never chosen "
        f"and {n_few:,} by fewer than {_FEW_TOKENS} of {coverage.n_tokens:,} tokens."
    )
    picture = heat_map(pixels, palette, rows, "expert", "layer")
    return _figure(picture, legend) + _never_list(coverage)


def _spread(row: Sequence[int]) -> str:
    n_never = sum(count == 0 for count in row)
    return (
        f"{min(row):,} to {max(row):,} tokens per expert, median {median(row):,.0f}; "
        f"{n_never} never routed"
    )


def _ramp(share: float) -> tuple[int, int, int]:
    k = min(int(share * 2), 1)
    weight = 2 * share - k
    r, g, b = (round(a + weight * (b - a)) for a, b in zip(_RAMP[k], _RAMP[k + 1], strict=True))
    return r, g, b


def _never_list(coverage: Coverage) -> str:
    items = []
    for layer, row in zip(coverage.layers, coverage.counts, strict=True):
        if never := [str(expert) for expert, count in enumerate(row) if count == 0]:
            items.append(f"<li>layer {layer}: {_some(never)}</li>")
    return f'<p>Never routed:</p><ul class="columns">{"".join(items)}</ul>' if items else ""


def _some(items: Sequence[str]) -> str:
    rest = len(items) - _LISTED
    return ", ".join(items[:_LISTED]) + (f" and {rest} more" if rest > 0 else "")


def _groups(entries: Sequence[_Entry]) -> Iterator[Sequence[_Entry]]:
    for first in range(0, len(entries), _PER_TABLE):
        yield entries[first : first + _PER_TABLE]


def _types(entries: Sequence[_Entry]) -> str:
    known = [entry for entry in entries if entry.quant.types]
    roles = list(dict.fromkeys(line.role for entry in known for line in entry.quant.types))
    return "".join(
        _table(
            ["role", *map(_named, group)],
            [[clean(role), *(_types_of(entry.quant, role) for entry in group)] for role in roles],
        )
        for group in _groups(known)
    )


def _types_of(quant: Quant, role: str) -> str:
    found = [line for line in quant.types if line.role == role]
    if not found:
        return "–"
    n_bytes, n_weights = sum(line.bytes for line in found), sum(line.weights for line in found)
    kinds = "<br>".join(f"{clean(line.type)} × {line.n_tensors:,}" for line in found)
    bits = f"{number(8 * n_bytes / n_weights)} bpw, " if n_weights else ""
    return f"{kinds}<br><small>{bits}{size(n_bytes)}</small>"


def _all_figures(entries: Sequence[_Entry]) -> str:
    keys = list(dict.fromkeys(key for entry in entries for key in entry.quant.figures))
    beside = {f"{key}_error" for key in keys}  # shown with its figure
    keys = [key for key in keys if key not in beside]
    return "".join(
        _table(
            ["figure", *map(_named, group)],
            [[_key(key), *(_value(entry.quant, key) for entry in group)] for key in keys],
        )
        for group in _groups(entries)
        if keys
    )


def _key(key: str) -> str:
    name = figure_name(key)
    return clean(key) if name == key else f"{clean(name)}<br><small>{clean(key)}</small>"


def _value(quant: Quant, key: str) -> str:
    value = quant.figures.get(key)
    if isinstance(value, tuple):
        return "<br>".join(number(item, 5) for item in value)
    return _plus_minus(quant, key, 5)


def _method(report: Report) -> str:
    facts = [
        *(_read_text(report.text, report.base) if report.text else ()),
        ("base", clean(short_names([report.base.path])[0]) if report.base.path else "–"),
        *_asked(report),
        ("engine", clean(report.engine)),
        *((clean(key), clean(_constant(value))) for key, value in report.constants.items()),
    ]  # fmt: skip
    rows = "".join(f"<dt>{what}</dt><dd>{value}</dd>" for what, value in (*facts, *_MEANINGS))
    return f"<dl>{rows}</dl>"


def _read_text(text: Text, base: Base) -> list[tuple[str, str]]:
    doubt = "" if base.ppl_error is None else f" ± {number(float(base.ppl_error), 2)}"
    return [
        ("text", f"{clean(text.corpus)}: {text.n_chunks:,} windows of {text.n_ctx:,} tokens"),
        ("digest of the tokens", f"<code>{clean(text.digest)}</code>"),
        ("PPL of the base", number(base.ppl, 5) + doubt),
    ]


def _asked(report: Report) -> list[tuple[str, str]]:
    """All quants were asked the same."""
    return [
        (
            f"task {clean(task.task)}",
            f"{task.n:,} questions, {task.shots} solved examples before each; "
            f"digest of the tokens <code>{clean(task.digest)}</code>",
        )
        for task in report.quants[0].tasks
    ]


def _constant(value: str | bool | float | None) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "–"}[value]
    return value if isinstance(value, str) else f"{value:.10g}"
