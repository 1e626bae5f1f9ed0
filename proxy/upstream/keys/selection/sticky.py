"""The same `prompt_cache_key`, or beginning of a prompt, to the same key always, in every process and after a restart:
rendezvous hashing (Thaler and Ravishankar, 1996), so that a key which rests moves only its own share. Requests too
short for prompt caching go as with `headroom`.
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
