"""Space and speed of the folders that a job reads and writes."""

from __future__ import annotations

import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from quantkit.errors import OutputError
from quantkit.run import fs

_SAMPLE = 64 << 20
_STEP = 8 << 20


@dataclass(frozen=True, slots=True)
class Disk:
    """`read` and `write` in bytes per second; 0 where it was not measured."""

    device: int
    n_free: int
    read: float = 0.0
    write: float = 0.0
    refused: str = ""


def output_disk(folder: Path) -> Disk:
    """Writes 64 MiB into a file without a name, flushes it, and leaves nothing."""
    present = existing(folder)
    free = shutil.disk_usage(present).free
    device = present.stat().st_dev
    n_bytes = min(_SAMPLE, free // 20)
    data = os.urandom(_STEP)
    if not present.is_dir():
        return Disk(device, free, refused="is no folder")
    try:
        fd = fs.open_scratch(present, 0)
        try:
            begun = time.perf_counter()
            for at in range(0, n_bytes, _STEP):
                fs.write_at(fd, memoryview(data)[: n_bytes - at], at, present)
            with fs.writing(present):
                os.fsync(fd)
            seconds = time.perf_counter() - begun
        finally:
            os.close(fd)
    except OutputError as error:
        return Disk(device, free, refused=error.message)
    return Disk(device, free, write=n_bytes / seconds)


def source_disk(file: Path) -> Disk:
    """Reads up to 64 MiB from the middle of a file, past the page cache where that can be told."""
    n_bytes = file.stat().st_size
    begin = max(0, n_bytes // 2 - _SAMPLE // 2)
    fd = os.open(file, os.O_RDONLY)
    try:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(fd, begin, _SAMPLE, os.POSIX_FADV_DONTNEED)
        done, begun = 0, time.perf_counter()
        while done < _SAMPLE and (part := os.pread(fd, _STEP, begin + done)):
            done += len(part)
        seconds = time.perf_counter() - begun
    finally:
        os.close(fd)
    return Disk(file.stat().st_dev, shutil.disk_usage(file.parent).free, read=done / seconds)


def existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that is there."""
    path = folder.absolute()
    while not path.exists() and path != path.parent:
        path = path.parent
    return path
