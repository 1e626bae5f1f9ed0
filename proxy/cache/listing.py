"""A stored answer as administration shows it: what it is, how old, how large, and what a hit on it saves."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import msgspec

from .entry import Entry


def listing(entry: Entry, size: int, wall: float) -> dict[str, Any]:
    """For JSON, without the body. size: bytes in its store; wall: now, Unix seconds.

    ttl_left_s: below 0 for an entry whose time is over; saves_usd: what a hit saves, None where unknown;
    traits: of `core.explain`.
    """
    return {
        "key": entry.key,
        "form": entry.form,
        "endpoint": entry.endpoint,
        "model": entry.model,
        "answer_model": entry.answer_model,
        "namespace": entry.namespace,
        "tags": list(entry.tags),
        "stored_at": timestamp(entry.stored_at),
        "age_s": entry.age(wall),
        "ttl_left_s": entry.remaining(wall),
        "size": size,
        "status": entry.status,
        "usage": msgspec.to_builtins(entry.usage),
        "saves_usd": entry.cost,
        "sampled": entry.sampled,
        "traits": entry.traits,
    }


def timestamp(wall: float) -> str:
    """ISO 8601 in UTC; what no calendar holds, in plain Unix seconds."""
    try:
        return datetime.fromtimestamp(int(wall), UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    except (ValueError, OverflowError, OSError):
        return str(wall)
