"""Publish: what lies in an output folder, checked, laid out, described and sent to the Hub."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Literal

from quantkit.container.names import escaped
from quantkit.errors import QuantkitError, UsageError
from quantkit.pipeline.model_card import card_items
from quantkit.pipeline.publishable import items_of, look
from quantkit.publish.digests import sha256_of
from quantkit.publish.layout import Item, State, Step, check_items, label_of, path_in_repo
from quantkit.publish.layout import refuse_differing as refuse
from quantkit.publish.remote import Remote
from quantkit.run import fs
from quantkit.run.events import Reporter, files, size
from quantkit.types import Plan
from quantkit.write.writer import ShardWriter

Connect = Callable[[str], Remote]


@dataclass(frozen=True, slots=True)
class Publication:
    """What to publish, and how far.

    `reports` are more files of `quantkit evaluate` than lie in the folder; `card` is whether
    README.md and the picture go along, or nothing else. `base` is the base model's name on the Hub.
    """

    folder: Path
    repo: str
    base: str | None = None
    public: bool = False
    force: bool = False
    card: Literal["with", "only", "without"] = "with"
    reports: tuple[Path, ...] = ()
    n_threads: int = 1


@dataclass(frozen=True, slots=True)
class Done:
    """What was done, or would be: the steps in the order of sending."""

    repo: str
    steps: tuple[Step, ...]
    private: bool
    created: bool
    head: str | None

    @property
    def n_to_send(self) -> int:
        """Bytes of files that are not there yet."""
        return sum(s.item.n_bytes for s in self.steps if s.state is not State.SAME)


def publish(
    job: Publication, reporter: Reporter, *, dry_run: bool = False, connect: Connect = Remote
) -> Done:
    """Bring the repository to what the folder holds; what is there already is not sent.

    `UsageError` or `OutputError` before anything is sent where files are damaged or would replace
    others. A dry run neither sends nor refuses: `steps` tell.
    """
    remote = connect(job.repo)
    if not dry_run:
        remote.require_token()
    found = look(job.folder, job.reports, reporter)
    if not found.models and job.card != "only":
        raise UsageError(
            "no converted model lies here, with the record of its conversion",
            where=escaped(str(job.folder)),
            hint="name the folder that `quantkit convert -o` has written to",
        )
    remote.refresh()
    items = [] if job.card == "only" else items_of(found, job.n_threads, reporter)
    check_items(items)
    if not (job.force or dry_run):
        refuse(remote.steps(items), job.repo)
    card = []
    if job.card != "without":
        card = card_items(remote, found, items, job.base, force=job.force, reporter=reporter)
    steps = tuple(remote.steps([*items, *card]))
    created, private = not remote.exists, not job.public
    if remote.private is not None:
        if job.public and remote.private:
            reporter.warn(f"{job.repo} stays private: its settings on the Hub change that")
        private = remote.private
    if not dry_run:
        if created:
            remote.create(private=private)
        _send(job, remote, steps, reporter)
        remote.check([*items, *card])
        reporter.stage("check", f"{files(len(steps))}: the Hub has them as they are here")
    return Done(job.repo, steps, private, created, remote.head)


def _send(job: Publication, remote: Remote, steps: Sequence[Step], reporter: Reporter) -> None:
    """A commit per batch, whose content is sent file by file before."""
    todo = [step for step in steps if step.state is not State.SAME]
    n_bytes = sum(step.item.n_bytes for step in todo)
    if not todo:
        reporter.stage("publish", f"{job.repo} has all {files(len(steps))} already")
        return
    reporter.begin(f"publish {job.repo}", n_bytes, 0)
    try:
        for batch, group in groupby(todo, key=lambda step: step.item.batch):
            items = [step.item for step in group]
            remote.commit(
                items,
                f"Add {batch}",
                force=job.force,
                on_sent=lambda item: reporter.advance(item.n_bytes),
            )
    finally:
        reporter.end()
    reporter.stage("publish", f"{job.repo}: {size(n_bytes)} in {files(len(todo))}")


class Pusher:
    """Sends shards while others are still made; a second thread, one file at a time.

    The content only: no commit names it before the whole model is there and `publish` has looked
    at it. What goes wrong here is told and left to `publish`, which sends what is missing.
    """

    def __init__(self, repo: str, reporter: Reporter, connect: Connect = Remote) -> None:
        self._remote = connect(repo)
        self._remote.require_token()
        self._remote.refresh()
        self._reporter = reporter
        self._queue: queue.SimpleQueue[tuple[Path, str] | None] = queue.SimpleQueue()
        self._problem = ""
        self._thread = threading.Thread(target=self._work, name="publish", daemon=True)

    def __enter__(self) -> Pusher:
        if not self._remote.exists:
            self._remote.create(private=True)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._queue.put(None)
        if error[0] is None:
            self._thread.join()
            if self._problem:
                self._reporter.warn(f"pushing stopped, and goes on now: {self._problem}")

    def writer(self, folder: Path, plan: Plan, *, restart: bool) -> ShardWriter:
        """A writer that hands over each shard when all of it is written."""
        return _PushingWriter(self, folder, plan, restart=restart)

    def push(self, path: Path, where: str) -> None:
        """Send a file whose bytes are final, and its name, or will be."""
        self._queue.put((path, where))

    def _work(self) -> None:
        while (task := self._queue.get()) is not None:
            if not self._problem:
                try:
                    self._send_by_any_name(*task)
                except Exception as error:  # `publish` tries again, where it is told in full
                    known = isinstance(error, QuantkitError)
                    self._problem = str(error).partition("\n")[0] if known else repr(type(error))

    def _send_by_any_name(self, path: Path, where: str) -> None:
        """A shard gets its final name when all are there, which may be while it is sent."""
        partial = fs.partial_of(path)
        try:
            self._send(partial, where)
        except (QuantkitError, OSError, ValueError):
            if partial.exists():
                raise
            self._send(path, where)

    def _send(self, path: Path, where: str) -> None:
        item = Item(where, path, path.stat().st_size, sha256_of(path, keep=False), "")
        if self._remote.state(item) is State.NEW:  # what differs is for `publish` to refuse
            self._remote.send(item)


class _PushingWriter(ShardWriter):
    """Counts the tiles of each shard."""

    def __init__(self, pusher: Pusher, folder: Path, plan: Plan, *, restart: bool) -> None:
        super().__init__(folder, plan, restart=restart)
        self._pusher = pusher
        self._left = [0] * len(plan.shards)
        for number, _ in self.missing():
            self._left[plan.tensors[number].shard] += 1
        for shard, left in enumerate(self._left):
            if not left:
                self._hand_over(shard)

    def record(self, tensor: int, tile: int, digest: bytes) -> None:
        """See `ShardWriter`."""
        super().record(tensor, tile, digest)
        shard = self.plan.tensors[tensor].shard
        with self._changed:
            self._left[shard] -= 1
            is_whole = not self._left[shard]
        if is_whole:
            self.sync()
            self._hand_over(shard)

    def _hand_over(self, shard: int) -> None:
        plan = self.plan
        file = plan.shards[shard].file
        where = path_in_repo(file, label_of(plan.stem, plan.recipe_name), len(plan.shards))
        self._pusher.push(self._folder / file, where)
