"""`Coalescer`: identical requests at the same time share one upstream request.

`single_flight` decides which request goes upstream and which wait; `broadcast` lets one stream flow to several clients.
Here each of them gets its own reply: with its own id, receipt, options, usage chunk and savings.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import replace
from decimal import Decimal
from functools import partial
from typing import Any, Final

import msgspec

from ...cache.embeddings import Savings
from ...cache.lookup import CacheHit, ResponseCache
from ...cache.plan import CachePlan
from ...config.settings import Settings
from ...cost.pricing import Cost
from ...cost.usage import usage_of
from ...protocol.errors import ProxyError
from ...protocol.request import ProxyRequest
from ...system.clock import Clock
from ...upstream.deadline import SharedDeadline
from ...upstream.progress import AttemptLog
from ..fetch import Fetcher
from ..recorder import Recorder, RequestContext
from ..relay import ClientFilter, StreamEnd, StreamRelay, with_comment
from ..response_headers import cost_comment, cost_headers
from .broadcast import Broadcast, SubscriberStream
from .cross_process import CrossProcessFlight, FetchLock
from .flight_keys import FlightKeys
from .hit_for_miss import FlightKey, HitForMiss
from .reply import Charge, Failure, Reply, SharedReply
from .single_flight import FlightResult, Sharing, SingleFlight, Waiter

Value = SharedReply | Failure | CacheHit
"""What a flight brings. A hit: another process has fetched and stored it meanwhile."""

FREE: Final = Cost(Decimal(0), "exact")

_RETRYABLE: Final = frozenset(
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
"""Errors that another request, with its own time, retries and client, may not meet."""


class Coalescer:
    """Fetches responses, if possible for several requests at once. cross_process: None if no other process shares."""

    def __init__(
        self,
        fetcher: Fetcher,
        cache: ResponseCache,
        recorder: Recorder,
        *,
        flight_keys: FlightKeys,
        hit_for_miss: HitForMiss,
        cross_process: CrossProcessFlight | None,
        settings: Settings,
        clock: Clock,
    ) -> None:
        self._fetcher = fetcher
        self._cache = cache
        self._recorder = recorder
        self._keys = flight_keys
        self._hit_for_miss = hit_for_miss
        self._cross_process = cross_process
        self._stream_comment = settings.cost.stream_comment
        self._max_entry = settings.cache.max_entry
        self._clock = clock
        reads_on = settings.cache.on_disconnect == "finish"
        self.flights: SingleFlight[Value] = SingleFlight(clock.monotonic, hit_for_miss, reads_on)

    async def fetch(self, request: ProxyRequest, plan: CachePlan) -> Reply | Failure:
        """Return the reply, fetched alone or together with identical requests. Its receipt is still to be finished."""
        keys = self._keys.of(request, plan)
        observed = self._keys.observed(request, plan) if self.flights and keys else ()
        while keys:
            lead = partial(self._lead, request, plan)
            max_wait = min(request.arrived + request.max_wait, request.act_until)
            waiter = self.flights.join(keys, lead, request.deadline, max_wait, observed, request.act_until)
            if waiter is None:
                break
            outcome = await self._together(request, plan, waiter)
            if outcome is not None:
                return outcome
            if not waiter.observer:
                break
            observed = ()  # it has waited for one of them, and in vain
        attempt_log = AttemptLog(SharedDeadline(request.deadline, self._clock.monotonic, request.act_until))
        alone = await self._fetcher.fetch(request, plan, attempt_log)
        return alone if isinstance(alone, Failure) else alone.reply

    async def _together(self, request: ProxyRequest, plan: CachePlan, waiter: Waiter[Value]) -> Reply | Failure | None:
        """Return what the flight brings; None: nothing that this request could take."""
        streams = False
        try:
            result = await waiter.result()
            value = None if result is None else result.value
            if isinstance(value, SharedReply) and value.broadcast is not None:
                if waiter.led or _suits(request, value):
                    streams = True
                    return self._subscribed(request, plan, waiter, value, value.broadcast)
                return None
            if value is None or isinstance(value, CacheHit):
                if isinstance(value, CacheHit) and waiter.led:
                    return self._found(request, plan, waiter, value)
                hit, _ = await self._cache.lookup(request, plan)
                return None if hit is None else self._found(request, plan, waiter, hit)
        except ProxyError as error:
            return self._gave_up(request, plan, waiter, error)
        except asyncio.CancelledError:
            self._left(request, plan, waiter)
            await waiter.flight.ended()
            raise
        finally:
            if not streams:
                waiter.leave()
        if not waiter.led:
            return self._follower_reply(request, plan, waiter, value) if _suits(request, value) else None
        return value if isinstance(value, Failure) else value.reply

    # -- the request that goes upstream -------------------------------------------------------------------------------

    async def _lead(self, request: ProxyRequest, plan: CachePlan, waiter: Waiter[Value]) -> FlightResult[Value]:
        """Fetch for all who wait. The cost is in this request's receipt, even if its client has left."""
        if self._cross_process is None or not plan.read:
            return await self._fetch(request, plan, waiter)
        key = self._keys.of(request, plan)[0]
        try:
            lock = await self._cross_process.acquire(request, plan, key, waiter.attempt_log)
        except asyncio.CancelledError:
            context = RequestContext(request, plan, waiter.attempt_log, Charge(error="client_gone"))
            self._recorder.finish(self._recorder.receipt(context, 499))
            raise
        if isinstance(lock, CacheHit):
            return FlightResult(lock, Sharing.SHARED)
        release = partial(self._release, lock, key)
        try:
            result = await self._fetch(request, plan, waiter)
        except BaseException:
            release()
            raise
        if result.rest is None:
            release()
            return result
        return msgspec.structs.replace(result, rest=partial(_then, result.rest, release))

    def _release(self, lock: FetchLock | None, key: FlightKey) -> None:
        if lock is not None:
            lock.end(avoid=key in self._hit_for_miss)

    async def _fetch(self, request: ProxyRequest, plan: CachePlan, waiter: Waiter[Value]) -> FlightResult[Value]:
        fetched = await self._fetcher.fetch(request, plan, waiter.attempt_log)
        receipt = fetched.receipt if isinstance(fetched, Failure) else fetched.reply.receipt
        unclaimed = partial(self._recorder.finish, receipt) if receipt is not None else None
        if isinstance(fetched, Failure):
            sharing = Sharing.RETRY if fetched.error.code in _RETRYABLE else Sharing.SHARED
            return FlightResult(fetched, sharing, unclaimed=unclaimed)
        stream, flight = fetched.reply.stream, waiter.flight
        if stream is None:
            return FlightResult(fetched, fetched.sharing, unclaimed=unclaimed)
        assert isinstance(stream, StreamRelay)
        if fetched.sharing is not Sharing.SHARED:
            return FlightResult(fetched, fetched.sharing, drop=stream.client_left)
        client_filter, stream.client_filter, stream.quiet = stream.client_filter, ClientFilter(False, None), True
        broadcast = Broadcast(stream, self._max_entry, flight.close, flight.all_taken, lambda: flight.for_cache_only)
        flight.emptied = broadcast.go_on
        shared = msgspec.structs.replace(fetched, broadcast=broadcast, client_filter=client_filter)
        return FlightResult(shared, Sharing.SHARED, rest=broadcast.record, drop=stream.cancel)

    # -- requests that end before the flight --------------------------------------------------------------------------

    def _gave_up(self, request: ProxyRequest, plan: CachePlan, waiter: Waiter[Value], error: ProxyError) -> Failure:
        """Return the failure of a request whose own time is over."""
        context = self._context(request, plan, waiter, Charge(error=error.code))
        receipt = (
            None if self._goes_on(waiter, error.status, error.code) else self._recorder.receipt(context, error.status)
        )
        return Failure(error.copy(self._recorder.headers(context)), receipt)

    def _left(self, request: ProxyRequest, plan: CachePlan, waiter: Waiter[Value]) -> None:
        """Finish the receipt of a request whose client has left."""
        if not self._goes_on(waiter, 499, "client_gone"):
            context = self._context(request, plan, waiter, Charge(error="client_gone"))
            self._recorder.finish(self._recorder.receipt(context, 499))
        waiter.leave()

    def _goes_on(self, waiter: Waiter[Value], status: int, error: str) -> bool:
        """Whether the request was sent upstream itself: then the fetch ends with its receipt, under this status."""
        if waiter.led and not waiter.flight.over:
            waiter.attempt_log.client_left = status, error
        return waiter.led

    def _context(self, request: ProxyRequest, plan: CachePlan, waiter: Waiter[Value], charge: Charge) -> RequestContext:
        if not waiter.led:
            plan = msgspec.structs.replace(plan, collapsed=True)
        return RequestContext(request, plan, waiter.attempt_log, charge)

    # -- requests that share ------------------------------------------------------------------------------------------

    def _shared_context(
        self, request: ProxyRequest, plan: CachePlan, waiter: Waiter[Value], charge: Charge
    ) -> RequestContext:
        """Return the context of a request that another one's fetch answers."""
        waited = (self._clock.monotonic() - request.arrived) * 1000
        attempt_log = replace(waiter.attempt_log, upstream_ms=waited)
        return RequestContext(request, msgspec.structs.replace(plan, collapsed=True), attempt_log, charge)

    def _follower_reply(
        self, request: ProxyRequest, plan: CachePlan, waiter: Waiter[Value], value: SharedReply | Failure
    ) -> Reply | Failure:
        """Return what a whole reply or a failure is for a request that shares it."""
        recorder = self._recorder
        if isinstance(value, Failure):
            context = self._shared_context(request, plan, waiter, Charge(error=value.error.code))
            receipt = recorder.receipt(context, value.error.status)
            return Failure(value.error.copy(recorder.headers(context)), receipt)
        charge, reply = value.charge, value.reply
        savings = charge.saved_by_sharing()
        shared = Charge(charge.usage, FREE, charge.answer_model, charge.error, savings)
        context = self._shared_context(request, plan, waiter, shared)
        proxy_headers = recorder.headers(context, cost_headers(FREE, charge.usage, savings)) + value.common_headers
        receipt = recorder.receipt(context, reply.status)
        return Reply(reply.status, reply.reason, reply.headers, proxy_headers, reply.body, receipt=receipt)

    def _found(self, request: ProxyRequest, plan: CachePlan, waiter: Waiter[Value], hit: CacheHit) -> Reply:
        """Return the reply made of what another process fetched, or what was fetched in the other form."""
        entry = hit.entry
        savings = Savings(None, entry.cost, estimated=False)
        charge = Charge(entry.usage, FREE, entry.answer_model, savings=savings)
        context = self._shared_context(request, plan, waiter, charge)
        receipt = self._recorder.receipt(context, entry.status)
        proxy_headers = self._recorder.headers(context, cost_headers(FREE, entry.usage, savings))
        body = hit.body
        if self._wants_comment(request):
            body = with_comment(body, cost_comment(FREE, entry.usage))
        return Reply(entry.status, "", entry.headers, proxy_headers, body, receipt=receipt)

    def _subscribed(
        self, request: ProxyRequest, plan: CachePlan, waiter: Waiter[Value], value: SharedReply, broadcast: Broadcast
    ) -> Reply:
        """Return a running stream, from its first byte on, as this client asked for it."""
        reply = value.reply
        if waiter.led:
            assert value.client_filter is not None
            stream = SubscriberStream(broadcast, value.client_filter, partial(self._leader_done, value, waiter))
            return msgspec.structs.replace(reply, stream=stream)
        charge = Charge(cost=FREE)
        context = self._shared_context(request, plan, waiter, charge)
        context.attempt_log.first_byte_ms = context.attempt_log.upstream_ms
        comment = partial(_free_comment, request.endpoint, broadcast) if self._wants_comment(request) else None
        client_filter = ClientFilter(value.usage_asked and not request.wants_usage, comment)
        done = partial(self._follower_done, context, waiter, value)
        stream = SubscriberStream(broadcast, client_filter, done)
        proxy_headers = self._recorder.headers(context, cost_headers(FREE, None)) + value.common_headers
        return Reply(reply.status, reply.reason, reply.headers, proxy_headers, stream=stream, charge=charge)

    def _leader_done(self, value: SharedReply, waiter: Waiter[Value], end: StreamEnd) -> None:
        if (end.client_left or end.failure) and not waiter.flight.over:
            waiter.attempt_log.client_left = _status(end, value)
        waiter.leave()

    def _follower_done(
        self, context: RequestContext, waiter: Waiter[Value], value: SharedReply, end: StreamEnd
    ) -> None:
        charge = context.charge
        status, charge.error = _status(end, value)
        charge.usage, charge.answer_model = value.charge.usage, value.charge.answer_model
        charge.savings = value.charge.saved_by_sharing()
        self._recorder.finish(self._recorder.receipt(context, status))
        waiter.leave()

    def _wants_comment(self, request: ProxyRequest) -> bool:
        return request.stream and (request.options.stream_cost or self._stream_comment)


def _suits(request: ProxyRequest, value: SharedReply | Failure) -> bool:
    """Whether the reply to another request is one to this: it may be shared, and has the usage chunk if wanted."""
    if isinstance(value, Failure):
        return True
    if value.reply.body is not None:
        return value.sharing is not Sharing.PRIVATE
    return value.broadcast is not None and (value.usage_asked or not request.wants_usage)


def _status(end: StreamEnd, value: SharedReply) -> tuple[int, str]:
    return (499, "client_gone") if end.client_left else (value.reply.status, end.failure)


def _free_comment(endpoint: str, broadcast: Broadcast) -> bytes:
    audit = broadcast.stream.audit
    return cost_comment(FREE, usage_of(endpoint, {"usage": audit.usage}) if audit is not None else None)


async def _then(rest: Callable[[], Coroutine[Any, Any, None]], done: Callable[[], None]) -> None:
    try:
        await rest()
    finally:
        done()
