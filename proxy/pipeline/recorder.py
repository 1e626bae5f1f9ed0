"""What is told of a request that was not a hit: our headers on its answer, and its receipt."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Final

from ..accounting.budgets.budgets import Budgets
from ..accounting.receipt import Receipt
from ..cache.completeness import is_deterministic
from ..cache.embeddings import Savings
from ..cache.plan import CachePlan
from ..cost.pricing import Cost, usd
from ..cost.usage import Usage
from ..protocol.request import ProxyRequest
from ..protocol.routes import printable
from ..protocol.traceparent import traceparent
from ..system.clock import Clock
from ..upstream.limits.clients import ClientLimits
from ..upstream.progress import AttemptLog
from .response_headers import ZERO_COST, Timing, cache_status, cost_status

log = logging.getLogger("proxy")

WARNED: Final = 100
"""So many models without a price are warned of."""


class Recorder:
    """Makes the receipts and response headers of requests that were not cache hits.

    show_key: the cache key may be shown, as there are no several clients that must not learn of each other.
    observers: are called with every finished receipt, in this order.
    """

    def __init__(
        self,
        clock: Clock,
        clients: ClientLimits,
        budgets: Budgets,
        *,
        show_key: bool,
        observers: Sequence[Callable[[Receipt], None]],
    ) -> None:
        self._clock = clock
        self._clients = clients
        self._budgets = budgets
        self._show_key = show_key
        self._observers = observers
        self._unpriced: set[str] = set()
        self.held: Callable[[Receipt], bool] = lambda receipt: False

    def response_headers(
        self,
        request: ProxyRequest,
        plan: CachePlan,
        attempt_log: AttemptLog,
        money: str,
        stored: bool,
        why_not: str | None = None,
    ) -> str:
        """Our headers on an answer from upstream."""
        total = (self._clock.monotonic() - request.arrived) * 1000
        timing = Timing(attempt_log.queue_ms + attempt_log.paused_ms, attempt_log.upstream_ms, total)
        detail = plan.reason if plan.fwd in ("bypass", "request") else why_not or ""
        key = f"X-Proxy-Cache-Key: {plan.key}\r\n" if plan.key and self._show_key else ""
        why = "" if plan.collapsed else f"X-Proxy-Cache-Reason: {plan.reason}\r\n"
        spent = self._budgets.client_usage(request.client)
        limits = self._clients.headers(request.client, self._clock.monotonic(), spent)
        return (
            f"X-Proxy-Request-Id: {request.id}\r\nX-Proxy-Cache: {plan.status}\r\n{why}"
            f"Cache-Status: {cache_status(plan.fwd, detail, stored, plan.collapsed)}\r\n{key}"
            f"{limits}{attempt_log.upstream_headers()}X-Proxy-Attempts: {attempt_log.attempts}\r\n{money}"
            f"Server-Timing: {timing.header()}\r\n"
        )

    def record(
        self,
        request: ProxyRequest,
        plan: CachePlan,
        attempt_log: AttemptLog,
        status: int,
        *,
        usage: Usage | None = None,
        cost: Cost | None = None,
        saved: str | None = None,
        answer_model: object = None,
        error: str = "",
        savings: Savings | None = None,
    ) -> None:
        """The request's receipt. saved: what sharing spared it, in USD."""
        clock = self._clock
        if attempt_log.client_left is not None:
            status, error = attempt_log.client_left
        usage, cost = usage or attempt_log.usage, cost or attempt_log.cost
        if cost is None and usage is not None and status == 200:
            self._warn_unpriced(request.model)
        if savings is not None:
            saved = savings.cost
        elif saved is None and cost is not None and not plan.collapsed:
            saved = ZERO_COST
        self.finished(
            Receipt(
                id=request.id,
                client=request.client.name,
                endpoint=request.endpoint,
                model=request.model,
                status=status,
                cache=plan.status,
                finished_at=clock.wall(),
                reason=plan.reason,
                answer_model=answer_model if isinstance(answer_model, str) else None,
                stream=request.stream,
                upstream=attempt_log.upstream,
                key=attempt_log.key,
                attempts=attempt_log.attempts,
                cost_usd=usd(cost.usd) if cost is not None else None,
                saved_usd=saved,
                cost_status=cost_status(cost, savings),
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
            )
        )

    def _warn_unpriced(self, model: str) -> None:
        """Once a model."""
        if model not in self._unpriced and len(self._unpriced) < WARNED:
            self._unpriced.add(model)
            name = printable(model, 60)
            log.warning("no price for what %s answered: its cost is unknown (cost.prices sets one)", name)

    def finished(self, receipt: Receipt) -> None:
        """A request is over, unless somebody has another word on it."""
        if not self.held(receipt):
            self.finish(receipt)

    def finish(self, receipt: Receipt) -> None:
        """A request is over: its receipt is kept, counted and logged."""
        for observe in self._observers:
            observe(receipt)
