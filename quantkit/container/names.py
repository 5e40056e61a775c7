"""Names in GGUF files: which are legal, how shards are called, how to show a hostile one."""

from __future__ import annotations

import re

from quantkit.errors import GgufError

MAX_TENSOR_NAME_BYTES = 63  # ggml keeps 64 with the terminating NUL
MAX_KEY_BYTES = 65535  # the format's own limit
MAX_SHARDS = 65535  # split.count is a u16

SPLIT_NO = "split.no"
SPLIT_COUNT = "split.count"
SPLIT_TENSORS = "split.tensors.count"
SPLIT_KEYS = (SPLIT_NO, SPLIT_COUNT, SPLIT_TENSORS)
ALIGNMENT = "general.alignment"

_MAX_FILE_NAME_BYTES = 255
_SHOWN_CHARS = 120
_SHARD_NAME = re.compile(r"(?P<stem>.+)-(?P<no>\d{5})-of-(?P<count>\d{5})\.gguf", re.ASCII)


def shown(text: str) -> str:
    """`text` fit for a terminal or a message: control, bidi and lone surrogate characters escaped.

    Cut after 120 characters, because a name may be as long as its file.
    """
    cut = text if len(text) <= _SHOWN_CHARS else text[:_SHOWN_CHARS] + "…"
    return escaped(cut)


def escaped(text: str) -> str:
    """`text` on one line, with every character that is not printable written as an escape."""
    if text.isprintable():
        return text
    return text.translate(_Escapes())


class _Escapes(dict[int, str]):
    """Code point -> what is shown for it; made as they come, a text may be of millions of them."""

    def __missing__(self, code: int) -> str:
        c = chr(code)
        self[code] = c if c.isprintable() else c.encode("unicode_escape").decode("ascii")
        return self[code]


def check_name(name: str, *, max_bytes: int, where: str) -> bytes:
    """The UTF-8 of a key or tensor name; refuses empty, too long, NUL and lone surrogates."""
    try:
        raw = name.encode()
    except UnicodeEncodeError as error:
        raise GgufError(f"name {shown(name)!r} is not Unicode text", where=where) from error
    if not raw:
        raise GgufError("empty name", where=where)
    if len(raw) > max_bytes:
        raise GgufError(
            f"name {shown(name)!r} has {len(raw)} bytes, at most {max_bytes} are allowed",
            where=where,
        )
    # C readers end a string there, so two names that differ behind it would be one.
    if "\0" in name:
        raise GgufError(f"name {shown(name)!r} holds a NUL", where=where)
    return raw


def shard_file_name(stem: str, no: int, count: int) -> str:
    """File name of shard `no` (from 0) of `count`; a set of one is just `STEM.gguf`."""
    return f"{stem}.gguf" if count == 1 else f"{stem}-{no + 1:05d}-of-{count:05d}.gguf"


def parse_shard_file_name(file_name: str) -> tuple[str, int, int] | None:
    """(stem, number from 0, count) of `STEM-0000N-of-0000M.gguf`, None for any other name."""
    match = _SHARD_NAME.fullmatch(file_name)
    if match is None:
        return None
    no, count = int(match["no"]) - 1, int(match["count"])
    return (match["stem"], no, count) if 0 <= no < count <= MAX_SHARDS else None


def check_stem(stem: str) -> None:
    """Refuse a stem that is no plain file name, or that already looks like a shard's."""
    longest = shard_file_name(stem, 0, MAX_SHARDS)
    if not stem or stem.startswith(".") or "/" in stem or "\\" in stem or not stem.isprintable():
        raise GgufError(f"{shown(stem)!r} cannot be the name of a GGUF file")
    if len(longest.encode()) > _MAX_FILE_NAME_BYTES:
        raise GgufError(f"{shown(stem)!r} is too long for the name of a GGUF file")
    if parse_shard_file_name(f"{stem}.gguf"):
        raise GgufError(
            f"{stem!r} is the name of one shard", hint="leave out the -0000N-of-0000M part"
        )
