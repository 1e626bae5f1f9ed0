"""A key with a share of its limits reserved: waited for, settled once, and what each outcome says of the key."""

from __future__ import annotations

from logging import INFO, WARNING

from ..accounting.budgets.account import BudgetReservation
from ..cost.pricing import Cost
from ..protocol.errors import ProxyError
from ..protocol.request import Client
from ..protocol.routes import printable
from ..system.clock import Clock
from ..system.state_changes import Change, state_changed
from .keys.lease import KeyRequest, Lease, NoKey, NotReady, UpstreamKey
from .keys.pool import KeyPool
from .keys.states import ANY_MODEL, KeyOutcome, StateChange, Status
from .limits.clients import ClientReservation
from .limits.queue import AdmissionQueue, QueueFull, TimedOut
from .limits.rate_limiter import Wait
from .limits.shared import SharedLimits
from .request import UpstreamRequest
from .retry.outcome import OutcomeKind


class KeyLease:
    """A key with a share of its limits reserved. Either `settle` or `cancel` is called, once.

    name: under which the request counts with this key.
    client_reservation, budget_reservation: what is reserved of the client's limits and of the budgets, if the
    response is still to be read; they end with the lease.
    """

    __slots__ = ("_leases", "_queue", "_reservation", "budget_reservation", "client_reservation", "key", "name")

    def __init__(self, leases: KeyLeases, lease: Lease, queue: str) -> None:
        self._leases = leases
        self._reservation = lease.reservation
        self._queue = queue
        self.key = lease.key
        self.name = lease.name
        self.client_reservation: ClientReservation | None = None
        self.budget_reservation: BudgetReservation | None = None

    def settle(self, tokens: int | None, cost: Cost | None = None) -> None:
        """The request was sent. tokens: used; None: as estimated. cost: None if it is unknown."""
        if self.budget_reservation is not None:
            self.budget_reservation.settle(cost.usd if cost is not None else None, self._leases.clock.wall())
        if self.client_reservation is not None:
            self.client_reservation.settle(tokens)
        if self._reservation is not None:
            self._reservation.settle(tokens)
            self._leases.admission.wake(self._queue)

    def cancel(self) -> None:
        """The request was never sent: nothing of it counts."""
        if self._reservation is not None:
            self._reservation.cancel()
            self._leases.admission.wake(self._queue)


class KeyLeases:
    """Leases keys of the pool, and records what responses tell of them.

    limiter: counts limits for several processes; None: they are counted here.
    pooled: the keys are the proxy's own, so that their states are recorded.
    """

    def __init__(
        self, pool: KeyPool, admission: AdmissionQueue, limiter: SharedLimits | None, clock: Clock, pooled: bool
    ) -> None:
        self.pool = pool
        self.admission = admission
        self._limiter = limiter
        self.clock = clock
        self.pooled = pooled

    def quota(self, client: Client) -> str | None:
        """Return the name under which limits count for a client with a credential of its own; None: the key's own."""
        return None if self.pooled else client.cache_partition or None

    async def acquire(self, request: UpstreamRequest, excluded: frozenset[str], wanted: KeyRequest) -> KeyLease:
        """Lease a key, after waiting for it if necessary. Raises ProxyError if there is none within the time.

        excluded: labels of keys that this request has failed with.
        """
        queue = request.queue
        if self._limiter is None and self.admission.is_empty(queue):
            now = self.clock.monotonic()
            found = self.pool.lease(request.model, request.tokens, excluded, now, request.quota, wanted)
            if isinstance(found, Lease):
                return KeyLease(self, found, queue)
        return await self._wait_for_key(request, excluded, wanted, queue)

    async def _wait_for_key(
        self, request: UpstreamRequest, excluded: frozenset[str], wanted: KeyRequest, queue: str
    ) -> KeyLease:
        """Wait in the queue of this name until a key can be leased. Raises ProxyError."""
        pool, clock, log = self.pool, self.clock, request.attempt_log
        why = "throttled"

        def ask(now: float) -> Lease | NoKey | Wait:
            nonlocal why
            answer = pool.lease(request.model, request.tokens, excluded, now, request.quota, wanted)
            if isinstance(answer, NotReady):
                why = answer.why
                return answer.wait
            return answer

        async def ask_everybody(now: float) -> Lease | NoKey | Wait:
            while True:
                answer = ask(now)
                if not isinstance(answer, Lease) or await self._confirmed(answer):
                    return answer
                now = clock.monotonic()

        began = clock.monotonic()
        max_wait = min(request.max_wait - log.queue_ms / 1000, log.deadline.act_until - began)
        try:
            found: Lease | NoKey = await self.admission.acquire(
                queue, ask if self._limiter is None else ask_everybody, max_wait, request.client.name
            )
        except TimedOut as error:
            raise _waited_too_long(why, request.model, error.retry_after) from None
        except QueueFull:
            message = f"{self.admission.max_queue} requests are waiting already"
            raise ProxyError("queue_full", message, retry_after=1.0) from None
        finally:
            log.queue_ms += (clock.monotonic() - began) * 1000
        if isinstance(found, NoKey):
            raise ProxyError(found.why, found.detail, retry_after=found.retry_after)
        return KeyLease(self, found, queue)

    async def _confirmed(self, lease: Lease) -> bool:
        """Whether the lease holds for the other processes too. If it does not, it is over."""
        assert self._limiter is not None
        try:
            return await self._limiter.confirm(lease.reservation, lease.key.label, lease.name)
        except BaseException:
            if lease.reservation is not None:
                lease.reservation.cancel()
            raise

    def record_outcome(
        self,
        request: UpstreamRequest,
        key: UpstreamKey,
        outcome: KeyOutcome,
    ) -> None:
        """Record what an outcome says of a key of the proxy's, and publish it to the other processes."""
        now, model = outcome.at, key.name_of(request.model, request.route.deployment or "")
        if not self.pooled or not (request.model_known or self._is_about_whole_key(key, outcome.kind, now)):
            return
        change = self.pool.record_outcome(key, model, outcome)
        if change is not None:
            log_key_change(key.label, change, self.clock)
        if self._limiter is not None:
            states = self.pool.active_states(key.label, model, now)
            shared = {
                slot: (state.status.value, state.until - now, state.reason)
                for slot, state in states.items()
                if not state.floor
            }
            self._limiter.publish_key_state(key.label, model, shared)

    def _is_about_whole_key(self, key: UpstreamKey, outcome: OutcomeKind, now: float) -> bool:
        """Whether an outcome on a route without a model says something of the key for every model.

        A good one shows that a rejected key is accepted again; it does not show that an exhausted one has quota again.
        """
        if outcome is OutcomeKind.OK:
            state = self.pool.state(key.label, "", now)
            return state is not None and state.status is Status.REJECTED
        return outcome in (OutcomeKind.UNAUTHORIZED, OutcomeKind.QUOTA, OutcomeKind.SCOPE)


def log_key_change(label: str, change: StateChange, clock: Clock, noticed_here: bool = True) -> None:
    """Count and log that a key has come into another state. noticed_here: as in `state_changed`."""
    state, model = change.status, "" if change.model == ANY_MODEL else printable(change.model, 60)
    text = f"key {label}{f' for {model}' if model else ''}: {state.value}"
    if change.reason:
        text += f" ({printable(change.reason, 120)})"
    if not noticed_here:
        text += ", as another process has noticed"
    until = clock.wall() + change.until - clock.monotonic() if state is not Status.READY else None
    level = INFO if state in (Status.READY, Status.COOLING) else WARNING
    state_changed(Change("key", label, state.value, text, level, until, about=model), noticed_here)


def _waited_too_long(why: str, model: str, seconds: float) -> ProxyError:
    """Return the error of a request that may not wait longer. seconds: until it might be served."""
    shown = f"{printable(model, 60)!r}, {seconds:.1f} s to go"
    if why == "keys_cooling":
        message = f"all keys that could serve this are cooling down ({shown})"
        return ProxyError("keys_cooling", message, retry_after=seconds)
    message = (
        f"throttle.limits leave no room within the time this request may wait ({shown}); "
        "throttle.max_wait or X-Proxy-Max-Wait let it wait longer"
    )
    return ProxyError("throttled", message, retry_after=seconds)
