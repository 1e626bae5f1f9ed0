"""Each key in turn, per model, in the order of the settings."""

from __future__ import annotations

from collections.abc import Sequence

from ..lease import PoolKey
from ..pool import KeyRing


def round_robin(keys: Sequence[PoolKey], ring: KeyRing, model: str, now: float, prefix: bytes = b"") -> list[PoolKey]:
    turn = ring.turns.get(model, 0)
    if len(ring.turns) >= 4096:
        ring.turns.clear()
    ring.turns[model] = turn + 1
    start = turn % len(keys)
    return [*keys[start:], *keys[:start]]
