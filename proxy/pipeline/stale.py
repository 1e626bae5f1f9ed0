"""Answers past their lifetime: served while a fresh one is fetched, or in place of a failure (RFC 5861).

- stale-while-revalidate: the client has the old answer at once, and a new one is bought in the background.
- stale-if-error: only when every key, upstream and fallback has failed, or all keys are cooling. What is the request's
  own fault is told to its sender, and so is what our own limits refuse (`throttled`, `queue_full`): those say when to
  come back, and are no failure of the upstream. (As nginx has it: `proxy_cache_use_stale` knows errors, timeouts, 5xx
  and 429 of the upstream, but nothing of `limit_req`.)
- `cost.budget.on_exceeded: cache_only`: what a budget has no room for is served as old as it is still kept.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Final, Generic, Protocol, TypeVar

import msgspec

from ..accounting.receipt import Receipt
from ..cache.lookup import CacheHit, ResponseCache
from ..cache.plan import CachePlan
from ..cache.stores.build import max_stale
from ..protocol.errors import ProxyError
from ..protocol.request import ProxyRequest
from ..services import Services
from ..system.clock import spawn
from ..upstream.interfaces import Write
from ..upstream.retry.outcome import allows_stale
from .response_headers import ZERO_COST

log = logging.getLogger("proxy.cache")

MAX_REVALIDATIONS: Final = 100
"""So many answers are refreshed in the background at once, at most."""

PAUSE: Final = 10.0
"""Seconds before an answer whose refresh failed is tried again: it is asked for again and again meanwhile."""


class RelayedStream(Protocol):
    async def relay(self, write: Write) -> None: ...


class Answer(Protocol):
    """What is bought upstream: as much of it as is looked at here."""

    @property
    def status(self) -> int: ...

    @property
    def stream(self) -> RelayedStream | None: ...


A = TypeVar("A", bound=Answer)
Fetch = Callable[[ProxyRequest, CachePlan], Awaitable[A]]


class StaleFallback(Generic[A]):
    """Buys, and serves what is stored where that fails. finish: takes the receipt that a request ends with."""

    def __init__(
        self, services: Services, shelf: ResponseCache, buy: Fetch[A], finish: Callable[[Receipt], None]
    ) -> None:
        self._services = services
        self._shelf = shelf
        self._buy = buy
        self._finish = finish
        self._held: dict[str, Receipt | None] = {}

    async def fetch(self, request: ProxyRequest, plan: CachePlan) -> A | CacheHit:
        """The answer from upstream, or the stale one in its place. Raises ProxyError."""
        if self._shelf.stale_if_error_seconds(request, plan) <= 0 and not self._budget_seconds(plan):
            return await self._buy(request, plan)
        self._held[request.id] = None
        try:
            bought: A | None = None
            refusal: ProxyError | None = None
            try:
                bought = await self._buy(request, plan)
                status, why = bought.status, ""
            except ProxyError as error:
                refusal, status, why = error.copy(error.header_lines), error.status, error.code
            failed = self._held[request.id]
            if failed is not None and failed.error:
                why = failed.error
            spent = why == "budget_exceeded" and self._budget_seconds(plan)
            if why and (spent or allows_stale(status, why)):
                attempts = failed.attempts if failed is not None else 0
                hit = await self._shelf.stale_if_error(request, plan, why, attempts, spent or 0.0)
                if hit is not None:
                    self._held[request.id] = None
                    self.served(request, hit, failed)
                    return hit
            if refusal is not None:
                raise refusal.copy(refusal.header_lines)
            assert bought is not None
            return bought
        finally:
            receipt = self._held.pop(request.id)
            if receipt is not None:
                self._finish(receipt)

    def _budget_seconds(self, plan: CachePlan) -> float:
        """Return for how many seconds after its lifetime a response may be served because a budget is used up."""
        budgets = self._services.budgets
        if not (plan.key and plan.read and budgets.active and budgets.cache_only):
            return 0.0
        return max_stale(self._services.settings.cache)

    def holds(self, receipt: Receipt) -> bool:
        """Whether it is not the last word yet: another may take its place."""
        if receipt.id not in self._held:
            return False
        self._held[receipt.id] = receipt
        return True

    def served(self, request: ProxyRequest, hit: CacheHit, failed: Receipt | None = None) -> None:
        """A stale answer was served: its receipt, which has no error. failed: that of the call it stands in for."""
        clock, entry = self._services.clock, hit.entry
        self._finish(
            Receipt(
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
        )


class BackgroundRevalidator(Generic[A]):
    """Buys what was served stale, in the background: one call for each answer at a time."""

    def __init__(self, services: Services, buy: Fetch[A]) -> None:
        self._services = services
        self._buy = buy
        self._running: dict[str, asyncio.Task[None]] = {}
        self._paused: OrderedDict[str, float] = OrderedDict()

    def start(self, request: ProxyRequest, plan: CachePlan) -> bool:
        """Starts it, under an id of its own and in nobody's name: it is not the client's cost. False: no need to."""
        clock, key = self._services.clock, plan.key
        now = clock.monotonic()
        if (
            not plan.write
            or key in self._running
            or len(self._running) >= MAX_REVALIDATIONS
            or now < self._paused.get(key, 0)
        ):
            return False
        own = msgspec.structs.replace(
            request,
            id=clock.new_id(),
            client=replace(request.client, name=""),
            options=replace(request.options, run=""),
            arrived=now,
            deadline=now + self._services.settings.timeouts.total,
        )
        why = msgspec.structs.replace(plan, reason="stale-while-revalidate", fwd="stale")
        self._running[key] = spawn(self._revalidate(own, why), "refresh")
        return True

    async def close(self) -> None:
        """Gives up what is running."""
        running = list(self._running.values())
        for task in running:
            task.cancel()
        if running:
            await asyncio.wait(running)

    async def _revalidate(self, request: ProxyRequest, plan: CachePlan) -> None:
        failed = ""
        try:
            bought = await self._buy(request, plan)
            if bought.stream is not None:
                await bought.stream.relay(_nowhere)
            elif bought.status != 200:
                failed = f"upstream_{bought.status}"
        except ProxyError as refusal:
            failed = refusal.code
        except Exception as error:
            failed = type(error).__name__
        finally:
            del self._running[plan.key]
        if failed:
            log.warning("refreshing a stale answer (%s) failed: %s; served on meanwhile", request.endpoint, failed)
            self._paused[plan.key] = self._services.clock.monotonic() + PAUSE
            while len(self._paused) > MAX_REVALIDATIONS:
                self._paused.popitem(last=False)


async def _nowhere(data: bytes) -> None:
    """Stored is all it shall be."""
