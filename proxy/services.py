"""`Services`: the settings, compiled once into what a running proxy uses. A reload swaps the whole value."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from logging import INFO, WARNING

from .accounting.budgets.budgets import Budgets
from .accounting.receipt import Receipts
from .accounting.runs.registry import RunRegistry
from .cache.planner import Planner
from .cache.stores.build import build_store
from .cache.stores.tiered import TieredStore
from .config.limits import Limits
from .config.settings import Settings, UpstreamSettings
from .coordination import NO_COORDINATION, Coordination, over_redis
from .cost.pricing import PriceTable, seller_of
from .protocol.masking import SecretMasker
from .protocol.routes import Shape
from .system.clock import Clock
from .system.state_changes import Change, state_changed
from .upstream.attempt import AttemptRunner
from .upstream.counters import UpstreamCounters
from .upstream.credentials import Credentials
from .upstream.endpoint_sender import EndpointSender
from .upstream.estimates import Estimates
from .upstream.interfaces import UpstreamTransport
from .upstream.key_lease import KeyLeases, log_key_change
from .upstream.keys.lease import UpstreamKey
from .upstream.keys.object_owners import ObjectOwners
from .upstream.keys.owner_table import maker_of
from .upstream.keys.pool import KeyPool, KeyState, Status
from .upstream.keys.selection import STRATEGIES
from .upstream.limits.calibration import TokenCalibration
from .upstream.limits.clients import ClientLimits
from .upstream.limits.learned import UpstreamLimits
from .upstream.limits.queue import AdmissionQueue
from .upstream.limits.shared import RECHECK, SharedLimits
from .upstream.providers.interface import UpstreamAddress
from .upstream.providers.registry import PROVIDERS
from .upstream.reservations import Reservations
from .upstream.retry.circuit_breaker import CircuitBreaker, State
from .upstream.retry.policy import RetryBudget
from .upstream.sender import RetryingSender
from .upstream.target import CLIENTS_KEY, Upstream

CredentialHeaders = dict[str, tuple[tuple[str, str], ...]]
"""Headers that carry a pool key, by the key's label."""


@dataclass(slots=True)
class Services:
    """The compiled settings.

    credentials: those of an Entra ID upstream come and go.
    passthrough: the client's own credential goes upstream.
    """

    settings: Settings
    clock: Clock
    upstreams: tuple[Upstream, ...]
    pool: KeyPool
    credentials: CredentialHeaders
    admission: AdmissionQueue
    store: TieredStore
    planner: Planner
    object_owners: ObjectOwners
    masker: SecretMasker
    passthrough: bool
    runs: RunRegistry
    budgets: Budgets
    coordination: Coordination
    clients: ClientLimits
    calibration: TokenCalibration
    receipts: Receipts
    counters: UpstreamCounters
    identities: Identities

    @property
    def limiter(self) -> SharedLimits | None:
        """Limits that are counted together with other processes; None: in this process alone."""
        return self.coordination.limits

    @property
    def addresses(self) -> tuple[UpstreamAddress, ...]:
        return self.identities.addresses

    @property
    def replays(self) -> bool:
        """Whether nothing is sent upstream: responses come from what was recorded, of whatever age or client."""
        return self.settings.cache.mode == "replay"

    def apply_remote_state(self, label: str, model: str, status: str, wait: float, reason: str) -> None:
        """Take over what another process has learned of a key."""
        now = self.clock.monotonic()
        change = self.pool.apply_remote_state(label, model, KeyState(Status(status), now, now + wait, reason))
        if change is not None and self.pool.by_label(label) is not None:
            log_key_change(label, change, self.clock, noticed_here=False)

    def upstream_named(self, name: str) -> Upstream | None:
        return next((upstream for upstream in self.upstreams if upstream.address.name == name), None)

    def put_token(self, label: str, token: str) -> None:
        """Put a new Entra ID token in force for the upstream of this name."""
        before = [value.removeprefix("Bearer ") for _, value in self.credentials.get(label, ())]
        self.credentials[label] = (("Authorization", f"Bearer {token}"),)
        self.masker.add([token], instead_of=before)


class Identities:
    """Which upstreams serve a model, and what stands for them in the cache key."""

    def __init__(self, pool: KeyPool, upstreams: tuple[Upstream, ...]) -> None:
        self._pool = pool
        self._upstreams = upstreams
        self._known: dict[tuple[str, Shape], str] = {}
        self.addresses = tuple(upstream.address for upstream in upstreams)

    def serving(self, model: str) -> list[Upstream]:
        """Return the upstreams that serve `model`."""
        indexes = {key.upstream for group in self._pool.serving(model) for key in group}
        return [self._upstreams[index] for index in indexes]

    def of(self, model: str, shape: Shape) -> str:
        """Return what stands in the cache key for the upstreams that serve `model`; "" if none does.

        It is the first upstream of the lowest priority number, so that a further region or key empties no cache.
        """
        found = self._known.get((model, shape))
        if found is None:
            groups = self._pool.serving(model)
            found = self._upstreams[groups[0][0].upstream].identity(model, shape) if groups else ""
            if len(self._known) >= 4096:
                self._known.clear()
            self._known[model, shape] = found
        return found


def build_sender(services: Services, transport: UpstreamTransport) -> RetryingSender:
    """Return the sender of every route."""
    clock, pool, pooled = services.clock, services.pool, not services.passthrough
    leases = KeyLeases(pool, services.admission, services.limiter, clock, pooled)
    credentials = Credentials(services.credentials, of_client=services.passthrough, mask=services.masker.mask_text)
    first_byte = services.settings.timeouts.first_byte
    attempts = AttemptRunner(transport, credentials, pool, clock, first_byte, pooled)
    return RetryingSender(leases, attempts, services.upstreams, services.settings.retry, services.counters, clock)


def build_reservations(services: Services) -> Reservations:
    """Return what reserves limits of clients and budgets."""
    pool, clients, budgets = services.pool, services.clients, services.budgets

    def counted() -> bool:
        return pool.counts_tokens or clients.counts_tokens or budgets.active

    estimates = Estimates(services.calibration, services.identities.serving, counted)
    return Reservations(clients, budgets, estimates, services.limiter, services.clock)


def build_endpoint_sender(services: Services, sender: RetryingSender, reservations: Reservations) -> EndpointSender:
    """Return what sends the requests to the five endpoints."""
    settings = services.settings
    inject = settings.cost.stream_usage == "inject"
    return EndpointSender(sender, reservations, services.object_owners, settings.retry.fallbacks, stream_usage=inject)


def build_services(
    settings: Settings, clock: Clock, old: Services | None = None, coordination: Coordination = NO_COORDINATION
) -> Services:
    """Return the services for `settings`. It reads no file and opens nothing.

    old: the services in force. Their store, queue, receipts, what is known of keys that stay, and what counts against
    limits are taken over.
    coordination: the ports to other processes as far as the settings name no Redis; not used if there are old services.
    """
    upstreams = tuple([_build_upstream(settings, spec, clock, old) for spec in settings.upstreams])
    keys, credentials = _build_keys(settings)
    store = build_store(settings, clock) if old is None else old.store
    coordination = over_redis(settings, clock, store, coordination) if old is None else old.coordination
    limits = coordination.limits
    make = limits.rate_limiter if limits is not None else None
    pool = KeyPool(
        keys,
        STRATEGIES[settings.selection],
        settings.throttle.limits,
        settings.throttle.use,
        make_limiter=make,
        breakers=[upstream.breaker for upstream in upstreams],
        learned=UpstreamLimits() if settings.throttle.adaptive else None,
    )
    clients = ClientLimits({key.name: key.limits for key in settings.server.client_keys}, make)
    runs = RunRegistry(clock, coordination.runs) if old is None else old.runs
    identities = Identities(pool, upstreams)
    masker = SecretMasker([key.secret.reveal() for spec in settings.upstreams for key in spec.keys])
    max_queue = settings.throttle.max_queue
    recheck = RECHECK if limits is not None else math.inf
    services = Services(
        settings=settings,
        clock=clock,
        upstreams=upstreams,
        pool=pool,
        credentials=credentials,
        admission=AdmissionQueue(max_queue, clock.monotonic, recheck=recheck) if old is None else old.admission,
        store=store,
        planner=Planner(settings.cache, identity=identities.of, sample=runs.sample, masker=masker),
        object_owners=_build_owners(settings, clock, coordination, store) if old is None else old.object_owners,
        masker=masker,
        passthrough=settings.passthrough,
        runs=runs,
        budgets=Budgets(settings, clock, coordination.budgets) if old is None else old.budgets,
        coordination=coordination,
        clients=clients,
        calibration=TokenCalibration() if old is None else old.calibration,
        receipts=Receipts() if old is None else old.receipts,
        counters=UpstreamCounters() if old is None else old.counters,
        identities=identities,
    )
    if old is not None:
        _inherit(services, old)
    return services


def _build_owners(settings: Settings, clock: Clock, coordination: Coordination, store: TieredStore) -> ObjectOwners:
    """Return what remembers who made stored objects: in common with other processes, and beside ledger or cache."""
    from .upstream.keys.sqlite_owners import SQLiteOwners

    places = [] if coordination.owners is None else [coordination.owners]
    path = settings.ledger.path if settings.ledger.enabled else None
    if path is None and store.slower is not None and settings.cache.backend != "redis":
        path = settings.cache.path
    return ObjectOwners(clock.wall, places if path is None else [*places, SQLiteOwners(path, clock.wall)])


def _inherit(services: Services, old: Services) -> None:
    """Put the new settings in force in what was taken over, and take over what is known of keys and clients."""
    settings, credentials = services.settings, services.credentials
    unchanged = {label for label, headers in credentials.items() if old.credentials.get(label) == headers}
    services.pool.inherit(old.pool, unchanged, services.clock.monotonic())
    services.clients.inherit(old.clients)
    services.budgets.apply_settings(settings)
    services.admission.max_queue = settings.throttle.max_queue
    for spec in settings.upstreams:
        if spec.entra_id and spec.name in old.credentials:
            credentials[spec.name] = old.credentials[spec.name]


def _log_breaker(name: str, clock: Clock, state: State, wait: float, reason: str) -> None:
    """Count and log that an upstream's breaker has come into another state. wait: seconds that it lasts; 0: unknown."""
    text = f"breaker of {name}: {state}" + (f" ({reason})" if reason else "")
    until = clock.wall() + wait if wait else None
    level = WARNING if state == "open" else INFO
    state_changed(Change("breaker", name, state, text, level, until))


def _build_upstream(settings: Settings, spec: UpstreamSettings, clock: Clock, old: Services | None) -> Upstream:
    """Return one upstream; its retry budget and breaker are the old ones if their settings are the same."""
    before = old.upstream_named(spec.name) if old is not None else None
    budget, breaker = RetryBudget(settings.retry.budget), CircuitBreaker(settings.breaker)
    if before is not None and old is not None:
        if old.settings.retry.budget == settings.retry.budget:
            budget = before.budget
        if before.breaker.settings == settings.breaker:
            breaker = before.breaker
    breaker.on_change = partial(_log_breaker, spec.name, clock)
    address = UpstreamAddress(spec.name, spec.kind, spec.base_url, spec.api_version, spec.deployments)
    name, own = (spec.prices, {}) if isinstance(spec.prices, str) else (None, spec.prices)
    seller = seller_of(spec.kind, spec.base_url, pooled=spec.pooled, passthrough=settings.passthrough, prices=name)
    prices = PriceTable({**settings.cost.prices, **own})
    return Upstream(address, PROVIDERS[spec.kind], prices, seller, budget, spec.cache_as, breaker)


def _build_keys(settings: Settings) -> tuple[list[UpstreamKey], CredentialHeaders]:
    """Return the keys of all upstreams, and their credentials as far as they are known at the start."""
    keys: list[UpstreamKey] = []
    credentials: CredentialHeaders = {}
    for index, spec in enumerate(settings.upstreams):
        deployments = spec.deployments if spec.kind == "azure" else None
        for key in spec.keys:
            limits: Mapping[str, Limits] = settings.limits_of(spec, key) if settings.throttle.tier else key.limits
            credentials[key.label] = PROVIDERS[spec.kind].auth(key.secret.reveal(), key.organization, key.project)
            maker = maker_of(spec.base_url, key.secret.reveal(), key.organization or "", key.project or "")
            more = key.quota, limits, key.weight, maker, deployments
            keys.append(UpstreamKey(key.label, index, spec.models, spec.priority, *more))
        if spec.entra_id:
            maker = maker_of(spec.base_url)
            keys.append(UpstreamKey(spec.name, index, spec.models, spec.priority, maker=maker, deployments=deployments))
        elif not spec.keys:
            label = CLIENTS_KEY if settings.passthrough and len(settings.upstreams) == 1 else spec.name
            credentials[label] = ()
            limits = settings.limits_of(spec) if settings.throttle.tier else {}
            maker = maker_of(spec.base_url)
            keys.append(
                UpstreamKey(
                    label, index, spec.models, spec.priority, limits=limits, maker=maker, deployments=deployments
                )
            )
    return keys, credentials
