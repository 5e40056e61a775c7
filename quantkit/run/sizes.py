"""Sizes as people write them."""

from __future__ import annotations

import re
from decimal import Decimal
from fractions import Fraction

from quantkit.errors import UsageError

_UNITS = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}
_SIZE = re.compile(r"\s*(\d{1,18}(?:\.\d{1,18})?)\s*([KMGT]?)(I?)B?\s*", re.ASCII)


def parse_size(text: str) -> int:
    """Bytes: `240GB`, `223.5GiB`, or a plain number. Fractions of a byte are cut off."""
    found = _SIZE.fullmatch(text.upper())
    if not found or (found[3] and not found[2]):
        raise UsageError(
            f"{text!r} is not a size", hint="such as 240GB, 223.5GiB or a number of bytes"
        )
    base = 1024 if found[3] else 1000
    return int(Fraction(Decimal(found[1])) * base ** _UNITS[found[2]])
