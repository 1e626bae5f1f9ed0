"""Names and units of limits and key states in Redis."""

from __future__ import annotations

import hashlib
import math
from typing import Final

SLOTS: Final = 300
"""Parts of a window; what was admitted within one part expires together."""

Amount = tuple[str, int, int, int, int]
"""Window, its span and the width of its slots (ms), the time of admission (Unix ms), the change."""


def shape(span: float) -> tuple[int, int]:
    """Return a window's span, given in seconds, and the width of its slots, both in ms."""
    whole = math.ceil(span * 1000)
    return whole, whole // SLOTS


def digest(*parts: str) -> str:
    """Return 32 hexadecimal characters that stand for `parts` in a Redis key."""
    return hashlib.sha256("\0".join(parts).encode("utf-8", "surrogatepass")).hexdigest()[:32]


def literal(text: str) -> str:
    """Return a glob that matches only `text`; Redis gives a meaning to `*?[]^-\\`."""
    return "".join(f"\\{c}" if c in "*?[]^-\\" else c for c in text)
