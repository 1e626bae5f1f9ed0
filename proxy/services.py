"""Settings compiled into machinery, once: what the rooms of one running proxy share. A reload swaps the whole world."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, field

from .accounting.budgets.budgets import Budgets
from .accounting.budgets.budgets import Shared as SharedBudgets
from .accounting.receipt import Receipts
from .accounting.runs.registry import RunBook
from .accounting.runs.registry import Shared as SharedRuns
from .cache.stores.build import _store
from .cache.stores.tiered import TieredStore
from .config.settings import Settings
from .cost.pricing import PriceTable
from .protocol.masking import Masker
from .protocol.request import Client
from .system.clock import Seams
from .upstream.counters import Tallies
from .upstream.interfaces import Leases
from .upstream.keys.lease import PoolKey
from .upstream.keys.object_owners import Objects, Shared
from .upstream.keys.pool import KeyRing
from .upstream.keys.selection import STRATEGIES
from .upstream.limits.calibration import Habits
from .upstream.limits.clients import Clients, Hold
from .upstream.limits.learned import Learned
from .upstream.limits.queue import Gate
from .upstream.limits.shared import RECHECK, Limiter
from .upstream.providers.interface import Site
from .upstream.providers.registry import DIALECTS
from .upstream.retry.circuit_breaker import Breaker, Trip
from .upstream.retry.outcome import Class, TransportFailure
from .upstream.retry.policy import Policy, RetryBudget
from .upstream.target import CLIENTS_KEY, Upstream


@dataclass(frozen=True, slots=True)
class Commons:
    """What one of several workers has in common with the others, where no Redis is configured for it."""

    limiter: Limiter
    runs: SharedRuns
    objects: Shared
    budgets: SharedBudgets


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
    objects: Objects
    masker: Masker
    passthrough: bool
    runs: RunBook
    budgets: Budgets
    leases: Leases | None = None
    receipts: Receipts = field(default_factory=Receipts)
    sites: tuple[Site, ...] = ()
    clients: Clients = field(default_factory=lambda: Clients({}))
    limiter: Limiter | None = None
    habits: Habits = field(default_factory=Habits)
    tallies: Tallies = field(default_factory=Tallies)
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

    @property
    def replays(self) -> bool:
        """Nothing goes upstream: answers come from what was recorded, whatever its age and whosever it was."""
        return self.settings.cache.mode == "replay"

    async def hold(self, client: Client, tokens: int) -> Hold | None:
        """A hold of the client's own limits for a request of `tokens`. Raises Refusal(client_limit …)."""
        hold = self.clients.hold(client, tokens, self.seams.monotonic())
        if self.limiter is None:
            return hold
        while hold is not None and hold.reservation is not None:
            try:
                if await self.limiter.confirm(hold.reservation):
                    break
            except BaseException:
                hold.cancel()
                raise
            hold.cancel()
            hold = self.clients.hold(client, tokens, self.seams.monotonic())
        return hold

    def learn(self, key: PoolKey, model: str, outcome: Class, wait: float, reason: str, floor: int = 0) -> None:
        """Takes note of what an answer teaches of a key, and lets other proxies know."""
        now = self.seams.monotonic()
        self.ring.learn(key, model, outcome, now, wait, reason, floor)
        if self.limiter is not None:
            states = self.ring.states(key.label, model, now)
            told = {
                slot: (state.status.value, state.until - now, state.reason)
                for slot, state in states.items()
                if not state.floor
            }
            self.limiter.learned(key.label, model, told)

    def adopt(self, label: str, model: str, status: str, wait: float, reason: str) -> None:
        """Takes over what another proxy has learned of a key."""
        self.ring.adopt(label, model, status, self.seams.monotonic(), wait, reason)

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


def compile_world(settings: Settings, seams: Seams, old: World | None = None, commons: Commons | None = None) -> World:
    """The machinery for `settings`. Reads no file and opens nothing.

    old: the world it takes the place of, from which it has the store, the waiting room, the receipts, what is known
    of keys that stay, and what counts against limits. commons: where there is no old one, of one of several workers.
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
        trip = Trip(settings.breaker.failures, settings.breaker.window, settings.breaker.open_for)
        breaker = before.breaker if before is not None and before.breaker.trip == trip else Breaker(trip)
        upstreams.append(Upstream(site, dialect, prices, budget, spec.cache_as, breaker))
        for key in spec.keys:
            secret = key.secret.reveal()
            secrets.append(secret)
            limits = settings.limits_of(spec, key) if settings.throttle.tier else key.limits
            credentials[key.label] = dialect.auth(secret, key.organization, key.project)
            keys.append(PoolKey(key.label, index, spec.models, spec.priority, key.quota, limits, key.weight))
        if spec.entra_id:
            keys.append(PoolKey(spec.name, index, spec.models, spec.priority))
        elif not spec.keys:
            label = CLIENTS_KEY if settings.passthrough and len(settings.upstreams) == 1 else spec.name
            credentials[label] = ()
            limits = settings.limits_of(spec) if settings.throttle.tier else {}
            keys.append(PoolKey(label, index, spec.models, spec.priority, limits=limits))
    retry = settings.retry
    limiter = _limiter(settings, seams, commons) if old is None else old.limiter
    make = limiter.allowance if limiter is not None else None
    ring = KeyRing(
        keys,
        STRATEGIES[settings.selection],
        settings.throttle.limits,
        settings.throttle.use,
        make=make,
        breakers=[upstream.breaker for upstream in upstreams],
        learned=Learned() if settings.throttle.adaptive else None,
    )
    gate = Gate(settings.throttle.max_queue, seams.monotonic, recheck=RECHECK if limiter else math.inf)
    clients = Clients({key.name: key.limits for key in settings.server.client_keys}, make)
    if old is not None:
        unchanged = {label for label, headers in credentials.items() if old.credentials.get(label) == headers}
        ring.inherit(old.ring, unchanged, seams.monotonic())
        clients.inherit(old.clients)
        old.budgets.change(settings)
        gate = old.gate
        gate.max_queue = settings.throttle.max_queue
        for spec in settings.upstreams:
            if spec.entra_id and spec.name in old.credentials:
                credentials[spec.name] = old.credentials[spec.name]
    store = _store(settings, seams) if old is None else old.store
    budgets = _budgets(settings, seams, commons) if old is None else old.budgets
    return World(
        settings=settings,
        seams=seams,
        upstreams=tuple(upstreams),
        ring=ring,
        credentials=credentials,
        policy=Policy(retry.max_retries, retry.base_delay, retry.max_delay, retry.jitter, retry.ambiguous),
        gate=gate,
        store=store,
        objects=Objects(seams.wall, _shared_objects(settings, len(keys), commons)) if old is None else old.objects,
        masker=Masker(secrets),
        passthrough=settings.passthrough,
        runs=_runs(settings, seams, store, commons) if old is None else old.runs,
        budgets=budgets,
        leases=_leases(settings, store) if old is None else old.leases,
        clients=clients,
        limiter=limiter,
        habits=Habits() if old is None else old.habits,
        sites=tuple(upstream.site for upstream in upstreams),
        receipts=Receipts() if old is None else old.receipts,
        tallies=Tallies() if old is None else old.tallies,
    )


def _limiter(settings: Settings, seams: Seams, commons: Commons | None) -> Limiter | None:
    """Where limits are counted for several processes; None: here, in memory."""
    if settings.throttle.backend != "redis" or settings.redis.url is None:
        return commons.limiter if commons is not None else None
    from .upstream.limits.redis import RedisLimiter

    return RedisLimiter(settings.redis.url.reveal(), settings.redis.prefix, seams.new_id(), seams.monotonic)


def _budgets(settings: Settings, seams: Seams, commons: Commons | None) -> Budgets:
    """Shared where limits are."""
    if settings.throttle.backend != "redis" or settings.redis.url is None:
        return Budgets(settings, seams, commons.budgets if commons is not None else None)
    from .accounting.budgets.redis import RedisBudgets

    return Budgets(settings, seams, RedisBudgets(settings.redis.url.reveal(), settings.redis.prefix, seams.new_id()))


def _leases(settings: Settings, store: TieredStore | None) -> Leases | None:
    """What keeps processes that share the cache from buying the same twice; over the cache's own link."""
    if store is None or settings.cache.backend != "redis":
        return None
    from .cache.stores.redis import DEADLINE, RedisStore
    from .pipeline.coalescing.redis_lock import RedisLeases

    if not isinstance(store.slower, RedisStore):
        return None
    return RedisLeases(store.slower.link, settings.redis.prefix, DEADLINE)


def _shared_objects(settings: Settings, keys: int, commons: Commons | None) -> Shared | None:
    """Redis, where something else of ours is in it already and there is more than one key to choose from."""
    if keys < 2 or settings.redis.url is None or "redis" not in (settings.cache.backend, settings.throttle.backend):
        return commons.objects if commons is not None else None
    from .upstream.keys.redis_owners import RedisObjects

    return RedisObjects(settings.redis.url.reveal(), settings.redis.prefix)


def _runs(settings: Settings, seams: Seams, store: TieredStore | None, commons: Commons | None) -> RunBook:
    """Named runs, shared where a Redis is configured; over the cache's link where it has one."""
    if settings.redis.url is None or "redis" not in (settings.cache.backend, settings.throttle.backend):
        return RunBook(seams, commons.runs if commons is not None else None)
    from .accounting.runs.redis import RedisRuns
    from .cache.stores.redis import DEADLINE, RedisStore
    from .system.redis import Link

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
        Client(
            key.name,
            "" if shared else f"namespace {key.namespace}" if key.namespace else f"name {key.name}",
            models=key.models,
        )
        for key in settings.server.client_keys
    )
