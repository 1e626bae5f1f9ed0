"""`Recorder`: receipts and response headers of requests that were not cache hits, and the one end of each receipt."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

from ..accounting.budgets.budgets import Budgets
from ..accounting.receipt import Receipt
from ..cache.completeness import is_deterministic
from ..cache.lookup import CacheHit
from ..cache.plan import CachePlan
from ..cost.pricing import usd
from ..protocol.request import ProxyRequest
from ..protocol.routes import printable
from ..protocol.traceparent import traceparent
from ..system.clock import Clock
from ..upstream.limits.clients import ClientLimits
from ..upstream.progress import AttemptLog
from .coalescing.reply import Charge
from .response_headers import ZERO_COST, Pairs, Timing, cache_status, cost_status

log = logging.getLogger("proxy")

MAX_WARNED: Final = 100
"""The number of models without a price that are warned of, at most."""


class RequestContext(NamedTuple):
    """A request, what the cache may do for it, the attempts made for it, and what it has cost."""

    request: ProxyRequest
    plan: CachePlan
    attempt_log: AttemptLog
    charge: Charge


class Recorder:
    """Makes receipts and response headers, and finishes receipts.

    show_key: the cache key may be shown, because there are no several clients that must not learn of each other.
    mask: takes pool keys out of what responses name.
    observers: are called with every finished receipt, in this order.
    """

    def __init__(
        self,
        clock: Clock,
        clients: ClientLimits,
        budgets: Budgets,
        *,
        show_key: bool,
        mask: Callable[[str], str],
        observers: Sequence[Callable[[Receipt], None]],
    ) -> None:
        self._clock = clock
        self._clients = clients
        self._budgets = budgets
        self._show_key = show_key
        self._mask = mask
        self._observers = observers
        self._unpriced: set[str] = set()

    def headers(
        self, context: RequestContext, cost: Pairs = (), stored: bool = False, why_not: str | None = None
    ) -> Pairs:
        """Return the proxy's own headers of a response from upstream. why_not: the reason that it was not stored."""
        request, plan, attempt_log, _ = context
        now = self._clock.monotonic()
        timing = Timing(
            attempt_log.queue_ms + attempt_log.paused_ms, attempt_log.upstream_ms, (now - request.arrived) * 1000
        )
        detail = plan.reason if plan.fwd in ("bypass", "request") else why_not or ""
        reason: Pairs = () if plan.collapsed else (("X-Proxy-Cache-Reason", plan.reason),)
        key: Pairs = (("X-Proxy-Cache-Key", plan.key),) if plan.key and self._show_key else ()
        limits = self._clients.headers(request.client, now, self._budgets.client_usage(request.client))
        return (
            ("X-Proxy-Request-Id", request.id),
            ("X-Proxy-Cache", plan.status),
            *reason,
            ("Cache-Status", cache_status(plan.fwd, detail, stored, plan.collapsed)),
            *key,
            *limits,
            *attempt_log.upstream_headers(),
            ("X-Proxy-Attempts", str(attempt_log.attempts)),
            *cost,
            ("Server-Timing", timing.header()),
        )

    def receipt(self, context: RequestContext, status: int) -> Receipt:
        """Return the receipt of a request that is over. It counts when it is given to `finish`."""
        clock = self._clock
        request, plan, attempt_log, charge = context
        usage, cost, error = charge.usage, charge.cost, charge.error
        if attempt_log.client_left is not None:
            status, error = attempt_log.client_left
        if cost is None and usage is not None and status == 200:
            self._warn_unpriced(request.model)
        saved = charge.savings.cost if charge.savings is not None else None
        if charge.savings is None and cost is not None and not plan.collapsed:
            saved = ZERO_COST
        return Receipt(
            id=request.id,
            client=request.client.name,
            endpoint=request.endpoint,
            model=request.model,
            status=status,
            cache=plan.status,
            finished_at=clock.wall(),
            reason=plan.reason,
            answer_model=self._mask(charge.answer_model) if charge.answer_model else charge.answer_model,
            stream=request.stream,
            upstream=attempt_log.upstream,
            key=attempt_log.key,
            attempts=attempt_log.attempts,
            cost_usd=usd(cost.usd) if cost is not None else None,
            saved_usd=saved,
            cost_status=cost_status(cost, charge.savings),
            usage=usage,
            error=error,
            queue_ms=attempt_log.queue_ms + attempt_log.paused_ms,
            upstream_ms=attempt_log.upstream_ms,
            total_ms=(clock.monotonic() - request.arrived) * 1000,
            tags=request.options.tags,
            run=request.options.run,
            first_byte_ms=attempt_log.first_byte_ms,
            cache_key=plan.key,
            sampled=not is_deterministic(request.endpoint, request.document),
            traceparent=traceparent(request.headers),
            upstream_code=attempt_log.upstream_code if error else "",
            retries=tuple(attempt_log.causes),
        )

    def stale_receipt(self, request: ProxyRequest, hit: CacheHit, failed: Receipt | None = None) -> Receipt:
        """Return the receipt of a stale response, which has no error. failed: that of the fetch it replaces."""
        clock, entry = self._clock, hit.entry
        return Receipt(
            id=hit.id,
            client=request.client.name,
            endpoint=request.endpoint,
            model=request.model,
            status=entry.status,
            cache="stale",
            finished_at=clock.wall(),
            reason=hit.stale,
            answer_model=entry.answer_model,
            stream=request.stream,
            upstream=failed.upstream if failed is not None else "",
            key=failed.key if failed is not None else "",
            attempts=hit.attempts,
            cost_usd=ZERO_COST,
            saved_usd=entry.cost,
            cost_status="exact",
            usage=entry.usage,
            queue_ms=failed.queue_ms if failed is not None else 0.0,
            upstream_ms=failed.upstream_ms if failed is not None else 0.0,
            total_ms=(clock.monotonic() - request.arrived) * 1000,
            tags=request.options.tags,
            run=request.options.run,
            cache_key=entry.key,
            sampled=entry.sampled,
        )

    def finish(self, receipt: Receipt) -> None:
        """Keep, count and log the receipt: its request is over."""
        for observe in self._observers:
            observe(receipt)

    def _warn_unpriced(self, model: str) -> None:
        """Log, once a model, that its cost is unknown."""
        if model not in self._unpriced and len(self._unpriced) < MAX_WARNED:
            self._unpriced.add(model)
            name = printable(model, 60)
            log.warning("no price for what %s answered: its cost is unknown (cost.prices sets one)", name)
