"""`Coordination`: what several processes count, remember and lock together, and over what."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

from .accounting.budgets.budgets import SharedBudgets
from .accounting.runs.registry import SharedRuns
from .cache.stores.tiered import TieredStore
from .config.settings import Settings
from .system.clock import Clock
from .upstream.interfaces import LockStore
from .upstream.keys.object_owners import SharedOwners
from .upstream.limits.shared import SharedLimits


@dataclass(frozen=True, slots=True)
class Coordination:
    """The ports to other processes. Where one is None, this process keeps to its own memory.

    limits: rate limits and key states. budgets: spending. runs: named runs. owners: which key made which stored
    object. locks: which process fetches a response that several want.
    """

    limits: SharedLimits | None = None
    budgets: SharedBudgets | None = None
    runs: SharedRuns | None = None
    owners: SharedOwners | None = None
    locks: LockStore | None = None


NO_COORDINATION: Final = Coordination()
"""One process alone."""


def over_redis(settings: Settings, clock: Clock, store: TieredStore, otherwise: Coordination) -> Coordination:
    """Return the ports over Redis as far as the settings use it, and those of `otherwise` for the rest.

    Limits and budgets are shared if `throttle.backend` is redis, locks if the cache is there. Runs, and the owners of
    stored objects, are shared if either is. Nothing is opened.
    """
    cache, throttle = settings.cache.backend, settings.throttle.backend
    if settings.redis.url is None or "redis" not in (cache, throttle):
        return otherwise
    from .accounting.runs.redis import RedisRuns
    from .cache.stores.redis import DEADLINE, RedisStore
    from .pipeline.coalescing.redis_lock import RedisLockStore
    from .system.redis import RedisConnection
    from .upstream.keys.redis_owners import RedisOwners

    url, prefix = settings.redis.url.reveal(), settings.redis.prefix
    shared = _limits_over_redis(url, prefix, clock, otherwise) if throttle == "redis" else otherwise
    if isinstance(store.slower, RedisStore):  # its connection serves runs and locks, too
        link = store.slower.link
        runs = RedisRuns(link, prefix, clock.wall, borrowed=True)
        shared = replace(shared, runs=runs, locks=RedisLockStore(link, prefix, DEADLINE))
    else:
        link = RedisConnection(url, DEADLINE, "redis runs", "each proxy counts runs by itself")
        shared = replace(shared, runs=RedisRuns(link, prefix, clock.wall))
    return replace(shared, owners=RedisOwners(url, prefix))


def _limits_over_redis(url: str, prefix: str, clock: Clock, otherwise: Coordination) -> Coordination:
    from .accounting.budgets.redis import RedisBudgets
    from .upstream.limits.redis import RedisLimits

    limits = RedisLimits(url, prefix, clock.new_id(), clock.monotonic)
    return replace(otherwise, limits=limits, budgets=RedisBudgets(url, prefix, clock.new_id()))
