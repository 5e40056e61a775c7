"""Names that strangers give: which of them are plain file names."""

from __future__ import annotations

_MAX_NAME_BYTES = 255


def is_plain_name(name: str) -> bool:
    """Whether `name` cannot lead out of a folder, on any platform.

    Not plain are separators of either kind, colons (drive letters, streams), `.` and `..`,
    characters that do not print (NUL, control, bidi), and more than 255 bytes of UTF-8.
    """
    return (
        name.isprintable()
        and not any(c in name for c in "/\\:")
        and name not in ("", ".", "..")
        and len(name.encode()) <= _MAX_NAME_BYTES
    )
