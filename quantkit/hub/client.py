"""Calls to the Hub: what a failure means, which are tried again, and for how long.

Messages are our own. Those of the client and the server are not shown: they may hold signed URLs,
and a server that wants to can echo a token into them.
"""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from quantkit.errors import HubError, QuantkitError, UsageError
from quantkit.hub.bounded import bound_answers

if TYPE_CHECKING:
    from huggingface_hub import HfApi

T = TypeVar("T")

# Set when the process has been told to end: threads that wait for the network would hold it up.
interrupted = threading.Event()
_LOOK_S = 0.2

_PASSING_STATUS = frozenset((408, 425, 429, 500, 502, 503, 504, 520, 521, 522, 523, 524))
_LONGEST_WAIT_S = 600.0
NO_REVISION = "has no such revision"
_AGAIN = "run the same command again to continue once the connection is back"


def endpoint() -> str:
    """The Hub's address: HF_ENDPOINT, or huggingface.co."""
    return (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")


def api() -> HfApi:
    """The client, with the token of HF_TOKEN or `hf auth login`."""
    from huggingface_hub import HfApi  # noqa: PLC0415 - a second that other commands need not wait

    bound_answers(endpoint)
    return HfApi(endpoint=endpoint(), library_name="quantkit")


class Passing(Exception):  # noqa: N818 - not an error yet
    """A failure that may be over with the next try. `wait` is what the server asks for, seconds."""

    def __init__(self, reason: str, wait: float | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.wait = wait


class Stopped(Exception):  # noqa: N818
    """The run is being closed; nobody waits for the result any more."""


@dataclass(frozen=True)
class Patience:
    """How often a call is tried; `pause` seconds after the first failure, doubled up to `longest`.

    The defaults give up after five minutes of failures in a row, plus what the server asks for.
    """

    tries: int = 10
    pause: float = 0.5
    longest: float = 60.0

    def after(self, n_failed: int) -> float:
        """Seconds to wait after so many failures."""
        return min(self.longest, self.pause * 2.0 ** (n_failed - 1))


class Caller:
    """Makes calls until they work, or until patience or the run ends. Safe from any thread."""

    def __init__(self, repo: str, patience: Patience | None = None) -> None:
        self.repo = repo
        self.n_retries = 0
        self.stop = threading.Event()
        self._patience = patience or Patience()

    def stopped(self) -> bool:
        """Whether nobody waits for results any more."""
        return self.stop.is_set() or interrupted.is_set()

    def call(self, work: Callable[[], T], what: str) -> T:
        """`work()`, tried again after every `Passing`; raises `HubError` when patience ends.

        `what` says what is being done, for the message.
        """
        return self.resume(lambda: (work(), False), what)

    def resume(self, work: Callable[[], tuple[T, bool]], what: str) -> T:
        """As `call`, for work that goes on where it broke off.

        `work` gives its result and whether to be called again at once, because it moved on: that
        starts the count of failures anew. A `Passing` that it raises counts.
        """
        n_failed = 0
        while True:
            if self.stopped():
                raise Stopped
            try:
                result, goes_on = self._attempt(work)
            except Passing as failure:
                n_failed += 1
                self.n_retries += 1
                if n_failed >= self._patience.tries:
                    raise HubError(
                        f"{what} failed {n_failed} times in a row: {failure.reason}",
                        where=self.repo,
                        hint=_AGAIN,
                    ) from None
                self._pause(failure, n_failed, what)
            else:
                if not goes_on:
                    return result
                n_failed = 0
                self.n_retries += 1

    def _attempt(self, work: Callable[[], T]) -> T:
        try:
            return work()
        except (Passing, Stopped, QuantkitError):
            raise
        except Exception as error:
            verdict = judged(error, self.repo)
            if verdict is None:
                raise
            raise verdict from None

    def _pause(self, failure: Passing, n_failed: int, what: str) -> None:
        wait = self._patience.after(n_failed)
        if failure.wait is not None:
            if failure.wait > _LONGEST_WAIT_S:
                raise HubError(
                    f"{what}: the server asks to wait {failure.wait:,.0f} seconds",
                    where=self.repo,
                    hint="run the same command again after that time; it continues",
                )
            wait = max(failure.wait, min(wait, 1.0))
        end = time.monotonic() + wait
        while not self.stopped() and (left := end - time.monotonic()) > 0:
            self.stop.wait(min(left, _LOOK_S))


def judged(error: Exception, repo: str) -> Exception | None:
    """A `Passing` or a final error for what the client raised; None for what is a bug."""
    import httpx2  # noqa: PLC0415
    from huggingface_hub import errors  # noqa: PLC0415

    if isinstance(error, errors.HfHubHTTPError):
        return _of_status(error, repo)
    kinds: tuple[tuple[type | tuple[type, ...], Exception], ...] = (
        (errors.OfflineModeIsEnabled, _final(repo, "the Hub is switched off by HF_HUB_OFFLINE",
            "unset it, or give the folder of a download")),
        (errors.HFValidationError, UsageError("is no name that the Hub allows", where=repo)),
        (errors.OIDCError, _final(repo, "the token of HF_OIDC_RESOURCE cannot be had", "")),
        (httpx2.TimeoutException, Passing("no answer in time")),
        (httpx2.ConnectError, Passing("no connection")),
        (httpx2.TransportError, Passing("the connection broke off")),
        # A body that is cut short is no JSON, and one from elsewhere has other members.
        ((httpx2.HTTPError, httpx2.InvalidURL, ValueError, KeyError, TypeError),
            Passing("an answer that makes no sense")),
    )  # fmt: skip
    return next((verdict for kind, verdict in kinds if isinstance(error, kind)), None)


def _of_status(error: Exception, repo: str) -> Exception:
    from huggingface_hub import errors  # noqa: PLC0415

    response = getattr(error, "response", None)
    status = int(getattr(response, "status_code", 0))
    if status in _PASSING_STATUS:
        return Passing(f"HTTP {status}", retry_after(response.headers if response else {}))
    page = f"{endpoint()}/{repo}"
    kinds: tuple[tuple[type, str, str], ...] = (
        (errors.GatedRepoError, "is gated: its files are for accounts that were granted access",
            f"accept the conditions at {page}, then `hf auth login` or set HF_TOKEN to a token of "
            "that account that may read gated repositories"),
        (errors.RevisionNotFoundError, NO_REVISION, f"see {page}/commits"),
        (errors.RemoteEntryNotFoundError, "has no such file", f"see {page}/tree/main"),
        (errors.DisabledRepoError, "is disabled by the Hub", f"see {page}"),
        (errors.RepositoryNotFoundError,
            "is neither a folder here nor a repository that the Hub shows you",
            "check the name; a private repository wants `hf auth login` or HF_TOKEN"),
    )  # fmt: skip
    for kind, message, hint in kinds:
        if isinstance(error, kind):
            return _final(repo, message, hint)
    if status == 401:
        hint = "make a new one and `hf auth login`, or unset HF_TOKEN for public models"
        return _final(repo, "the Hub does not know the token", hint)
    return _final(repo, f"the Hub answers with HTTP {status}", f"see {page}")


def _final(repo: str, message: str, hint: str) -> HubError:
    return HubError(message, where=repo, hint=hint)


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds that a server asks to wait, by Retry-After or the RateLimit header; None for none."""
    for name, pattern in (
        ("retry-after", r"\s*(\d{1,9})\s*"),
        ("ratelimit", r".*;\s*t=(\d{1,9}).*"),
    ):
        if found := re.fullmatch(pattern, headers.get(name, "")):
            return float(found[1])
    return None
