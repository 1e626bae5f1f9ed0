"""Settings compiled into machinery, once: what the rooms of one running proxy share. A reload swaps the whole world."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, field

from .accounting.budgets.budgets import Budgets
from .accounting.budgets.budgets import SharedBudgets as SharedBudgets
from .accounting.receipt import Receipts
from .accounting.runs.registry import RunRegistry
from .accounting.runs.registry import SharedRuns as SharedRuns
from .cache.stores.build import build_store
from .cache.stores.tiered import TieredStore
from .config.settings import Settings
from .cost.pricing import PriceTable
from .protocol.masking import SecretMasker
from .protocol.request import Client
from .system.clock import Clock
from .upstream.counters import UpstreamCounters
from .upstream.interfaces import LockStore
from .upstream.keys.lease import UpstreamKey
from .upstream.keys.object_owners import ObjectOwners, SharedOwners
from .upstream.keys.pool import KeyPool
from .upstream.keys.selection import STRATEGIES
from .upstream.limits.calibration import TokenCalibration
from .upstream.limits.clients import ClientLimits, ClientReservation
from .upstream.limits.learned import UpstreamLimits
from .upstream.limits.queue import AdmissionQueue
from .upstream.limits.shared import RECHECK, SharedLimits
from .upstream.providers.interface import UpstreamAddress
from .upstream.providers.registry import PROVIDERS
from .upstream.retry.circuit_breaker import BreakerLimits, CircuitBreaker
from .upstream.retry.outcome import OutcomeKind, TransportFailure
from .upstream.retry.policy import RetryBudget, RetryPolicy
from .upstream.target import CLIENTS_KEY, Upstream


@dataclass(frozen=True, slots=True)
class Coordination:
    """What one of several workers has in common with the others, where no Redis is configured for it."""

    limiter: SharedLimits
    runs: SharedRuns
    owners: SharedOwners
    budgets: SharedBudgets


@dataclass(slots=True)
class Services:
    """The compiled settings. credentials: headers by key label (an Entra ID upstream's come and go); passthrough: the
    client's own credential goes up."""

    settings: Settings
    clock: Clock
    upstreams: tuple[Upstream, ...]
    pool: KeyPool
    credentials: dict[str, tuple[tuple[str, str], ...]]
    retry_policy: RetryPolicy
    admission: AdmissionQueue
    store: TieredStore | None
    object_owners: ObjectOwners
    masker: SecretMasker
    passthrough: bool
    runs: RunRegistry
    budgets: Budgets
    locks: LockStore | None = None
    receipts: Receipts = field(default_factory=Receipts)
    addresses: tuple[UpstreamAddress, ...] = ()
    clients: ClientLimits = field(default_factory=lambda: ClientLimits({}))
    limiter: SharedLimits | None = None
    calibration: TokenCalibration = field(default_factory=TokenCalibration)
    counters: UpstreamCounters = field(default_factory=UpstreamCounters)
    _identities: dict[str, str] = field(default_factory=dict)

    def serving(self, model: str) -> list[Upstream]:
        """Return the upstreams that serve `model`."""
        return [
            self.upstreams[index] for index in {key.upstream for group in self.pool.serving(model) for key in group}
        ]

    def identity(self, model: str) -> str:
        """What stands in the cache key for all upstreams that serve `model`."""
        found = self._identities.get(model)
        if found is None:
            found = "\n".join(sorted({upstream.identity(model) for upstream in self.serving(model)}))
            if len(self._identities) >= 4096:
                self._identities.clear()
            self._identities[model] = found
        return found

    @property
    def replays(self) -> bool:
        """Nothing goes upstream: answers come from what was recorded, whatever its age and whosever it was."""
        return self.settings.cache.mode == "replay"

    async def reserve_client(self, client: Client, tokens: int) -> ClientReservation | None:
        """A hold of the client's own limits for a request of `tokens`. Raises ProxyError(client_limit …)."""
        hold = self.clients.reserve(client, tokens, self.clock.monotonic())
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
            hold = self.clients.reserve(client, tokens, self.clock.monotonic())
        return hold

    def record_outcome(
        self, key: UpstreamKey, model: str, outcome: OutcomeKind, wait: float, reason: str, floor: int = 0
    ) -> None:
        """Takes note of what an answer teaches of a key, and lets other proxies know."""
        now = self.clock.monotonic()
        self.pool.record_outcome(key, model, outcome, now, wait, reason, floor)
        if self.limiter is not None:
            states = self.pool.active_states(key.label, model, now)
            told = {
                slot: (state.status.value, state.until - now, state.reason)
                for slot, state in states.items()
                if not state.floor
            }
            self.limiter.publish_key_state(key.label, model, told)

    def apply_remote_state(self, label: str, model: str, status: str, wait: float, reason: str) -> None:
        """Takes over what another proxy has learned of a key."""
        self.pool.apply_remote_state(label, model, status, self.clock.monotonic(), wait, reason)

    def upstream_named(self, name: str) -> Upstream | None:
        return next((upstream for upstream in self.upstreams if upstream.address.name == name), None)

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


def build_services(
    settings: Settings, seams: Clock, old: Services | None = None, commons: Coordination | None = None
) -> Services:
    """The machinery for `settings`. Reads no file and opens nothing.

    old: the world it takes the place of, from which it has the store, the waiting room, the receipts, what is known
    of keys that stay, and what counts against limits. commons: where there is no old one, of one of several workers.
    """
    upstreams, keys, secrets = [], [], []
    credentials: dict[str, tuple[tuple[str, str], ...]] = {}
    for index, spec in enumerate(settings.upstreams):
        site = UpstreamAddress(spec.name, spec.kind, spec.base_url, spec.api_version, spec.deployments)
        dialect = PROVIDERS[spec.kind]
        prices = PriceTable({**settings.cost.prices, **spec.prices})
        before = old.upstream_named(spec.name) if old is not None else None
        same = before is not None and old is not None and old.settings.retry.budget == settings.retry.budget
        budget = before.budget if before is not None and same else RetryBudget(settings.retry.budget)
        trip = BreakerLimits(settings.breaker.failures, settings.breaker.window, settings.breaker.open_for)
        breaker = before.breaker if before is not None and before.breaker.trip == trip else CircuitBreaker(trip)
        upstreams.append(Upstream(site, dialect, prices, budget, spec.cache_as, breaker))
        for key in spec.keys:
            secret = key.secret.reveal()
            secrets.append(secret)
            limits = settings.limits_of(spec, key) if settings.throttle.tier else key.limits
            credentials[key.label] = dialect.auth(secret, key.organization, key.project)
            keys.append(UpstreamKey(key.label, index, spec.models, spec.priority, key.quota, limits, key.weight))
        if spec.entra_id:
            keys.append(UpstreamKey(spec.name, index, spec.models, spec.priority))
        elif not spec.keys:
            label = CLIENTS_KEY if settings.passthrough and len(settings.upstreams) == 1 else spec.name
            credentials[label] = ()
            limits = settings.limits_of(spec) if settings.throttle.tier else {}
            keys.append(UpstreamKey(label, index, spec.models, spec.priority, limits=limits))
    retry = settings.retry
    limiter = _limiter(settings, seams, commons) if old is None else old.limiter
    make = limiter.rate_limiter if limiter is not None else None
    ring = KeyPool(
        keys,
        STRATEGIES[settings.selection],
        settings.throttle.limits,
        settings.throttle.use,
        make=make,
        breakers=[upstream.breaker for upstream in upstreams],
        learned=UpstreamLimits() if settings.throttle.adaptive else None,
    )
    gate = AdmissionQueue(settings.throttle.max_queue, seams.monotonic, recheck=RECHECK if limiter else math.inf)
    clients = ClientLimits({key.name: key.limits for key in settings.server.client_keys}, make)
    if old is not None:
        unchanged = {label for label, headers in credentials.items() if old.credentials.get(label) == headers}
        ring.inherit(old.pool, unchanged, seams.monotonic())
        clients.inherit(old.clients)
        old.budgets.apply_settings(settings)
        gate = old.admission
        gate.max_queue = settings.throttle.max_queue
        for spec in settings.upstreams:
            if spec.entra_id and spec.name in old.credentials:
                credentials[spec.name] = old.credentials[spec.name]
    store = build_store(settings, seams) if old is None else old.store
    budgets = _budgets(settings, seams, commons) if old is None else old.budgets
    return Services(
        settings=settings,
        clock=seams,
        upstreams=tuple(upstreams),
        pool=ring,
        credentials=credentials,
        retry_policy=RetryPolicy(retry.max_retries, retry.base_delay, retry.max_delay, retry.jitter, retry.ambiguous),
        admission=gate,
        store=store,
        object_owners=ObjectOwners(seams.wall, _shared_owners(settings, len(keys), commons))
        if old is None
        else old.object_owners,
        masker=SecretMasker(secrets),
        passthrough=settings.passthrough,
        runs=_runs(settings, seams, store, commons) if old is None else old.runs,
        budgets=budgets,
        locks=_lock_store(settings, store) if old is None else old.locks,
        clients=clients,
        limiter=limiter,
        calibration=TokenCalibration() if old is None else old.calibration,
        addresses=tuple(upstream.address for upstream in upstreams),
        receipts=Receipts() if old is None else old.receipts,
        counters=UpstreamCounters() if old is None else old.counters,
    )


def _limiter(settings: Settings, seams: Clock, commons: Coordination | None) -> SharedLimits | None:
    """Where limits are counted for several processes; None: here, in memory."""
    if settings.throttle.backend != "redis" or settings.redis.url is None:
        return commons.limiter if commons is not None else None
    from .upstream.limits.redis import RedisLimits

    return RedisLimits(settings.redis.url.reveal(), settings.redis.prefix, seams.new_id(), seams.monotonic)


def _budgets(settings: Settings, seams: Clock, commons: Coordination | None) -> Budgets:
    """Shared where limits are."""
    if settings.throttle.backend != "redis" or settings.redis.url is None:
        return Budgets(settings, seams, commons.budgets if commons is not None else None)
    from .accounting.budgets.redis import RedisBudgets

    return Budgets(settings, seams, RedisBudgets(settings.redis.url.reveal(), settings.redis.prefix, seams.new_id()))


def _lock_store(settings: Settings, store: TieredStore | None) -> LockStore | None:
    """What keeps processes that share the cache from buying the same twice; over the cache's own link."""
    if store is None or settings.cache.backend != "redis":
        return None
    from .cache.stores.redis import DEADLINE, RedisStore
    from .pipeline.coalescing.redis_lock import RedisLockStore

    if not isinstance(store.slower, RedisStore):
        return None
    return RedisLockStore(store.slower.link, settings.redis.prefix, DEADLINE)


def _shared_owners(settings: Settings, keys: int, commons: Coordination | None) -> SharedOwners | None:
    """Redis, where something else of ours is in it already and there is more than one key to choose from."""
    if keys < 2 or settings.redis.url is None or "redis" not in (settings.cache.backend, settings.throttle.backend):
        return commons.owners if commons is not None else None
    from .upstream.keys.redis_owners import RedisOwners

    return RedisOwners(settings.redis.url.reveal(), settings.redis.prefix)


def _runs(settings: Settings, seams: Clock, store: TieredStore | None, commons: Coordination | None) -> RunRegistry:
    """Named runs, shared where a Redis is configured; over the cache's link where it has one."""
    if settings.redis.url is None or "redis" not in (settings.cache.backend, settings.throttle.backend):
        return RunRegistry(seams, commons.runs if commons is not None else None)
    from .accounting.runs.redis import RedisRuns
    from .cache.stores.redis import DEADLINE, RedisStore
    from .system.redis import RedisConnection

    slower = store.slower if store is not None else None
    if isinstance(slower, RedisStore):
        return RunRegistry(seams, RedisRuns(slower.link, settings.redis.prefix, seams.wall, borrowed=True))
    link = RedisConnection(settings.redis.url.reveal(), DEADLINE)
    return RunRegistry(seams, RedisRuns(link, settings.redis.prefix, seams.wall))


def partition_of_credential(scheme: str, token: str, *parts: str) -> str:
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
