"""Most headroom first; ties, and keys without known limits, by least recent use."""

from __future__ import annotations

from collections.abc import Sequence

from ..core.keyring import KeyRing, PoolKey


def headroom(keys: Sequence[PoolKey], ring: KeyRing, model: str, now: float, prefix: bytes = b"") -> list[PoolKey]:
    # Rounded, so that a hair's difference between two idle keys does not pin all traffic to one of them.
    return sorted(keys, key=lambda key: (-round(ring.headroom(key, model, now), 2), ring.last_used.get(key.label, 0)))
