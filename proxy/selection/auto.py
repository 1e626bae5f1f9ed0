"""As `headroom`, except that a long prompt stays with the key that last served the same beginning, whose upstream has
it in its prompt cache, while that key is under 80 % used.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from ..core.keyring import KeyRing, PoolKey

FREE: Final = 0.2
"""The share of its limits a key must have free to be stayed with (contract 7, Keys)."""


def auto(keys: Sequence[PoolKey], ring: KeyRing, model: str, now: float, prefix: bytes = b"") -> list[PoolKey]:
    room = {key.label: round(ring.headroom(key, model, now), 2) for key in keys}
    home = ring.affinity.home(prefix, now) if prefix else None
    if home is not None and room.get(home, 0.0) <= FREE:
        home = None
    return sorted(keys, key=lambda key: (key.label != home, -room[key.label], ring.last_used.get(key.label, 0)))
