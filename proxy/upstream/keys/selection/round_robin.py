"""Each key in turn for each model, in the order of the settings."""

from __future__ import annotations

from collections.abc import Sequence

from ..lease import UpstreamKey
from ..pool import KeyPool


def round_robin(
    keys: Sequence[UpstreamKey], pool: KeyPool, model: str, now: float, prefix: bytes = b""
) -> list[UpstreamKey]:
    turn = pool.turns.get(model, 0)
    if len(pool.turns) >= 4096:
        pool.turns.clear()
    pool.turns[model] = turn + 1
    start = turn % len(keys)
    return [*keys[start:], *keys[:start]]
