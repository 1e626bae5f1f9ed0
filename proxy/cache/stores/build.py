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
    """Return what the store behind memory needs to know of the settings. wall: returns Unix seconds."""
    cache, redis = settings.cache, settings.redis
    url = redis.url.reveal() if redis.url is not None else ""
    max_size = sys.maxsize if cache.mode == "replay" else cache.max_size  # there nothing is removed
    return StoreOptions(cache.path, max_size, cache.max_entry, url, redis.prefix, wall, max_stale(cache))


class NullStore(TieredStore):
    """Stands in for the store where the cache is off: it finds nothing and keeps nothing."""

    enabled = False

    def __init__(self) -> None:
        super().__init__(MemoryStore(0, 0))


def build_store(settings: Settings, clock: Clock) -> TieredStore:
    """Return memory with the configured backend behind it. A driver is imported only if its name is configured."""
    cache, replays = settings.cache, settings.cache.mode == "replay"
    if cache.backend == "off" or cache.when == "never":
        return NullStore()
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
    """Return for how many seconds after its end of life an entry is kept, as it may still be served stale.

    In replay mode entries are kept for ever.
    """
    return math.inf if cache.mode == "replay" else max(cache.stale_while_revalidate, cache.stale_if_error)


def _sqlite(options: StoreOptions) -> Store:
    from .sqlite import SQLiteStore

    return SQLiteStore(options.path, options.max_size, options.max_entry, options.max_stale, options.wall)


def _redis(options: StoreOptions) -> Store:
    from .redis import RedisStore

    return RedisStore(options.redis_url, options.redis_prefix, options.max_entry, options.max_stale, wall=options.wall)


BACKENDS: Final[Mapping[str, Callable[[StoreOptions], Store] | None]] = {
    "memory": None,
    "sqlite": _sqlite,
    "redis": _redis,
}
"""`cache.backend` -> what builds the tier behind memory; None: memory alone."""
