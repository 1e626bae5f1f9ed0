"""Settings compiled into machinery, once: what the rooms of one running proxy share. A reload swaps the whole world."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from .config import Settings
from .core.attempts import Policy, RetryBudget
from .core.call import Client
from .core.headers import Masker
from .core.keyring import KeyRing, PoolKey
from .core.outcome import TransportFailure
from .core.pricing import PriceTable
from .core.receipt import Receipts
from .gate import Gate
from .providers import DIALECTS, Dialect, Site
from .runs import RunBook
from .seams import Seams
from .selection import STRATEGIES
from .stores import BACKENDS, Place
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

    def identity(self, model: str) -> str:
        return self.cache_as or self.dialect.identity(self.site, model)


@dataclass(slots=True)
class World:
    """The compiled settings. credentials: headers by key label (an Entra ID upstream's come and go); passthrough: the
    client's own credential goes up."""

    settings: Settings
    seams: Seams
    upstreams: tuple[Upstream, ...]
    ring: KeyRing
    credentials: dict[str, tuple[tuple[str, str], ...]]
    policy: Policy
    gate: Gate
    store: TieredStore | None
    masker: Masker
    passthrough: bool
    runs: RunBook
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

    def upstream_named(self, name: str) -> Upstream | None:
        return next((upstream for upstream in self.upstreams if upstream.site.name == name), None)

    def put_token(self, label: str, token: str) -> None:
        """A new Entra ID token for the upstream of this name."""
        before = [value.removeprefix("Bearer ") for _, value in self.credentials.get(label, ())]
        self.credentials[label] = (("Authorization", f"Bearer {token}"),)
        self.masker.add([token], instead_of=before)

    def credential(self, label: str) -> tuple[tuple[str, str], ...]:
        """The headers that carry a pool key. Raises TransportFailure where an Entra ID token is not there yet."""
        found = self.credentials.get(label)
        if found is None:
            raise TransportFailure("unreached", "there is no Entra ID token yet")
        return found

    def ttl(self, endpoint: str) -> float:
        """Seconds an answer of this endpoint lives in the cache."""
        seconds: float = getattr(self.settings.cache.ttl, endpoint)
        return seconds


def compile_world(settings: Settings, seams: Seams, old: World | None = None) -> World:
    """The machinery for `settings`. Reads no file and opens nothing.

    old: the world it takes the place of, from which it has the store, the waiting room, the receipts, what is known
    of keys that stay, and what counts against limits.
    """
    upstreams, keys, secrets = [], [], []
    credentials: dict[str, tuple[tuple[str, str], ...]] = {}
    for index, spec in enumerate(settings.upstreams):
        site = Site(spec.name, spec.kind, spec.base_url, spec.api_version, spec.deployments)
        dialect = DIALECTS[spec.kind]
        prices = PriceTable({**settings.cost.prices, **spec.prices})
        before = old.upstream_named(spec.name) if old is not None else None
        same = before is not None and old is not None and old.settings.retry.budget == settings.retry.budget
        budget = before.budget if before is not None and same else RetryBudget(settings.retry.budget)
        upstreams.append(Upstream(site, dialect, prices, budget, spec.cache_as))
        for key in spec.keys:
            secret = key.secret.reveal()
            secrets.append(secret)
            credentials[key.label] = dialect.auth(secret, key.organization, key.project)
            keys.append(PoolKey(key.label, index, spec.models, spec.priority, key.quota, key.limits, key.weight))
        if spec.entra_id:
            keys.append(PoolKey(spec.name, index, spec.models, spec.priority))
        elif not spec.keys:
            label = CLIENTS_KEY if settings.passthrough and len(settings.upstreams) == 1 else spec.name
            credentials[label] = ()
            keys.append(PoolKey(label, index, spec.models, spec.priority))
    retry = settings.retry
    ring = KeyRing(keys, STRATEGIES[settings.selection], settings.throttle.limits, settings.throttle.use)
    gate = Gate(settings.throttle.max_queue, seams.monotonic)
    if old is not None:
        unchanged = {label for label, headers in credentials.items() if old.credentials.get(label) == headers}
        ring.inherit(old.ring, unchanged, seams.monotonic())
        gate = old.gate
        gate.max_queue = settings.throttle.max_queue
        for spec in settings.upstreams:
            if spec.entra_id and spec.name in old.credentials:
                credentials[spec.name] = old.credentials[spec.name]
    store = _store(settings, seams) if old is None else old.store
    return World(
        settings=settings,
        seams=seams,
        upstreams=tuple(upstreams),
        ring=ring,
        credentials=credentials,
        policy=Policy(retry.max_retries, retry.base_delay, retry.max_delay, retry.jitter, retry.ambiguous),
        gate=gate,
        store=store,
        masker=Masker(secrets),
        passthrough=settings.passthrough,
        runs=_runs(settings, seams, store) if old is None else old.runs,
        sites=tuple(upstream.site for upstream in upstreams),
        receipts=Receipts() if old is None else old.receipts,
    )


def store_place(settings: Settings, wall: Callable[[], float]) -> Place:
    """Where these settings keep answers behind memory; `wall`: the clock, Unix seconds."""
    cache, redis = settings.cache, settings.redis
    url = redis.url.reveal() if redis.url is not None else ""
    return Place(cache.path, cache.max_size, cache.max_entry, url, redis.prefix, wall)


def _store(settings: Settings, seams: Seams) -> TieredStore | None:
    """Memory, with the configured backend behind it; a driver is imported only where its name is configured."""
    cache = settings.cache
    if cache.backend == "off" or cache.when == "never":
        return None
    make = BACKENDS[cache.backend]
    slower = make(store_place(settings, seams.wall)) if make is not None else None
    return TieredStore(MemoryStore(cache.memory_size, cache.max_entry), slower)


def _runs(settings: Settings, seams: Seams, store: TieredStore | None) -> RunBook:
    """Named runs, shared where a Redis is configured; over the cache's link where it has one."""
    if settings.redis.url is None or "redis" not in (settings.cache.backend, settings.throttle.backend):
        return RunBook(seams)
    from .stores.redis import DEADLINE, RedisStore
    from .stores.redis_link import Link
    from .stores.redis_runs import RedisRuns

    slower = store.slower if store is not None else None
    if isinstance(slower, RedisStore):
        return RunBook(seams, RedisRuns(slower.link, settings.redis.prefix, seams.wall, borrowed=True))
    link = Link(settings.redis.url.reveal(), DEADLINE)
    return RunBook(seams, RedisRuns(link, settings.redis.prefix, seams.wall))


def scope_of_credential(scheme: str, token: str, *parts: str) -> str:
    """What separates pass-through clients: a digest of the credential and of what else decides for whom upstream
    answers.
    """
    return "credential " + hashlib.sha256("\0".join((scheme, token, *parts)).encode()).hexdigest()


def configured_clients(settings: Settings) -> tuple[Client, ...]:
    """One for each of `server.client_keys`, in their order."""
    shared = settings.cache.shared
    return tuple(
        Client(key.name, "" if shared else f"namespace {key.namespace}" if key.namespace else f"name {key.name}")
        for key in settings.server.client_keys
    )
