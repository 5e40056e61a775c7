"""The only module that creates, renames or removes output files."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from quantkit.errors import OutputError
from quantkit.run.events import size

PARTIAL = ".partial"


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn the system's refusals into `OutputError`s that name the file and the remedy."""
    try:
        yield
    except OSError as error:
        raise _refusal(error, path) from error


def _refusal(error: OSError, path: Path) -> OutputError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        free = shutil.disk_usage(path.parent).free if path.parent.exists() else 0
        return OutputError(
            f"no space left on the device ({size(free)} free)",
            where=str(path),
            hint="free some space and run the same command again: it continues where it stopped",
        )
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return OutputError("not permitted to write", where=str(path), hint="choose another folder")
    return OutputError(
        f"cannot be written: {error.strerror or error}",
        where=str(path),
        hint="once that is mended, the same command continues where it stopped",
    )


def partial_of(path: Path) -> Path:
    """The name that a file bears until it is complete."""
    return path.with_name(path.name + PARTIAL)


def open_sized(path: Path, n_bytes: int) -> int:
    """Open for positional writes, creating it; its length becomes `n_bytes`. Gives the fd."""
    with writing(path):
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            if os.fstat(fd).st_size != n_bytes:
                os.ftruncate(fd, n_bytes)
        except OSError:
            os.close(fd)
            raise
        return fd


def open_scratch(folder: Path, n_bytes: int) -> int:
    """A file without a name for data that does not outlive the process. Gives the fd."""
    make_folder(folder)
    # Never named where the system can do that, so that no kill leaves it behind.
    with writing(folder), tempfile.TemporaryFile(dir=folder, buffering=0) as file:
        os.ftruncate(file.fileno(), n_bytes)
        return os.dup(file.fileno())


def write_at(fd: int, data: bytes | memoryview, offset: int, path: Path) -> None:
    """Write all of `data` at `offset`."""
    view = memoryview(data).cast("B")
    with writing(path):
        while view:
            n_written = os.pwrite(fd, view, offset)
            if n_written == 0:
                raise OSError(errno.EIO, "the device takes no more bytes")
            view, offset = view[n_written:], offset + n_written


def publish(path: Path) -> None:
    """Give a complete, flushed partial file its final name."""
    with writing(path):
        partial_of(path).replace(path)
        sync_folder(path.parent)


def unpublish(path: Path) -> None:
    """Take a final name back: the file is to be written to again."""
    with writing(path):
        path.replace(partial_of(path))


def write_whole(path: Path, data: bytes) -> None:
    """Write a small file so that its final name only ever holds all of it."""
    fd = open_sized(partial_of(path), 0)
    try:
        write_at(fd, data, 0, path)
        with writing(path):
            os.fsync(fd)
    finally:
        os.close(fd)
    publish(path)


def sync_folder(folder: Path) -> None:
    """Make renames in a folder durable."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Create a folder and keep it from other runs; raises `OutputError` where one has it."""
    make_folder(folder)
    with writing(folder):
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise OutputError(
                "another run is at work here",
                where=str(folder),
                hint="wait for it, or choose another output with -o",
            ) from None
        yield
    finally:
        os.close(fd)


def remove(path: Path) -> None:
    """Remove a file if it is there."""
    with writing(path):
        path.unlink(missing_ok=True)


def remove_folder(folder: Path) -> None:
    """Remove a folder if it is there and empty."""
    with suppress(OSError):
        folder.rmdir()


def empty_folder(folder: Path) -> None:
    """Remove the files directly inside a folder of our own, if it is there."""
    for path in folder.iterdir() if folder.is_dir() else ():
        if not path.is_dir():
            remove(path)


def make_folder(folder: Path) -> None:
    """Create the output folder."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)


def require_space(folder: Path, n_bytes: int, n_present: int) -> None:
    """Refuse to start when the disk cannot hold what is still to come.

    `n_present` are bytes of unfinished files already allocated in the folder.
    """
    free = shutil.disk_usage(folder).free
    need = max(0, n_bytes - n_present)
    if free < need:
        raise OutputError(
            f"{size(need)} are needed and {size(free)} are free",
            where=str(folder),
            hint="free some space, or choose another folder with -o",
        )


def allocated(path: Path) -> int:
    """Bytes that a file occupies on disk; 0 where there is none."""
    try:
        return path.stat().st_blocks * 512
    except FileNotFoundError:
        return 0
