"""Equal requests at the same time: one buys, the others get the same for nothing (contract 7, Cache).

`flights` decides who buys and who waits, `reel` lets one stream flow to many; here it is said what may be shared at
all, and what each of those aboard gets to see: his own id, receipt, options and usage chunk, and the saving.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from decimal import Decimal
from functools import partial
from typing import Any, Final

import msgspec

from ...cache.lookup import CacheHit, ResponseCache, ttl_of
from ...cache.plan import CachePlan
from ...cost.pricing import Cost
from ...cost.usage import Usage, usage_of
from ...protocol.errors import ProxyError
from ...protocol.request import ProxyRequest
from ...services import Services
from ...upstream.deadline import SharedDeadline
from ...upstream.progress import AttemptLog
from ..recorder import Recorder
from ..relay import ClientFilter, StreamEnd, StreamRelay, with_comment
from ..response_headers import cost_comment, cost_lines
from .broadcast import Broadcast, SubscriberStream
from .cross_process import CrossProcessFlight, FetchLock
from .reply import Charge, Reply
from .single_flight import FlightKey, FlightResult, Sharing, SingleFlight, Waiter

Value = Reply | ProxyError | CacheHit
"""A flight's outcome; a hit: another process had bought it meanwhile."""

FREE: Final = Cost(Decimal(0), "exact")

_AGAIN: Final = frozenset(
    {
        "upstream_unreachable",
        "upstream_timeout",
        "upstream_invalid_response",
        "throttled",
        "queue_full",
        "keys_cooling",
        "client_limit",
        "budget_exceeded",
    }
)
"""Refusals that another request, with its own patience, retries and client, may be spared."""

_JSON: Final = "json"
_SSE: Final = "sse"
_BARE: Final = "sse without usage"

_NOTHING: Final = Charge()


Fetch = Callable[[ProxyRequest, CachePlan, AttemptLog], Awaitable[Reply]]
"""What the journey does for every request, shared or not."""


class Coalescer:
    """Buys in company where that is possible."""

    def __init__(self, services: Services, buy: Fetch, shelf: ResponseCache, tell: Recorder) -> None:
        cache = services.settings.cache
        self._services = services
        self._buy_alone = buy
        self._tell = tell
        self._shelf = shelf
        self._finish = cache.on_disconnect == "finish"
        self._coalesce = cache.coalesce
        leases = services.locks if cache.coalesce else None
        self._elsewhere = (
            CrossProcessFlight(leases, shelf, services.store, services.clock) if leases is not None else None
        )
        self.flights: SingleFlight[Value] = SingleFlight(services.clock.monotonic, self._finish)

    async def fetch(self, request: ProxyRequest, plan: CachePlan) -> Reply:
        """The answer, bought alone or together with whoever asks the same. Raises ProxyError."""
        names = self._names(request, plan)
        others = self._others(request, plan) if self.flights and names else ()
        while names:
            lead = partial(self._lead, request, plan)
            seat = self.flights.join(names, lead, request.deadline, request.arrived + request.max_wait, others)
            if seat is None:
                break
            shared = await self._together(request, plan, seat)
            if shared is not None:
                return shared
            if not seat.observer:
                break
            others = ()  # waited once, and in vain
        return await self._buy_alone(
            request, plan, AttemptLog(SharedDeadline(request.deadline, self._services.clock.monotonic))
        )

    async def _together(self, request: ProxyRequest, plan: CachePlan, seat: Waiter[Value]) -> Reply | None:
        """What the flight brings; None: nothing that this call could take. Raises ProxyError."""
        flowing = False
        try:
            landing = await seat.result()
            value = None if landing is None else landing.value
            if isinstance(value, Reply) and value.broadcast is not None:
                if seat.led or _suits(request, value):
                    flowing = True
                    return self._flowing(request, plan, seat, value, value.broadcast)
                return None
            if value is None or isinstance(value, CacheHit):
                if isinstance(value, CacheHit) and seat.led:
                    return self._found(request, plan, seat, value)
                return await self._visited(request, plan, seat)
        except ProxyError as refusal:
            self._resign(request, plan, seat, refusal.status, refusal.code)
            refusal.header_lines = self._tell.response_headers(request, _seen(plan, seat), seat.attempt_log, "", False)
            raise
        except asyncio.CancelledError:
            self._resign(request, plan, seat, 499, "client_gone")
            await seat.flight.ended()
            raise
        finally:
            if not flowing:
                seat.leave()
        if seat.led:
            if isinstance(value, ProxyError):
                raise value.copy(value.header_lines)
            return value
        return self._given(request, plan, seat, value) if _suits(request, value) else None

    def mark_uncacheable(self, request: ProxyRequest, plan: CachePlan) -> None:
        """Its answer could not be kept: for a while nobody waits for one like it."""
        self.flights.mark_uncacheable(self._names(request, plan))

    # -- what may be shared -------------------------------------------------------------------------------------------

    def _names(self, request: ProxyRequest, plan: CachePlan) -> tuple[FlightKey, ...]:
        """Under which names this call shares, its own first; none where it may not.

        Not shared: what is not read from the cache or not kept in it, for that is what its sender asked for. Streams
        share by whether the usage chunk is asked for upstream: with it, a stream serves those who want it and those
        who do not; without it, only the latter.
        """
        if not (plan.write and plan.key):
            return ()
        if ttl_of(self._services.settings.cache, request) <= 0:
            return ()
        if not (self._coalesce and plan.read):
            return ((plan.key, request.id),) if self._finish else ()  # a flight of its own, that can be read to its end
        if not request.stream:
            return ((plan.key, _JSON),)
        if request.wants_usage or request.endpoint == "responses":
            return ((plan.key, _SSE),)
        options = request.document.get("stream_options")
        says = isinstance(options, dict) and "include_usage" in options
        if self._services.settings.cost.stream_usage == "inject" and not says:
            return (plan.key, _SSE), (plan.key, _BARE)
        return (plan.key, _BARE), (plan.key, _SSE)

    def _others(self, request: ProxyRequest, plan: CachePlan) -> tuple[FlightKey, ...]:
        """Whose answer, once it is stored, may be had in this call's form, too."""
        if not (self._coalesce and plan.read) or (request.stream and request.endpoint == "responses"):
            return ()
        return ((plan.key, _JSON if request.stream else _SSE),)

    # -- the one who buys ---------------------------------------------------------------------------------------------

    async def _lead(self, request: ProxyRequest, plan: CachePlan, seat: Waiter[Value]) -> FlightResult[Value]:
        """Buys for everybody aboard. What it costs is in this call's receipt, even if its client has left."""
        if self._elsewhere is None or not plan.read:
            return await self._fetch(request, plan, seat)
        name = self._names(request, plan)[0]
        try:
            claim = await self._elsewhere.acquire(request, plan, name, seat.attempt_log)
        except asyncio.CancelledError:
            self._tell.record(request, plan, seat.attempt_log, 499, error="client_gone")
            raise
        if isinstance(claim, CacheHit):
            return FlightResult(claim, Sharing.SHARED)
        done = partial(self._fetched_here, claim, name)
        try:
            landing = await self._fetch(request, plan, seat)
        except BaseException:
            done()
            raise
        if landing.rest is None:
            done()
            return landing
        return msgspec.structs.replace(landing, rest=partial(_then, landing.rest, done))

    def _fetched_here(self, claim: FetchLock | None, name: FlightKey) -> None:
        if claim is not None:
            claim.end(avoid=self.flights.is_hit_for_miss(name))

    async def _fetch(self, request: ProxyRequest, plan: CachePlan, seat: Waiter[Value]) -> FlightResult[Value]:
        try:
            bought = await self._buy_alone(request, plan, seat.attempt_log)
        except ProxyError as refusal:
            share = Sharing.RETRY if refusal.code in _AGAIN else Sharing.SHARED
            return FlightResult(refusal.copy(refusal.header_lines), share)
        flow, flight = bought.stream, seat.flight
        if flow is None:
            return FlightResult(bought, bought.share)
        assert isinstance(flow, StreamRelay)
        if bought.share is not Sharing.SHARED:
            return FlightResult(bought, bought.share, drop=flow.client_left)
        dress, flow.client_filter, flow.quiet = flow.client_filter, ClientFilter(False, None), True
        keep = self._services.settings.cache.max_entry
        reel = Broadcast(flow, keep, flight.close, flight.all_taken, lambda: flight.for_cache_only)
        flight.emptied = reel.go_on
        shared = msgspec.structs.replace(bought, broadcast=reel, client_filter=dress)
        return FlightResult(shared, Sharing.SHARED, rest=reel.record, drop=flow.cancel)

    def _resign(self, request: ProxyRequest, plan: CachePlan, seat: Waiter[Value], status: int, error: str) -> None:
        """Leaves before the end: the receipt is written now, or with the purchase where that is this call's."""
        if not seat.led:
            self._tell.record(request, _seen(plan, seat), seat.attempt_log, status, error=error)
        elif not seat.flight.over:
            seat.attempt_log.client_left = status, error
        seat.leave()

    # -- those who get it, too ----------------------------------------------------------------------------------------

    def _given(self, request: ProxyRequest, plan: CachePlan, seat: Waiter[Value], value: Reply | ProxyError) -> Reply:
        """Another's answer, whole. Raises ProxyError."""
        plan, attempt_log = self._waited(request, plan, seat)
        if isinstance(value, ProxyError):
            self._tell.record(request, plan, attempt_log, value.status, error=value.code)
            raise value.copy(self._tell.response_headers(request, plan, attempt_log, "", False))
        sale = value.charge or _NOTHING
        spared = sale.saved_by_sharing()
        self._tell.record(
            request,
            plan,
            attempt_log,
            value.status,
            usage=sale.usage,
            cost=FREE,
            savings=spared,
            answer_model=sale.answer_model,
            error=sale.error,
        )
        money = cost_lines(FREE, sale.usage, spared)
        return Reply(
            value.status,
            value.reason,
            value.headers,
            self._tell.response_headers(request, plan, attempt_log, money, False) + value.extra,
            value.body,
        )

    async def _visited(self, request: ProxyRequest, plan: CachePlan, seat: Waiter[Value]) -> Reply | None:
        """What the cache has now, in this call's form."""
        hit, _ = await self._shelf.lookup(request, plan)
        return None if hit is None else self._found(request, plan, seat, hit)

    def _found(self, request: ProxyRequest, plan: CachePlan, seat: Waiter[Value], hit: CacheHit) -> Reply:
        """What was bought by another process, or in the other form."""
        plan, attempt_log = self._waited(request, plan, seat)
        entry = hit.entry
        self._tell.record(
            request,
            plan,
            attempt_log,
            entry.status,
            usage=entry.usage,
            cost=FREE,
            saved=entry.cost,
            answer_model=entry.answer_model,
        )
        lines = self._tell.response_headers(request, plan, attempt_log, _saved_lines(entry.usage, entry.cost), False)
        body = hit.body
        if self._wants_comment(request):
            body = with_comment(body, cost_comment(FREE, entry.usage))
        return Reply(entry.status, "", entry.headers, lines, body)

    def _flowing(
        self, request: ProxyRequest, plan: CachePlan, seat: Waiter[Value], bought: Reply, reel: Broadcast
    ) -> Reply:
        """A running stream, from its first byte on, as this client asked for it."""
        if seat.led:
            assert bought.client_filter is not None
            view = SubscriberStream(reel, bought.client_filter, partial(self._leader_done, bought, seat))
            return msgspec.structs.replace(bought, stream=view, broadcast=None, client_filter=None)
        plan, attempt_log = self._waited(request, plan, seat)
        attempt_log.first_byte_ms = (self._services.clock.monotonic() - request.arrived) * 1000
        comment = partial(_free_comment, request.endpoint, reel) if self._wants_comment(request) else None
        dress = ClientFilter(bought.usage_asked and not request.wants_usage, comment)
        mine = Charge(cost=FREE)
        view = SubscriberStream(reel, dress, partial(self._done, request, plan, seat, bought, mine))
        lines = self._tell.response_headers(request, plan, attempt_log, cost_lines(FREE, None), False) + bought.extra
        return Reply(bought.status, bought.reason, bought.headers, lines, None, view, charge=mine)

    def _leader_done(self, bought: Reply, seat: Waiter[Value], ending: StreamEnd) -> None:
        if (ending.client_left or ending.failure) and not seat.flight.over:
            seat.attempt_log.client_left = _status(ending, bought)
        seat.leave()

    def _done(
        self,
        request: ProxyRequest,
        plan: CachePlan,
        seat: Waiter[Value],
        bought: Reply,
        mine: Charge,
        ending: StreamEnd,
    ) -> None:
        sale = bought.charge or _NOTHING
        status, error = _status(ending, bought)
        mine.usage, mine.savings = sale.usage, sale.saved_by_sharing()
        self._tell.record(
            request,
            plan,
            seat.attempt_log,
            status,
            usage=sale.usage,
            cost=FREE,
            savings=mine.savings,
            answer_model=sale.answer_model,
            error=error,
        )
        seat.leave()

    def _wants_comment(self, request: ProxyRequest) -> bool:
        return request.stream and (request.options.stream_cost or self._services.settings.cost.stream_comment)

    def _waited(self, request: ProxyRequest, plan: CachePlan, seat: Waiter[Value]) -> tuple[CachePlan, AttemptLog]:
        seat.attempt_log.upstream_ms = (self._services.clock.monotonic() - request.arrived) * 1000
        return msgspec.structs.replace(plan, collapsed=True), seat.attempt_log


def _seen(plan: CachePlan, seat: Waiter[Value]) -> CachePlan:
    return plan if seat.led else msgspec.structs.replace(plan, collapsed=True)


def _suits(request: ProxyRequest, value: Reply | ProxyError) -> bool:
    """Whether another's answer is one for this call: it may be given twice, and has the usage chunk where wanted."""
    if isinstance(value, ProxyError):
        return True
    if value.body is not None:
        return value.share is not Sharing.PRIVATE
    return value.broadcast is not None and (value.usage_asked or not request.wants_usage)


def _status(ending: StreamEnd, bought: Reply) -> tuple[int, str]:
    return (499, "client_gone") if ending.client_left else (bought.status, ending.failure)


def _saved_lines(usage: Usage | None, saved: str | None) -> str:
    money = cost_lines(FREE, usage)
    return money if saved is None else f"{money}X-Proxy-Cost-Saved-USD: {saved}\r\n"


def _free_comment(endpoint: str, reel: Broadcast) -> bytes:
    audit = reel.flow.audit
    return cost_comment(FREE, usage_of(endpoint, {"usage": audit.usage}) if audit is not None else None)


async def _then(rest: Callable[[], Coroutine[Any, Any, None]], done: Callable[[], None]) -> None:
    try:
        await rest()
    finally:
        done()
