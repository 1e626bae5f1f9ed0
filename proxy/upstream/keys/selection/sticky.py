"""The same `prompt_cache_key` or prompt prefix always goes to the same key, in every process and after a restart.

This is rendezvous hashing (Thaler and Ravishankar, 1996): if a key is unusable, only its own share moves. Requests too
short for prompt caching are ordered as in `headroom`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from ..lease import UpstreamKey
from ..pool import KeyPool


def sticky(
    keys: Sequence[UpstreamKey], pool: KeyPool, model: str, now: float, prefix: bytes = b""
) -> list[UpstreamKey]:
    if not prefix:
        return pool.by_headroom(keys, model, now)
    return sorted(keys, key=lambda key: hashlib.sha256(prefix + key.label.encode()).digest())
