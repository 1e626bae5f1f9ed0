"""Streamed responses: what the client gets of one, and what has to be done when it ends."""

from __future__ import annotations

from typing import Final

from ..cache.lookup import NewEntry, ResponseCache
from ..cache.plan import CachePlan
from ..cache.stream_audit import StreamAudit
from ..config.settings import Settings
from ..cost.pricing import Cost
from ..cost.usage import Usage, usage_of
from ..protocol.headers import Raw
from ..protocol.request import ProxyRequest
from ..system.clock import Clock
from ..upstream.counters import UpstreamCounters
from ..upstream.estimates import Estimates
from ..upstream.reader import ResponseReader
from ..upstream.response import ResponseInHand
from ..upstream.retry.outcome import OutcomeKind
from .coalescing.flight_keys import FlightKeys
from .coalescing.hit_for_miss import HitForMiss
from .coalescing.reply import Reply, SharedReply
from .coalescing.single_flight import Sharing
from .recorder import Recorder, RequestContext
from .relay import ClientFilter, StreamEnd, StreamRelay
from .response_headers import Pairs, cost_comment

RETRYABLE: Final = frozenset({OutcomeKind.RETRY, OutcomeKind.RATE_LIMITED})
"""Upstream errors that another attempt, for another client that waits, may not meet."""

_PENDING: Final[Pairs] = (("X-Proxy-Cost-Status", "pending"),)


class StreamReplies:
    """Makes replies of streamed responses, and finishes them when they end."""

    def __init__(
        self,
        reader: ResponseReader,
        cache: ResponseCache,
        recorder: Recorder,
        *,
        estimates: Estimates,
        flight_keys: FlightKeys,
        hit_for_miss: HitForMiss,
        counters: UpstreamCounters,
        settings: Settings,
        clock: Clock,
    ) -> None:
        self.reader = reader
        self.cache = cache
        self.recorder = recorder
        self.estimates = estimates
        self.clock = clock
        self._flight_keys = flight_keys
        self._hit_for_miss = hit_for_miss
        self._counters = counters
        self._stream_comment = settings.cost.stream_comment
        self._max_entry = settings.cache.max_entry

    def reply(self, context: RequestContext, response: ResponseInHand) -> SharedReply:
        """Return the reply that a good response begins. Its end settles, prices, stores and finishes the receipt."""
        request, plan, attempt_log, charge = context
        events = response.is_event_stream
        headers = self.reader.headers(response, without=b"x-should-retry" if attempt_log.spent else b"")
        attempt_log.first_byte_ms = (self.clock.monotonic() - request.arrived) * 1000
        outcome = StreamOutcome(self, context, response, headers)
        wants_comment = request.stream and (request.options.stream_cost or self._stream_comment)
        storable = plan.write and request.stream and response.status == 200 and not response.leaked
        stream = StreamRelay(
            response=response,
            audit=outcome.audit,
            keep=self._max_entry if storable else 0,
            client_filter=ClientFilter(
                response.injected and events, outcome.comment if wants_comment and events else None
            ),
            ended=outcome.ended,
        )
        if events:
            stream.watch = self.reader.watch(request, response)
            stream.read = self._counters.reads(self.clock.monotonic)
        sharing = Sharing.SHARED if storable and events else Sharing.PRIVATE
        if response.outcome in RETRYABLE:
            sharing = Sharing.RETRY
        elif sharing is Sharing.PRIVATE:
            self.mark_uncacheable(request, plan)
        common = attempt_log.retry_headers()
        proxy_headers = self.recorder.headers(context, _PENDING) + common
        reply = Reply(
            response.status,
            response.response.reason,
            headers,
            proxy_headers,
            stream=stream,
            charge=charge,
        )
        usage_asked = response.injected or request.wants_usage
        return SharedReply(reply, sharing, charge, common, usage_asked)

    def mark_uncacheable(self, request: ProxyRequest, plan: CachePlan) -> None:
        """For a while no request waits for another's response to the same, because it cannot be stored."""
        self._hit_for_miss.mark(self._flight_keys.of(request, plan))


class StreamOutcome:
    """What one stream has cost, and what becomes of it at its end. headers: of the upstream, for the client."""

    __slots__ = ("_context", "_headers", "_replies", "_response", "audit")

    def __init__(
        self, replies: StreamReplies, context: RequestContext, response: ResponseInHand, headers: list[Raw]
    ) -> None:
        self._replies = replies
        self._context = context
        self._response = response
        self._headers = headers
        request = context.request
        self.audit = StreamAudit(request.endpoint, request.document) if response.is_event_stream else None

    def price(self, audit: StreamAudit) -> tuple[Usage | None, Cost | None]:
        """Return usage and cost as far as the stream has come, estimated if it does not say its usage."""
        request, _, attempt_log, _ = self._context
        upstream = self._response.upstream
        usage = usage_of(request.endpoint, audit.billed)
        if usage is not None:
            return usage, upstream.cost(request, audit.model, usage, audit.service_tier)
        if audit.error and not audit.text_bytes:
            return None, None
        # It was cut short, or the upstream does not say: the prompt and what was generated so far are estimated.
        usage = self._replies.estimates.used(request, attempt_log.size, audit.text_bytes)
        cost = upstream.cost(request, audit.model, usage, audit.service_tier)
        return (usage, Cost(cost.usd, "estimated")) if cost is not None else (None, None)

    def comment(self) -> bytes:
        """Return the SSE comment with the cost."""
        assert self.audit is not None
        usage, cost = self.price(self.audit)
        return cost_comment(cost, usage)

    def ended(self, end: StreamEnd) -> None:
        """Settle, price and store the stream, and finish its receipt."""
        replies, response, audit = self._replies, self._response, self.audit
        request, plan, attempt_log, charge = self._context
        attempt_log.upstream_ms = (replies.clock.monotonic() - response.sent_at) * 1000
        said: Usage | None = None
        if audit is not None:
            charge.usage, charge.cost = self.price(audit)
            charge.answer_model = audit.model
            said = charge.usage if audit.usage is not None else None
        response.lease.settle(said.total_tokens if said else None, charge.cost)
        replies.estimates.record(request, attempt_log.size, said)
        stored = self._store(end, said)
        if not (stored or end.failure or end.client_left or (audit is not None and audit.error)):
            replies.mark_uncacheable(request, plan)
        charge.error = end.failure or ("client_gone" if end.client_left else "")
        status = 499 if end.client_left else response.status
        replies.recorder.finish(replies.recorder.receipt(self._context, status))

    def _store(self, end: StreamEnd, said: Usage | None) -> bool:
        """Store the stream if it is complete. said: the usage it named. Returns whether it was stored."""
        replies, response, audit = self._replies, self._response, self.audit
        request, plan, _, charge = self._context
        if end.why is not None or end.body is None or replies.reader.leaks(end.body):
            return False
        cost = charge.cost if said is not None else None
        new = NewEntry(response.status, self._headers, said, cost, charge.answer_model, response.injected)
        span = audit.usage_span if audit is not None else None
        return replies.cache.store(request, plan, new, end.body, span)
