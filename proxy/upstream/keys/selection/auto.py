"""Like `headroom`, but a long prompt stays on the key that last served the same prefix, while it is under 80 % used.

The upstream of that key has the prefix in its prompt cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from ..lease import UpstreamKey
from ..pool import KeyPool

FREE: Final = 0.2
"""A prompt stays on its key if more than this share of the key's limits is free (`docs/keys-and-limits.md`)."""


def auto(keys: Sequence[UpstreamKey], pool: KeyPool, model: str, now: float, prefix: bytes = b"") -> list[UpstreamKey]:
    order = pool.by_headroom(keys, model, now)
    last = pool.affinity.key_of(prefix, now) if prefix else None
    for key in order:
        if key.label == last and pool.headroom(key, model, now) > FREE:
            return [key, *(other for other in order if other is not key)]
    return order
