"""Most headroom first; ties, and keys without known limits, by least recent use."""

from __future__ import annotations

from collections.abc import Sequence

from ..lease import PoolKey
from ..pool import KeyRing


def headroom(keys: Sequence[PoolKey], ring: KeyRing, model: str, now: float, prefix: bytes = b"") -> list[PoolKey]:
    return ring.by_headroom(keys, model, now)
