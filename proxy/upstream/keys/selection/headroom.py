"""Most headroom first; ties, and keys without known limits, by least recent use."""

from __future__ import annotations

from collections.abc import Sequence

from ..lease import UpstreamKey
from ..pool import KeyPool


def headroom(
    keys: Sequence[UpstreamKey], pool: KeyPool, model: str, now: float, prefix: bytes = b""
) -> list[UpstreamKey]:
    return pool.by_headroom(keys, model, now)
