"""Measurements of a repository's models: reports as files, as figures of the card, as a picture."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from quantkit.container.names import parse_shard_file_name, shown
from quantkit.errors import QuantkitError
from quantkit.evaluate.charts import Point, scatter
from quantkit.evaluate.report import Report, load_report
from quantkit.evaluate.style import CSS
from quantkit.evaluate.svg import standalone
from quantkit.pipeline.publishable import MAX_READ, Known, content
from quantkit.publish.card import Figures, Measurement
from quantkit.publish.layout import EVALUATION, Item
from quantkit.publish.remote import Remote
from quantkit.run.events import Reporter, size, unit_of

LAST = "measurements and card"  # the commit that comes last

_MAX_REPORT_BYTES = 16 << 20
# A README is looked at as a picture, whatever the theme of the page around it.
_LIGHT = CSS.replace("@media screen and (prefers-color-scheme: dark)", "@media not all")


def portable(report: Report) -> Report:
    """Without the folders of this machine."""

    def name(path: str) -> str:
        return path.replace("\\", "/").rstrip("/").rsplit("/", 1)[-1]

    base = report.base
    base = base.model_copy(update={"path": name(base.path)}) if base.path else base
    quants = tuple(q.model_copy(update={"path": name(q.path)}) for q in report.quants)
    return report.model_copy(update={"base": base, "quants": quants})


def report_item(report: Report) -> Item:
    """Named by its content, so that no measurement replaces another."""
    raw = json.dumps(report.model_dump(mode="json"), indent=1, allow_nan=False).encode() + b"\n"
    corpus = report.text.corpus if report.text else "questions"
    slug = re.sub(r"[^a-z0-9]+", "-", corpus.rsplit("/", 1)[-1].lower()).strip("-")[:40] or "text"
    path = f"{EVALUATION}/{slug}-{hashlib.sha256(raw).hexdigest()[:8]}.json"
    return content(path, raw, LAST)


def remote_reports(remote: Remote, reporter: Reporter) -> Iterator[Report]:
    """Those that the repository has."""
    paths = [
        path
        for path in sorted(remote.files)
        if path.startswith(f"{EVALUATION}/") and path.endswith(".json")
    ]
    for path in paths[:MAX_READ]:
        file = remote.fetch(path, _MAX_REPORT_BYTES)
        if file is None:
            continue
        try:
            yield load_report(file.read_bytes(), where=shown(path))
        except (QuantkitError, ValueError, RecursionError):
            reporter.warn(f"not in the card: {shown(path)} is no report")


def _stem(path: str) -> str:
    name = path.rsplit("/", 1)[-1]
    named = parse_shard_file_name(name)
    return named[0] if named else name.removesuffix(".gguf")


def measures(report: Report, models: Sequence[Known]) -> bool:
    """Whether a report is of one of these models."""
    return not {one.stem for one in models}.isdisjoint(_stem(q.path) for q in report.quants)


def measurements(reports: Iterable[Report], models: Sequence[Known]) -> list[Measurement]:
    """One for each text and way of measuring, the first report of a quant counting; most first."""
    labels = {one.stem: one.label for one in models}
    merged: dict[tuple[object, ...], Measurement] = {}
    for report in reports:
        text = report.text
        if text is None:
            continue
        figures = {
            labels[stem]: Figures(
                kld=quant.figure("kld_mean"),
                kld_error=quant.figure("kld_mean_error"),
                kld_p99=quant.figure("kld_p99"),
                same_top=quant.figure("same_top_p"),
                same_top_error=quant.figure("same_top_p_error"),
                ppl=quant.figure("ppl"),
                ppl_error=quant.figure("ppl_error"),
            )
            for quant in report.quants
            if (stem := _stem(quant.path)) in labels
        }
        key = (text.corpus, text.digest, text.n_tokens, text.n_ctx, report.engine)
        before = merged.get(key)
        if figures and before:
            merged[key] = replace(before, figures={**figures, **before.figures})
        elif figures:
            ppl, error = report.base.ppl, report.base.ppl_error
            merged[key] = Measurement(
                text.corpus, text.n_tokens, text.n_chunks, text.n_ctx, report.engine,
                None if ppl is None else float(ppl), None if error is None else float(error),
                figures,
            )  # fmt: skip
    return sorted(merged.values(), key=lambda m: -len(m.figures))


def chart(models: Sequence[Known], measured: Sequence[Measurement]) -> str:
    """The picture of mean KLD over size, with its own light background; "" for fewer than two."""
    figures = measured[0].figures if measured else {}
    known = [
        (one, kld)
        for one in models
        if (found := figures.get(one.label)) and (kld := found.kld) and kld > 0
    ]
    if len(known) < 2:
        return ""
    unit, scale = unit_of(known[0][0].n_bytes)
    points = [
        Point(one.n_bytes / scale, kld, one.label, f"{one.label}\n{size(one.n_bytes)}", k)
        for k, (one, kld) in enumerate(known)
    ]
    frontier: list[Point] = []
    for point in points:
        if not frontier or point.y < frontier[-1].y:
            frontier.append(point)
    picture = scatter(points, frontier, f"size of the files, {unit}", "mean KLD, nats per token")
    return standalone(picture, _LIGHT, '<rect width="100%" height="100%" fill="#fff"/>') + "\n"
