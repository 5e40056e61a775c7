"""Answers that `huggingface_hub` reads whole, kept to a size and to a speed.

The client has no limit of its own: a JSON body is read as long as bytes come. Hooks of its HTTP
client see every answer before its body is read. What is streamed, to disk or by us, is not touched.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import TYPE_CHECKING, cast

from quantkit.errors import HubError
from quantkit.run.events import size

if TYPE_CHECKING:
    import httpx2

MAX_ANSWER_BYTES = 8 << 20  # what is said of a repository of 100,000 files
_SLOWEST = 16 << 10  # bytes per second, after a while
_GRACE_S = 30.0
_SILENCE_S = 30.0
_MARK = "quantkit.whole"  # redirections keep a request's extensions
_left: ContextVar[int | None] = ContextVar("answers that may still come", default=None)


@cache
def bound_answers(endpoint: Callable[[], str]) -> None:
    """Have this process's clients bound what they read whole from the Hub's API. Once is enough."""
    import httpx2  # noqa: PLC0415
    from huggingface_hub import set_client_factory  # noqa: PLC0415
    from huggingface_hub.utils._http import default_client_factory  # noqa: PLC0415

    class Counted(httpx2.SyncByteStream):
        def __init__(self, stream: httpx2.SyncByteStream, host: str) -> None:
            self._stream, self._host = stream, host

        def __iter__(self) -> Iterator[bytes]:
            n_bytes, begun = 0, time.monotonic()
            for piece in self._stream:
                n_bytes += len(piece)
                if n_bytes > MAX_ANSWER_BYTES:
                    allowed = size(MAX_ANSWER_BYTES)
                    raise HubError(f"answers with more than {allowed}", where=self._host)
                if time.monotonic() - begun > _GRACE_S + n_bytes / _SLOWEST:
                    raise httpx2.ReadTimeout("an answer that hardly moves")
                yield piece

        def close(self) -> None:
            self._stream.close()

    def mark(request: httpx2.Request) -> None:
        # As it is: what is packed can be a thousand times as much as what is counted.
        request.headers["Accept-Encoding"] = "identity"
        api = f"{endpoint()}/api/"
        if str(request.url).startswith(api) and not str(request.url).startswith(f"{api}resolve"):
            request.extensions = {**request.extensions, _MARK: True}
            if request.method == "GET":  # some of the client's calls would wait for ever
                given = request.extensions.get("timeout", {})
                request.extensions["timeout"] = {
                    kind: given.get(kind) or _SILENCE_S
                    for kind in ("connect", "read", "write", "pool")
                }

    def bound(response: httpx2.Response) -> None:
        if not (response.request.extensions.get(_MARK) or response.status_code >= 300):
            return
        _count(response.url.host)
        if response.headers.get("content-encoding", "identity") != "identity":
            raise HubError("answers in an encoding that was not asked for", where=response.url.host)
        whole = cast("httpx2.SyncByteStream", response.stream)
        response.stream = Counted(whole, response.url.host)

    def client() -> httpx2.Client:
        made = default_client_factory()
        hooks = made.event_hooks
        made.event_hooks = {
            "request": [*hooks["request"], mark],
            "response": [*hooks["response"], bound],
        }
        return made

    set_client_factory(client)


@contextmanager
def at_most(n_answers: int) -> Iterator[None]:
    """Inside, more answers than this are refused: a listing may have pages without end."""
    token = _left.set(n_answers)
    try:
        yield
    finally:
        _left.reset(token)


def _count(host: str) -> None:
    left = _left.get()
    if left is None:
        return
    if left == 0:
        raise HubError("answers with pages without end", where=host)
    _left.set(left - 1)
