"""What is told of a request that was not a hit: our headers on its answer, and its receipt."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Final

from ..accounting.receipt import Receipt
from ..cache.completeness import is_deterministic
from ..cache.embeddings import Saved
from ..cache.plan import CachePlan
from ..cost.pricing import Cost, usd
from ..cost.usage import Usage
from ..protocol.request import Call
from ..protocol.routes import printable
from ..protocol.traceparent import traceparent
from ..services import World
from ..upstream.progress import Progress
from .response_headers import ZERO_COST, Timing, cost_status, forward_status

log = logging.getLogger("proxy")

WARNED: Final = 100
"""So many models without a price are warned of."""


class Teller:
    """observe: is told every receipt; held: whether a receipt is not the last word on its request."""

    def __init__(self, world: World, observe: Callable[[Receipt], None]) -> None:
        self._world = world
        self._observe = observe
        self._unpriced: set[str] = set()
        self.held: Callable[[Receipt], bool] = lambda receipt: False

    def lines(
        self,
        call: Call,
        plan: CachePlan,
        progress: Progress,
        money: str,
        stored: bool,
        why_not: str | None = None,
    ) -> str:
        """Our headers on an answer from upstream."""
        world = self._world
        total = (world.seams.monotonic() - call.arrived) * 1000
        timing = Timing(progress.queue_ms + progress.paused_ms, progress.upstream_ms, total)
        detail = plan.reason if plan.forward in ("bypass", "request") else why_not or ""
        key = f"X-Proxy-Cache-Key: {plan.key}\r\n" if plan.key and len(world.settings.server.client_keys) < 2 else ""
        why = "" if plan.collapsed else f"X-Proxy-Cache-Reason: {plan.reason}\r\n"
        return (
            f"X-Proxy-Request-Id: {call.id}\r\nX-Proxy-Cache: {plan.status}\r\n{why}"
            f"Cache-Status: {forward_status(plan.forward, detail, stored, plan.collapsed)}\r\n{key}"
            f"{world.clients.line(call.client, world.seams.monotonic(), world.budgets.told(call.client))}"
            f"{progress.went()}X-Proxy-Attempts: {progress.attempts}\r\n{money}Server-Timing: {timing.header()}\r\n"
        )

    def record(
        self,
        call: Call,
        plan: CachePlan,
        progress: Progress,
        status: int,
        *,
        usage: Usage | None = None,
        cost: Cost | None = None,
        saved: str | None = None,
        answer_model: object = None,
        error: str = "",
        savings: Saved | None = None,
    ) -> None:
        """The request's receipt. saved: what sharing spared it, in USD."""
        seams = self._world.seams
        if progress.gone is not None:
            status, error = progress.gone
        usage, cost = usage or progress.usage, cost or progress.cost
        if cost is None and usage is not None and status == 200:
            self._warn_unpriced(call.model)
        if savings is not None:
            saved = savings.cost
        elif saved is None and cost is not None and not plan.collapsed:
            saved = ZERO_COST
        self.finished(
            Receipt(
                id=call.id,
                client=call.client.name,
                endpoint=call.endpoint,
                model=call.model,
                status=status,
                cache=plan.status,
                finished_at=seams.wall(),
                reason=plan.reason,
                answer_model=answer_model if isinstance(answer_model, str) else None,
                stream=call.stream,
                upstream=progress.upstream,
                key=progress.key,
                attempts=progress.attempts,
                cost_usd=usd(cost.usd) if cost is not None else None,
                saved_usd=saved,
                cost_status=cost_status(cost, savings),
                usage=usage,
                error=error,
                queue_ms=progress.queue_ms + progress.paused_ms,
                upstream_ms=progress.upstream_ms,
                total_ms=(seams.monotonic() - call.arrived) * 1000,
                tags=call.options.tags,
                run=call.options.run,
                first_byte_ms=progress.first_byte_ms,
                cache_key=plan.key,
                sampled=not is_deterministic(call.endpoint, call.document),
                traceparent=traceparent(call.headers),
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
        self._world.runs.finished(receipt)
        self._world.budgets.recorded(receipt)
        self._world.receipts.put(receipt)
        self._observe(receipt)
