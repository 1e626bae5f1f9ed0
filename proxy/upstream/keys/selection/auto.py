"""As `headroom`, except that a long prompt stays with the key that last served the same beginning, whose upstream has
it in its prompt cache, while that key is under 80 % used.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from ..lease import UpstreamKey
from ..pool import KeyPool

FREE: Final = 0.2
"""The share of its limits a key must have free to be stayed with (contract 7, Keys)."""


def auto(keys: Sequence[UpstreamKey], pool: KeyPool, model: str, now: float, prefix: bytes = b"") -> list[UpstreamKey]:
    order = pool.by_headroom(keys, model, now)
    home = pool.affinity.home(prefix, now) if prefix else None
    for key in order:
        if key.label == home and pool.headroom(key, model, now) > FREE:
            return [key, *(other for other in order if other is not key)]
    return order
