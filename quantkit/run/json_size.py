"""What JSON from a stranger takes up in memory, told from its bytes before it is parsed."""

from __future__ import annotations

# CPython's, on 64 bits: a member of an object and the pair that a hook sees, an object, a list.
_MEMBER, _OBJECT, _LIST = 170, 240, 64


def parsed_bytes(raw: bytes) -> int:
    """About the most that parsing `raw` can take.

    Every value but the first of its list or object stands behind a comma. Text is decoded once as a
    whole and once more in parts, with up to four bytes per character where it is not ASCII.
    """
    text = 2 * len(raw) if raw.isascii() else 8 * len(raw)
    return text + _MEMBER * raw.count(b",") + _OBJECT * raw.count(b"{") + _LIST * raw.count(b"[")
