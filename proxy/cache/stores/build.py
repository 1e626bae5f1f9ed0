"""The table of store backends, and the store that the settings name."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping
from typing import Final

from ...config.settings import Cache, Settings
from ...system.clock import Seams
from .cassette import RecordingStore, ReplayStore
from .interface import Place, Store
from .memory import MemoryStore
from .tiered import TieredStore


def store_place(settings: Settings, wall: Callable[[], float]) -> Place:
    """Where these settings keep answers behind memory; `wall`: the clock, Unix seconds."""
    cache, redis = settings.cache, settings.redis
    url = redis.url.reveal() if redis.url is not None else ""
    max_size = sys.maxsize if cache.mode == "replay" else cache.max_size  # there nothing is removed
    return Place(cache.path, max_size, cache.max_entry, url, redis.prefix, wall, kept_past_end(cache))


def _store(settings: Settings, seams: Seams) -> TieredStore | None:
    """Memory, with the configured backend behind it; a driver is imported only where its name is configured."""
    cache, replays = settings.cache, settings.cache.mode == "replay"
    if cache.backend == "off" or cache.when == "never":
        return None
    if replays and cache.cassette is not None:  # it alone: what is replayed is what was committed
        return ReplayStore(MemoryStore(sys.maxsize, sys.maxsize))
    make = BACKENDS[cache.backend]
    slower = make(store_place(settings, seams.wall)) if make is not None else None
    memory = MemoryStore(cache.memory_size, cache.max_entry)
    if replays:
        return ReplayStore(memory, slower)
    if cache.cassette is not None:
        return RecordingStore(memory, slower, cache.cassette, seams)
    return TieredStore(memory, slower)


def kept_past_end(cache: Cache) -> float:
    """Seconds an entry is kept after its ttl, for it may yet serve as stale; in replay for ever (contract 7, Cache)."""
    return math.inf if cache.mode == "replay" else max(cache.stale_while_revalidate, cache.stale_if_error)


def _sqlite(place: Place) -> Store:
    from .sqlite import SQLiteStore

    return SQLiteStore(place.path, place.max_size, place.max_entry, place.grace, place.wall)


def _redis(place: Place) -> Store:
    from .redis import RedisStore

    return RedisStore(place.redis_url, place.redis_prefix, place.max_entry, place.grace, wall=place.wall)


BACKENDS: Final[Mapping[str, Callable[[Place], Store] | None]] = {
    "memory": None,
    "sqlite": _sqlite,
    "redis": _redis,
}
"""`cache.backend` -> what makes the tier behind memory, None where nothing stands behind it."""
