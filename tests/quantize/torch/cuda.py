"""A stand-in for torch.cuda on the CPU: copies back land when their event is waited for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


class Stream:
    """What was put into it and has not been done yet."""

    made = 0

    def __init__(self, device: torch.device) -> None:
        type(self).made += 1
        self.queued: list[Callable[[], object]] = []
        self.waited_for: list[Event] = []

    def record_event(self) -> Event:
        return Event()

    def wait_event(self, event: Event) -> None:
        self.waited_for.append(event)


class Event:
    def __init__(self, blocking: bool = False) -> None:
        self.after: list[Callable[[], object]] = []

    def record(self, stream: Stream) -> None:
        self.after, stream.queued = stream.queued, []

    def synchronize(self) -> None:
        for call in self.after:
            call()
        self.after = []


class Sent(torch.Tensor):
    """On the device, for a stream that may be another than the user's."""

    user: Stream | None = None

    def record_stream(self, stream: Stream) -> None:
        self.user = stream


class Pinned(torch.Tensor):
    """Host memory into which copies go some time later."""

    def to(self, device: torch.device, *, non_blocking: bool) -> torch.Tensor:
        assert non_blocking
        assert CURRENT[-1]
        return self.as_subclass(torch.Tensor).clone().as_subclass(Sent)

    def copy_(self, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
        assert non_blocking
        into, kept = self.as_subclass(torch.Tensor), source.clone()
        CURRENT[-1].queued.append(lambda: into.copy_(kept))
        return self


CURRENT: list[Stream] = []


@contextmanager
def _stream(stream: Stream) -> Iterator[None]:
    CURRENT.append(stream)
    try:
        yield
    finally:
        CURRENT.pop()


class _Torch:
    """torch, but for what needs a GPU."""

    def __init__(self) -> None:
        self.default = Stream(torch.device("cpu"))
        self.cuda = SimpleNamespace(
            Stream=Stream, Event=Event, stream=_stream, current_stream=lambda device: self.default
        )

    def __getattr__(self, name: str) -> object:
        return getattr(torch, name)

    def empty(self, *shape: int, pin_memory: bool = False, **kwargs) -> torch.Tensor:
        x = torch.full(shape, 77, **({"dtype": torch.float32} | kwargs))
        return x.as_subclass(Pinned) if pin_memory else x


stand_in = _Torch()
