"""Shares of a text, done by workers on other machines; see `shared`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from typing import Any

from quantkit.forward.spans import shares
from quantkit.pipeline.shared import SharedJob, Spread
from quantkit.run.cluster import Connected, Crew
from quantkit.run.events import Reporter


def spread_over(cluster: Connected, reporter: Reporter) -> Spread:
    """A share for each worker of a cluster; those of lost workers are taken up by others."""

    def spread(job: SharedJob, n_spans: int) -> Iterator[range]:
        tasks = shares(n_spans, len(cluster.seats))
        plain: Any = job  # a dataclass, as whatever is shared
        crew: Crew[range, None] = Crew(
            cluster, lambda seat: replace(plain, n_threads=seat.n_cpus).opened, reporter.warn
        )
        with closing(crew.results(tasks, _described)) as results:
            for index, _ in results:
                yield tasks[index]

    return spread


def _described(share: range) -> str:
    return f"spans {share.start} to {share.stop - 1} of the text"
