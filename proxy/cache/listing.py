"""An entry for operators, without its body: what it is, its age and size, and what a hit saves."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import msgspec

from .entry import Entry


def listing(entry: Entry, size: int, wall: float) -> dict[str, Any]:
    """Return the members of a JSON object. size: bytes in its store. wall: now, Unix seconds.

    ttl_left_s: below 0 for an expired entry. saves_usd: None if unknown. traits: the field digests of `miss_reason`.
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
    """Return the time in ISO 8601 and UTC; plain Unix seconds if no calendar holds it."""
    try:
        return datetime.fromtimestamp(int(wall), UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    except (ValueError, OverflowError, OSError):
        return str(wall)
