"""The table of store backends, and the store that the settings name."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping
from typing import Final

from ...config.settings import CacheSettings, Settings
from ...system.clock import Clock
from .cassette import RecordingStore, ReplayStore
from .interface import Store, StoreOptions
from .memory import MemoryStore
from .tiered import TieredStore


def store_options(settings: Settings, wall: Callable[[], float]) -> StoreOptions:
    """Where these settings keep answers behind memory; `wall`: the clock, Unix seconds."""
    cache, redis = settings.cache, settings.redis
    url = redis.url.reveal() if redis.url is not None else ""
    max_size = sys.maxsize if cache.mode == "replay" else cache.max_size  # there nothing is removed
    return StoreOptions(cache.path, max_size, cache.max_entry, url, redis.prefix, wall, max_stale(cache))


def build_store(settings: Settings, clock: Clock) -> TieredStore | None:
    """Memory, with the configured backend behind it; a driver is imported only where its name is configured."""
    cache, replays = settings.cache, settings.cache.mode == "replay"
    if cache.backend == "off" or cache.when == "never":
        return None
    if replays and cache.cassette is not None:  # it alone: what is replayed is what was committed
        return ReplayStore(MemoryStore(sys.maxsize, sys.maxsize))
    make = BACKENDS[cache.backend]
    slower = make(store_options(settings, clock.wall)) if make is not None else None
    memory = MemoryStore(cache.memory_size, cache.max_entry)
    if replays:
        return ReplayStore(memory, slower)
    if cache.cassette is not None:
        return RecordingStore(memory, slower, cache.cassette, clock)
    return TieredStore(memory, slower)


def max_stale(cache: CacheSettings) -> float:
    """Seconds an entry is kept after its ttl, for it may yet serve as stale; in replay for ever (contract 7, Cache)."""
    return math.inf if cache.mode == "replay" else max(cache.stale_while_revalidate, cache.stale_if_error)


def _sqlite(place: StoreOptions) -> Store:
    from .sqlite import SQLiteStore

    return SQLiteStore(place.path, place.max_size, place.max_entry, place.max_stale, place.wall)


def _redis(place: StoreOptions) -> Store:
    from .redis import RedisStore

    return RedisStore(place.redis_url, place.redis_prefix, place.max_entry, place.max_stale, wall=place.wall)


BACKENDS: Final[Mapping[str, Callable[[StoreOptions], Store] | None]] = {
    "memory": None,
    "sqlite": _sqlite,
    "redis": _redis,
}
"""`cache.backend` -> what makes the tier behind memory, None where nothing stands behind it."""
