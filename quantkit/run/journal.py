"""The record of finished tiles that lets a killed run go on.

A text file: one line that identifies the job, then one line per event.

    {"journal": 1, "plan": "<digest>"}
    boot <id>               a run begins, on this boot of the machine
    tile <tensor> <n> <sha256>
    flush                   everything above is being flushed
    sync                    that is done: what stands above the last `flush` is durable
    doubt                   a flush failed: what is not durable may be lost, and counts no more
    lost <tensor>           its file was cut or removed: nothing above counts of it
    seal                    all tiles are durable, the files are getting their final names

A tile's line is written after its bytes. If only the process died, the kernel still has both, so
every line counts. If the machine went down, only what is durable is trusted: in which order the
rest reached the disk is unknown. The boot id tells the two apart. Tiles are written while others
are flushed, so what comes between `flush` and `sync` waits for the next. A `sync` that no `flush`
precedes, as earlier versions wrote it, is for everything above. What is no line of these kinds was
torn by such a death and is passed over.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import threading
from binascii import unhexlify
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from quantkit.errors import OutputError
from quantkit.run import fs

_TILE = re.compile(rb"tile (\d{1,9}) (\d{1,9}) ([0-9a-f]{64})")
_LOST = re.compile(rb"lost (\d{1,9})")
_MAX_LINE = 1 << 12  # what is longer was torn
_DIGEST_BYTES = 32

# What a tile's flag says of it, while a journal is read; in a run everything but 0 is done.
_FRESH, _FLUSHED, _DURABLE = 1, 2, 3


class Done(Mapping[tuple[int, int], bytes]):
    """Finished tiles: (tensor, tile) -> sha256 of its bytes, in 33 bytes for each.

    `n_tiles` says how many each tensor has; others are no keys and cannot be added.
    """

    def __init__(self, n_tiles: Sequence[int]) -> None:
        self._flags = [bytearray(n) for n in n_tiles]
        self._digests: dict[int, bytearray] = {}  # of tensors that have any
        self._unsure: set[int] = set()  # tensors of which not all is durable
        self._marked = False

    def __getitem__(self, key: tuple[int, int]) -> bytes:
        if key not in self:
            raise KeyError(key)
        tensor, tile = key
        return bytes(self._digests[tensor][_DIGEST_BYTES * tile : _DIGEST_BYTES * (tile + 1)])

    def __contains__(self, key: object) -> bool:
        if not isinstance(key, tuple):
            return False
        tensor, tile = key
        return self._has(tensor, tile) and self._flags[tensor][tile] != 0

    def __iter__(self) -> Iterator[tuple[int, int]]:
        for tensor in self._digests:
            yield from ((tensor, tile) for tile, flag in enumerate(self._flags[tensor]) if flag)

    def __len__(self) -> int:
        return sum(self.count(tensor) for tensor in self._digests)

    def count(self, tensor: int) -> int:
        """How many of a tensor's tiles are done."""
        return len(self._flags[tensor]) - self._flags[tensor].count(0)

    def add(self, tensor: int, tile: int, digest: bytes) -> None:
        """A tile is done. `IndexError` for one that the plan does not have."""
        if not self._has(tensor, tile):
            raise IndexError(f"tile {tile} of tensor {tensor}")
        if len(digest) != _DIGEST_BYTES:
            raise ValueError(f"a sha256 of {len(digest)} bytes")
        flags, digests = self._flags[tensor], self._digests.get(tensor)
        if digests is None:
            digests = self._digests[tensor] = bytearray(_DIGEST_BYTES * len(flags))
        digests[_DIGEST_BYTES * tile : _DIGEST_BYTES * (tile + 1)] = digest
        flags[tile] = _FRESH
        self._unsure.add(tensor)

    def drop(self, tensor: int) -> None:
        """Nothing of a tensor is done."""
        if self._digests.pop(tensor, None) is not None:
            self._flags[tensor] = bytearray(len(self._flags[tensor]))

    def mark(self) -> None:
        """What is done so far is being flushed."""
        self._marked = True
        self._change({_FRESH: _FLUSHED})

    def settle(self) -> None:
        """What the last mark said is durable; without a mark since the last time, everything."""
        self._change({_FLUSHED: _DURABLE} if self._marked else {_FRESH: _DURABLE})
        self._marked = False
        self._unsure = {tensor for tensor in self._unsure if _FRESH in self._flags[tensor]}

    def drop_unsure(self) -> None:
        """Only what is durable is done."""
        self._change({_FRESH: 0, _FLUSHED: 0})
        self._unsure, self._marked = set(), False

    def _has(self, tensor: int, tile: int) -> bool:
        return 0 <= tensor < len(self._flags) and 0 <= tile < len(self._flags[tensor])

    def _change(self, flags: dict[int, int]) -> None:
        table = bytes(flags.get(flag, flag) for flag in range(256))
        for tensor in self._unsure:
            self._flags[tensor] = self._flags[tensor].translate(table)


class Journal:
    """An open journal: exclusive to this process, appended to by any thread.

    `n_tiles` of the plan's tensors; `done` holds the tiles that this run and those before it have
    finished; `sealed` says that an earlier one had all.
    """

    def __init__(
        self, path: Path, plan_digest: str, n_tiles: Sequence[int], *, restart: bool = False
    ) -> None:
        self.path = path
        self.done = Done(n_tiles)
        self.sealed = False
        with fs.writing(path):
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        self._lock = threading.Lock()
        try:
            self._claim()
            self._load(json.dumps({"journal": 1, "plan": plan_digest}), restart)
            self._append(f"boot {_boot_id()}\n")
        except BaseException:
            os.close(self._fd)
            raise

    def record(self, tensor: int, tile: int, digest: bytes) -> None:
        """Note that a tile's bytes are written."""
        with self._lock:
            self._append(f"tile {tensor} {tile} {digest.hex()}\n")
            self.done.add(tensor, tile, digest)

    def mark(self) -> None:
        """Note that the caller now flushes the data of everything recorded so far."""
        with self._lock:
            self._append("flush\n")

    def sync(self) -> None:
        """Note that it has done so: what was recorded before the last `mark` is durable."""
        self._append_durably("sync\n")

    def seal(self) -> None:
        """Note that all tiles are durable and get their final names."""
        self._append_durably("seal\n")

    def doubt(self) -> None:
        """Note that a flush failed. The kernel may have dropped what it could not write."""
        with self._lock, suppress(OutputError):
            self._append("doubt\n")

    def forget(self, tensors: Collection[int]) -> None:
        """Drop all tiles of some tensors, for later runs as well, durably."""
        for tensor in tensors:
            self.done.drop(tensor)
        if tensors:
            self._append_durably("".join(f"lost {tensor}\n" for tensor in sorted(tensors)))

    def close(self) -> None:
        """Release the journal; it stays for the next run."""
        os.close(self._fd)

    def _claim(self) -> None:
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The run that had it may have removed it as the lock went over to us.
            if not os.path.samestat(os.fstat(self._fd), self.path.stat()):
                raise BlockingIOError
        except OSError:
            raise OutputError(
                "another run is writing these files",
                where=str(self.path.parent),
                hint="wait for it, or choose another folder with -o",
            ) from None

    def _load(self, header: str, restart: bool) -> None:
        lines, end = _lines(self._fd), 0
        first = None if restart else next(lines, None)
        if first is not None:
            if first != header.encode():
                raise OutputError(
                    "an unfinished run with another source, recipe or layout is in this folder",
                    where=str(self.path),
                    hint="finish it with its own settings, or pass --restart to discard it",
                )
            self._replay(lines)
            end = os.lseek(self._fd, 0, os.SEEK_CUR)
        with fs.writing(self.path):
            os.ftruncate(self._fd, end)  # a torn last line is as good as none
            os.lseek(self._fd, end, os.SEEK_SET)
        if first is None:
            self._append(header + "\n")

    def _replay(self, lines: Iterator[bytes]) -> None:
        done, boot = self.done, b""
        for line in lines:
            if found := _TILE.fullmatch(line):
                tensor, tile, digest = found.groups()
                with suppress(IndexError):  # no tile of this plan
                    done.add(int(tensor), int(tile), unhexlify(digest))
            elif found := _LOST.fullmatch(line):
                done.drop(int(found[1]))
            elif line == b"flush":
                done.mark()
            elif line == b"sync":
                done.settle()
            elif line == b"doubt":
                done.drop_unsure()
            elif line == b"seal":
                self.sealed = True
            elif line.startswith(b"boot "):
                if boot != line:  # the machine went down, not just the process
                    done.drop_unsure()
                boot = line
        if boot != f"boot {_boot_id()}".encode():
            done.drop_unsure()

    def _append_durably(self, lines: str) -> None:
        with self._lock:
            self._append(lines)
        with fs.writing(self.path):
            os.fsync(self._fd)

    def _append(self, lines: str) -> None:
        data = lines.encode()
        with fs.writing(self.path):
            while data:
                data = data[os.write(self._fd, data) :]


def _lines(fd: int) -> Iterator[bytes]:
    """Complete lines from the beginning; afterwards the file's position is behind the last."""
    position = end = 0
    is_whole = True
    with os.fdopen(os.dup(fd), "rb") as file:
        file.seek(0)
        while line := file.readline(_MAX_LINE):
            position += len(line)
            if not line.endswith(b"\n"):
                is_whole = False
                continue
            if is_whole:
                yield line[:-1]
            is_whole, end = True, position
    os.lseek(fd, end, os.SEEK_SET)


def _boot_id() -> str:
    """Differs after every start of the machine; random where the system has no such id."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip()
    except OSError:
        return os.urandom(16).hex()
