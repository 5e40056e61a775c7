"""What the local Hub does wrong, and when."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import StrEnum


class Fault(StrEnum):
    """One thing that goes wrong with one request."""

    RESET = "reset"  # the connection is reset before an answer
    BUSY = "429"  # Too Many Requests, with Retry-After
    BROKEN = "500"
    UNAVAILABLE = "503"
    SLOW = "slow"  # no answer until the client has given up
    SHORT = "short"  # the body ends in its middle
    STALE_ETAG = "stale etag"  # ETag and X-Linked-Etag of another content
    CHANGED = "changed"  # X-Repo-Commit of another commit
    WRONG_RANGE = "wrong range"  # Content-Range of other bytes than asked for
    NO_RANGE = "no range"  # 200 and the whole file where a range was asked for
    ENDLESS = "endless"  # chunked, and never done
    TOO_MUCH = "too much"  # a longer body than the range, with a Content-Length to match


# Which a client has to bear; the others are for tables of hostile servers.
PASSING = (
    Fault.RESET, Fault.BUSY, Fault.SHORT, Fault.STALE_ETAG, Fault.BROKEN, Fault.UNAVAILABLE,
)  # fmt: skip


@dataclass
class Faults:
    """Which requests go wrong: every `every`-th that matches gets the next of `kinds`, in turn.

    With `for_good`, all after the first as well. `where` is a pattern on the line `METHOD /path`,
    `limit` the most faults to give. Calls for
    `always` fail whatever the count says, `retry_after` is what BUSY asks for in seconds, and
    `patience` how long SLOW waits.
    """

    kinds: tuple[Fault, ...] = ()
    every: int = 0
    for_good: bool = False
    where: str = ""
    limit: int | None = None
    always: Fault | None = None
    retry_after: int = 0
    patience: float = 30.0
    given: list[tuple[Fault, str]] = field(default_factory=list)
    _n_seen: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def set(
        self,
        kinds: Iterable[Fault] = (),
        every: int = 1,
        *,
        for_good: bool = False,
        where: str = "",
        limit: int | None = None,
        always: Fault | None = None,
    ) -> None:
        """Replace what is planned."""
        with self._lock:
            self.kinds, self.every, self.where = tuple(kinds), every, where
            self.limit, self.always, self._n_seen = limit, always, 0
            self.for_good = for_good
            self.given.clear()

    def _is_due(self) -> bool:
        if self.for_good and self._n_seen >= self.every:
            return True
        return self.every > 0 and self._n_seen % self.every == 0

    def take(self, line: str) -> Fault | None:
        """What happens to this request."""
        with self._lock:
            if not re.search(self.where, line):
                return None
            fault = self.always
            self._n_seen += 1
            if fault is None and self.kinds and self._is_due():
                fault = self.kinds[len(self.given) % len(self.kinds)]
            if fault is None or (self.limit is not None and len(self.given) >= self.limit):
                return None
            self.given.append((fault, line))
            return fault
