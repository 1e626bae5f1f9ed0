"""How limits and key states are named and measured in Redis."""

from __future__ import annotations

import hashlib
import math
from typing import Final

SLOTS: Final = 300
"""Parts of a window: what is stamped in one leaves together."""

Amount = tuple[str, int, int, int, int]
"""Window, span, width, stamp (ms), change."""


def shape(span: float) -> tuple[int, int]:
    """A window's span, and the width of its slots, in ms."""
    whole = math.ceil(span * 1000)
    return whole, whole // SLOTS


def digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode("utf-8", "surrogatepass")).hexdigest()[:32]


def literal(text: str) -> str:
    """A glob that matches `text` alone (Redis: `*?[]^-\\`)."""
    return "".join(f"\\{c}" if c in "*?[]^-\\" else c for c in text)
