"""Settings compiled into machinery, once: what the rooms of one running proxy share. A reload swaps the whole world."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from .config import Settings
from .core.attempts import Policy, RetryBudget
from .core.breaker import Breaker, Trip
from .core.headers import Masker
from .core.keyring import KeyRing, PoolKey
from .core.learned import Learned
from .core.pricing import PriceTable
from .core.receipt import Receipts
from .gate import Gate
from .objects import Objects, Shared
from .providers import DIALECTS, Dialect, Site
from .seams import Seams
from .selection import STRATEGIES
from .stores import Store
from .stores.memory import MemoryStore
from .stores.tiered import TieredStore

CLIENTS_KEY: Final = "client"
"""The label of the one key a pass-through proxy has: each client's own."""


@dataclass(frozen=True, slots=True)
class Upstream:
    """One upstream, ready to use."""

    site: Site
    dialect: Dialect
    prices: PriceTable
    budget: RetryBudget
    cache_as: str | None
    breaker: Breaker

    def identity(self, model: str) -> str:
        return self.cache_as or self.dialect.identity(self.site, model)


@dataclass(slots=True)
class World:
    """The compiled settings. credentials: headers by key label; passthrough: the client's own credential goes up."""

    settings: Settings
    seams: Seams
    upstreams: tuple[Upstream, ...]
    ring: KeyRing
    credentials: Mapping[str, tuple[tuple[str, str], ...]]
    policy: Policy
    gate: Gate
    store: TieredStore | None
    objects: Objects
    masker: Masker
    passthrough: bool
    receipts: Receipts = field(default_factory=Receipts)
    sites: tuple[Site, ...] = ()
    _identities: dict[str, str] = field(default_factory=dict)

    def identity(self, model: str) -> str:
        """What stands in the cache key for all upstreams that serve `model`."""
        found = self._identities.get(model)
        if found is None:
            serving = {key.upstream for group in self.ring.serving(model) for key in group}
            found = "\n".join(sorted({self.upstreams[index].identity(model) for index in serving}))
            if len(self._identities) >= 4096:
                self._identities.clear()
            self._identities[model] = found
        return found

    def ttl(self, endpoint: str) -> float:
        """Seconds an answer of this endpoint lives in the cache."""
        seconds: float = getattr(self.settings.cache.ttl, endpoint)
        return seconds


def compile_world(settings: Settings, seams: Seams) -> World:
    """The machinery for `settings`. Reads no file and opens nothing."""
    upstreams, keys, credentials, secrets = [], [], {}, []
    for index, spec in enumerate(settings.upstreams):
        site = Site(spec.name, spec.kind, spec.base_url, spec.api_version, spec.deployments)
        dialect = DIALECTS[spec.kind]
        prices = PriceTable({**settings.cost.prices, **spec.prices})
        budget = RetryBudget(settings.retry.budget)
        breaker = Breaker(Trip(settings.breaker.failures, settings.breaker.window, settings.breaker.open_for))
        upstreams.append(Upstream(site, dialect, prices, budget, spec.cache_as, breaker))
        for key in spec.keys:
            secret = key.secret.reveal()
            secrets.append(secret)
            credentials[key.label] = dialect.auth(secret, key.organization, key.project)
            keys.append(PoolKey(key.label, index, spec.models, spec.priority, key.quota, key.limits, key.weight))
        if not spec.keys:
            label = CLIENTS_KEY if settings.passthrough and len(settings.upstreams) == 1 else spec.name
            credentials[label] = ()
            keys.append(PoolKey(label, index, spec.models, spec.priority))
    retry = settings.retry
    return World(
        settings=settings,
        seams=seams,
        upstreams=tuple(upstreams),
        ring=KeyRing(
            keys,
            STRATEGIES[settings.selection],
            settings.throttle.limits,
            settings.throttle.use,
            breakers=[upstream.breaker for upstream in upstreams],
            learned=Learned() if settings.throttle.adaptive else None,
        ),
        credentials=credentials,
        policy=Policy(retry.max_retries, retry.base_delay, retry.max_delay, retry.jitter, retry.ambiguous),
        gate=Gate(settings.throttle.max_queue, seams.monotonic),
        store=_store(settings, seams),
        objects=Objects(seams.wall, _shared_objects(settings, len(keys))),
        masker=Masker(secrets),
        passthrough=settings.passthrough,
        sites=tuple(upstream.site for upstream in upstreams),
    )


def _store(settings: Settings, seams: Seams) -> TieredStore | None:
    """Memory, with the configured backend behind it; a driver is imported only where its name is configured."""
    cache = settings.cache
    if cache.backend == "off" or cache.when == "never":
        return None
    slower: Store | None = None
    if cache.backend == "sqlite":
        from .stores.sqlite import SQLiteStore

        slower = SQLiteStore(cache.path, cache.max_size, cache.max_entry, wall=seams.wall)
    elif cache.backend == "redis" and settings.redis.url is not None:
        from .stores.redis import RedisStore

        slower = RedisStore(settings.redis.url.reveal(), settings.redis.prefix, cache.max_entry, wall=seams.wall)
    return TieredStore(MemoryStore(cache.memory_size, cache.max_entry), slower)


def _shared_objects(settings: Settings, keys: int) -> Shared | None:
    """Redis, where something else of ours is in it already and there is more than one key to choose from."""
    if keys < 2 or settings.redis.url is None or "redis" not in (settings.cache.backend, settings.throttle.backend):
        return None
    from .stores.redis_objects import RedisObjects

    return RedisObjects(settings.redis.url.reveal(), settings.redis.prefix)


def scope_of_credential(scheme: str, token: str, *parts: str) -> str:
    """What separates pass-through clients: a digest of the credential and of what else decides for whom upstream
    answers.
    """
    return "credential " + hashlib.sha256("\0".join((scheme, token, *parts)).encode()).hexdigest()
