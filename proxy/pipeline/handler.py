"""The story of a request to one of the five endpoints, top to bottom.

`shelf.peek` is the short way: an answer from memory, found by the digest of the raw bytes, without parsing anything.
`serve` is the whole way: plan what the cache may do (`planning`), look (`shelf`), else buy the answer (`exchange`), and
either read it whole or let it flow (`relay`); then settle the limits, price it, keep it, and write the receipt. No
aiohttp, no redis, no sqlite here.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from decimal import Decimal
from typing import Any, Final

from msgspec.structs import replace

from ..accounting.receipt import Receipt
from ..accounting.runs.registry import run_headers, run_lines
from ..cache.completeness import plain_complete
from ..cache.embeddings import answer_body, in_order, read_answer, vectors_of
from ..cache.lookup import CacheHit, RequestDigest, ResponseCache
from ..cache.plan import CachePlan
from ..cache.stream_audit import StreamAudit
from ..cost.pricing import Cost
from ..cost.usage import NO_TOKENS, Usage, usage_of
from ..protocol.errors import ProxyError
from ..protocol.headers import Raw, downstream_headers
from ..protocol.json_parse import parse_leniently
from ..protocol.request import ProxyRequest
from ..services import Services
from ..system.threads import in_thread_if_large
from ..upstream.cost_estimate import max_cost_estimate
from ..upstream.endpoint_sender import EndpointSender
from ..upstream.limits.estimate import request_size
from ..upstream.progress import AttemptLog
from ..upstream.response import ReadAnswer, ResponseInHand
from ..upstream.retry.fallback import with_model
from ..upstream.retry.outcome import OutcomeKind, TransportFailure
from .coalescing.coalescer import Coalescer
from .coalescing.reply import Charge, Reply
from .coalescing.single_flight import Sharing
from .embeddings import SPILL_OF_ITEMS, EmbeddingsFetcher, new_entry
from .recorder import Recorder
from .relay import ClientFilter, StreamEnd, StreamRelay
from .response_headers import cost_comment, cost_lines
from .stale import BackgroundRevalidator, StaleFallback

log = logging.getLogger("proxy.request")

SPILL: Final = 64 * 1024 * 1024
"""A plain answer above this is no longer held to be understood: it flows through (bytes)."""


_RETRYABLE: Final = frozenset({OutcomeKind.RETRY, OutcomeKind.RATE_LIMITED})
"""Upstream errors that another try, on behalf of somebody else who waits, may be spared."""


class RequestHandler:
    """Serves calls in one world."""

    def __init__(self, services: Services, sender: EndpointSender, observe: Callable[[Receipt], None]) -> None:
        self.services = services
        self.recorder = Recorder(
            services.clock,
            services.clients,
            services.budgets,
            show_key=len(services.settings.server.client_keys) < 2,
            observers=(services.runs.finished, services.budgets.recorded, services.receipts.put, observe),
        )
        self.sender = sender
        self.planner = services.planner
        self.cache = ResponseCache(
            services.store,
            services.settings.cache,
            services.clock,
            identity=services.identities.of,
            mask=services.masker.mask_text,
        )
        self.coalescer = Coalescer(services, self.fetch_alone, self.cache, self.recorder)
        self.embeddings = EmbeddingsFetcher(self.sender, self.cache, services.masker, self._read)
        self.stale_fallback = StaleFallback(services, self.cache, self.coalescer.fetch, self.recorder.finish)
        self.recorder.held = self.stale_fallback.holds
        self.revalidator = BackgroundRevalidator(services, self.coalescer.fetch)

    async def handle(
        self, request: ProxyRequest, check_room: Callable[[], None], name: RequestDigest | None = None
    ) -> CacheHit | Reply:
        """The answer, from the cache or bought; counted where it is in a run. Raises ProxyError.

        check_room: asked before anything goes upstream, raises Refusal(overloaded); name: by which `shelf.peek` may
        find the answer when the same bytes come again.
        """
        runs = self.services.runs
        run = runs.enter(request)
        if run is None:
            return await self._handle(request, check_room, name)
        try:
            served = await self._handle(request, check_room, name)
        except BaseException as error:
            runs.abandoned(request, gone=isinstance(error, asyncio.CancelledError))
            if isinstance(error, ProxyError):
                error.headers = (*error.headers, *run_headers(run))
            raise
        if isinstance(served, CacheHit):
            runs.hit(request, served.entry)
            return replace(served, headers=run_headers(run), run=run.name)
        return replace(served, lines=served.lines + run_lines(run))

    async def _handle(
        self, request: ProxyRequest, check_room: Callable[[], None], name: RequestDigest | None
    ) -> CacheHit | Reply:
        plan = await self.planner.plan(request)
        hit, plan = await self.cache.lookup(request, plan)
        if name is not None:
            self.cache.memoize(name, request, plan)
        if hit is not None:
            if hit.stale:
                self.stale_fallback.served(request, hit)
                if not request.options.only_if_cached:
                    self.revalidator.start(request, plan)
            return hit
        check_room()
        if request.options.run:
            await self._admit_to_run(request)
        return await self.stale_fallback.fetch(request, plan)

    async def _admit_to_run(self, request: ProxyRequest) -> None:
        """Reserve the estimated cost in the request's run. Raises ProxyError(budget_exceeded)."""
        services, size = self.services, request_size(request.endpoint, request.document)
        output = services.runs.expected_output(request)
        estimate = max_cost_estimate(request, size, services.serving(request.model), output=output)
        await services.runs.admit(request, estimate or Decimal(0))

    # -- from upstream -------------------------------------------------------------------------------------------------

    async def fetch_alone(self, request: ProxyRequest, plan: CachePlan, attempt_log: AttemptLog) -> Reply:
        """The answer from upstream. Raises ProxyError."""
        try:
            if plan.batch is not None and plan.batch.changes_request:
                return await self._fetch_items(request, plan, attempt_log)
            answered = await self.sender.send(request, attempt_log)
            if attempt_log.model:  # another model answers: it is priced as such and never stored under this one
                request, plan = with_model(request, attempt_log.model), replace(plan, write=False)
            if answered.body is not None:
                return self._error_answer(request, plan, answered, attempt_log)
            if answered.is_stream or answered.opaque:
                return self._stream_answer(request, plan, answered, attempt_log)
            return await self._plain_answer(request, plan, answered, attempt_log)
        except ProxyError as refusal:
            self.recorder.record(request, plan, attempt_log, refusal.status, error=refusal.code)
            refusal.header_lines = self.recorder.response_headers(request, plan, attempt_log, "", stored=False)
            raise
        except asyncio.CancelledError:
            self.recorder.record(request, plan, attempt_log, 499, error="client_gone")
            raise

    def _error_answer(
        self, request: ProxyRequest, plan: CachePlan, answered: ResponseInHand, attempt_log: AttemptLog
    ) -> Reply:
        """The upstream's own error, with its status and body; keys masked."""
        assert answered.body is not None
        code = "no_usable_key" if attempt_log.no_usable_key else ""
        sale = Charge(error=code or f"upstream_{answered.status}")
        self.recorder.record(request, plan, attempt_log, answered.status, error=sale.error)
        lines = self.recorder.response_headers(
            request, plan, attempt_log, "X-Proxy-Cost-Status: unknown\r\n", stored=False
        )
        extra = attempt_log.retry_headers()
        headers = self._headers(answered, replaced=b"x-should-retry" if attempt_log.spent or code else b"")
        masked = self.services.masker.mask(answered.body)
        reason, share = answered.response.reason, Sharing.RETRY if answered.outcome in _RETRYABLE else Sharing.SHARED
        return Reply(answered.status, reason, headers, lines + extra, masked, None, share, sale, extra)

    async def _plain_answer(
        self, request: ProxyRequest, plan: CachePlan, answered: ResponseInHand, attempt_log: AttemptLog
    ) -> Reply:
        """A good answer, read whole. Settles the lease."""
        read = await self._read(request, answered, attempt_log, SPILL if plan.batch is None else SPILL_OF_ITEMS)
        if read is None:
            return self._stream_answer(request, plan, answered, attempt_log)
        body, document, usage, cost = read.body, read.document, read.usage, read.cost
        attempt_log.usage, attempt_log.cost = usage, cost  # paid, even if the client leaves while it is stored
        stored, why_not = False, None
        answer_model = document.get("model") if isinstance(document, Mapping) else None
        if plan.write and not answered.leaked and not request.stream:
            if answered.status == 200 and isinstance(document, Mapping):
                why_not = plain_complete(request.endpoint, request.document, document)
                if why_not is None:
                    vectors = vectors_of(document) if plan.batch is not None else None
                    if vectors is not None and plan.batch is not None and not in_order(document):
                        body = answer_body(dict(enumerate(vectors)), plan.batch.order, answer_model, usage)
                    goods = new_entry(answered, read.headers, usage, cost, answer_model, request.model)
                    stored = self.cache.store(request, plan, goods, body)
                    if vectors is not None:
                        numbers = range(len(vectors))
                        stored |= await self.cache.store_items(request, plan, goods, numbers, vectors)
            else:
                why_not = "not a JSON answer"
        if not stored:
            self.coalescer.mark_uncacheable(request, plan)
        lines = self.recorder.response_headers(request, plan, attempt_log, cost_lines(cost, usage), stored, why_not)
        self.recorder.record(
            request, plan, attempt_log, answered.status, usage=usage, cost=cost, answer_model=answer_model
        )
        reason, sale = answered.response.reason, Charge(usage, cost, answer_model)
        share = Sharing.SHARED if stored else Sharing.PRIVATE
        return Reply(answered.status, reason, read.headers, lines, body, None, share, sale)

    async def _read(
        self, request: ProxyRequest, answered: ResponseInHand, attempt_log: AttemptLog, most: int
    ) -> ReadAnswer | None:
        """A good answer, read whole and priced, its lease settled; None, and nothing settled, where it is longer than
        `most` bytes.
        """
        began = self.services.clock.monotonic()
        settled = False
        try:
            body = await self._read_whole(answered, attempt_log, most)
            if body is None:
                settled = True
                return None
            document = await self._understand(request, answered, body)
            attempt_log.upstream_ms += (self.services.clock.monotonic() - began) * 1000
            usage, cost = self._price(request, answered, document)
            answered.lease.settle(usage.total_tokens if usage else None, cost)
            self.sender.estimates.record(request, attempt_log.size, usage)
            settled = True
            self.services.object_owners.record_answer(self.services.pool, request, answered.lease.key, document)
        except TransportFailure as failure:
            raise failure.proxy_error() from None
        finally:
            if not settled:
                answered.lease.settle(None)
                answered.response.close()
        answered.response.close()
        headers = self._headers(answered)
        if self.services.masker.found_in(body):
            answered.leaked = True
            body = self.services.masker.mask(body)
        return ReadAnswer(headers, body, document, usage, cost)

    async def _fetch_items(self, request: ProxyRequest, plan: CachePlan, attempt_log: AttemptLog) -> Reply:
        """The answer to a batch that goes upstream only in part, or in parts."""
        bought = await self.embeddings.fetch(request, plan, attempt_log)
        if isinstance(bought, ResponseInHand):
            return self._error_answer(request, plan, bought, attempt_log)
        usage, cost, savings = attempt_log.usage, attempt_log.cost, bought.savings
        lines = self.recorder.response_headers(
            request, bought.plan, attempt_log, cost_lines(cost, usage, savings), bought.stored
        )
        self.recorder.record(request, bought.plan, attempt_log, 200, answer_model=bought.model, savings=savings)
        if not bought.stored:
            self.coalescer.mark_uncacheable(request, plan)
        share, sale = (
            Sharing.SHARED if bought.stored else Sharing.PRIVATE,
            Charge(usage, cost, bought.model, savings=savings),
        )
        return Reply(200, bought.reason, bought.headers, lines, bought.body, None, share, sale)

    async def _read_whole(self, answered: ResponseInHand, attempt_log: AttemptLog, most: int) -> bytes | None:
        """The body, or None where it grows beyond `most` bytes: then `answered.first` holds what was read."""
        if not answered.decoded and (whole := answered.response.ready()) is not None:
            return whole
        parts: list[bytes] = []
        size = 0
        try:
            async with attempt_log.deadline.limit():
                async for chunk in answered.more:
                    parts.append(chunk)
                    size += len(chunk)
                    if size > most:
                        answered.first = parts
                        return None
                    if attempt_log.for_cache_only and size > self.services.settings.cache.max_entry:
                        raise TransportFailure("invalid", "too large for the cache, and nobody else wants it")
        except TimeoutError:
            raise TransportFailure("timeout", "the upstream did not finish its answer in time") from None
        return parts[0] if len(parts) == 1 else b"".join(parts)

    async def _understand(self, request: ProxyRequest, answered: ResponseInHand, body: bytes) -> Any:
        """The parsed body of a JSON answer, None of any other. Raises TransportFailure(invalid) where JSON is promised
        and broken.
        """
        parse = read_answer if request.endpoint == "embeddings" else parse_leniently
        content_type = answered.response.headers.get("Content-Type", "").partition(";")[0].strip().lower()
        if content_type != "application/json" and not content_type.endswith("+json"):
            return None
        if answered.status == 204:
            return None
        try:
            return await in_thread_if_large(len(body), parse, body)
        except ValueError:
            raise TransportFailure("invalid", "the upstream's JSON answer is cut short or broken") from None

    def _stream_answer(
        self, request: ProxyRequest, plan: CachePlan, answered: ResponseInHand, attempt_log: AttemptLog
    ) -> Reply:
        """A good answer that flows. Its end settles, prices, stores and records."""
        services = self.services
        sse = answered.is_stream and not answered.opaque
        audit = StreamAudit(request.endpoint, request.document) if sse else None
        headers = self._headers(answered, replaced=b"x-should-retry" if attempt_log.spent else b"")
        began = answered.sent_at
        attempt_log.first_byte_ms = (services.clock.monotonic() - request.arrived) * 1000
        sale = Charge()

        def price(seen: StreamAudit) -> tuple[Usage | None, Cost | None]:
            usage = usage_of(request.endpoint, {"usage": seen.usage, "output": seen.output, "tools": seen.tools})
            kind, models = answered.upstream.address.kind, (seen.model, request.model)
            if usage is not None:
                return usage, answered.upstream.prices.cost(kind, models, usage, seen.service_tier)
            if seen.error and not seen.text_bytes:
                return None, None
            # Cut short, or the upstream does not say: what was asked and what was said so far.
            usage = self.sender.estimates.used(request, attempt_log.size, seen.text_bytes)
            cost = answered.upstream.prices.cost(kind, models, usage, seen.service_tier)
            return (usage, Cost(cost.usd, "estimated")) if cost is not None else (None, None)

        def ended(ending: StreamEnd) -> None:
            attempt_log.upstream_ms = (services.clock.monotonic() - began) * 1000
            usage, cost = price(audit) if audit is not None else (None, None)
            model = audit.model if audit is not None else None
            known, price_of_it = (usage, cost) if audit is not None and audit.usage is not None else (None, None)
            answered.lease.settle(known.total_tokens if known else None, cost)
            self.sender.estimates.record(request, attempt_log.size, known)
            sale.usage, sale.cost, sale.answer_model = usage, cost, model
            stored = False
            if ending.why is None and ending.body is not None and not services.masker.found_in(ending.body):
                span = audit.usage_span if audit else None
                goods = new_entry(answered, headers, known, price_of_it, model)
                stored = self.cache.store(request, plan, goods, ending.body, span)
            if not (stored or ending.failure or ending.client_left or (audit is not None and audit.error)):
                self.coalescer.mark_uncacheable(request, plan)
            error = ending.failure or ("client_gone" if ending.client_left else "")
            status = 499 if ending.client_left else answered.status
            self.recorder.record(
                request, plan, attempt_log, status, usage=usage, cost=cost, answer_model=model, error=error
            )

        def comment() -> bytes:
            assert audit is not None
            usage, cost = price(audit)
            return cost_comment(cost, usage)

        wants_comment = request.stream and (request.options.stream_cost or services.settings.cost.stream_comment)
        storable = plan.write and request.stream and answered.status == 200 and not answered.leaked
        flow = StreamRelay(
            answered=answered,
            audit=audit,
            keep=services.settings.cache.max_entry if storable else 0,
            client_filter=ClientFilter(answered.injected and sse, comment if wants_comment and sse else None),
            ended=ended,
        )
        if sse:
            flow.read = services.counters.reads(services.clock.monotonic)
        lines = self.recorder.response_headers(
            request, plan, attempt_log, "X-Proxy-Cost-Status: pending\r\n", stored=False
        )
        extra = attempt_log.retry_headers()
        share = Sharing.SHARED if storable and sse else Sharing.PRIVATE
        if answered.outcome in _RETRYABLE:
            share = Sharing.RETRY
        elif share is Sharing.PRIVATE:
            self.coalescer.mark_uncacheable(request, plan)
        reason, asked = answered.response.reason, answered.injected or request.wants_usage
        return Reply(answered.status, reason, headers, lines + extra, None, flow, share, sale, extra, usage_asked=asked)

    # -- what every answer needs --------------------------------------------------------------------------------------

    def _headers(self, answered: ResponseInHand, replaced: bytes = b"") -> list[Raw]:
        """The upstream's headers for the client, pool keys masked; without the one we say ourselves."""
        pooled = not self.services.passthrough
        headers = downstream_headers(answered.response.raw_headers, pooled=pooled, decoded=answered.decoded)
        masker = self.services.masker
        if masker.found_in(b"\n".join([value for _, value in headers])):
            answered.leaked = True
            headers = [(name, masker.mask(value)) for name, value in headers]
        if replaced:
            headers = [(name, value) for name, value in headers if name.lower() != replaced]
        return headers

    def _price(
        self, request: ProxyRequest, answered: ResponseInHand, document: Any
    ) -> tuple[Usage | None, Cost | None]:
        usage = usage_of(request.endpoint, document)
        if (
            usage is None
            and request.endpoint == "moderations"
            and isinstance(document, Mapping)
            and answered.status == 200
        ):
            usage = NO_TOKENS
        if usage is None:
            return None, None
        asked = document if isinstance(document, Mapping) else {}
        kind, models = answered.upstream.address.kind, (asked.get("model"), request.model)
        return usage, answered.upstream.prices.cost(kind, models, usage, asked.get("service_tier"))
