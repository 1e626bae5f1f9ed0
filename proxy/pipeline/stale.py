"""Stale responses: served while a fresh one is fetched, or in place of a failure (RFC 5861).

- stale-while-revalidate: the client has the stored response at once, and a new one is fetched in the background.
- stale-if-error: only if every key, upstream and fallback has failed, or all keys are cooling. The client learns of
  errors of its own request, and of the proxy's own limits (`throttled`, `queue_full`): those say when to come back, and
  are no failure of the upstream. nginx draws the same line: `proxy_cache_use_stale` knows errors, timeouts, 5xx and 429
  of the upstream, but not those of `limit_req`.
- `cost.budget.on_exceeded: cache_only`: if a budget is used up, responses are served for as long as they are stored.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections import OrderedDict
from dataclasses import replace
from typing import Final

import msgspec

from ..accounting.budgets.budgets import Budgets
from ..cache.lookup import CacheHit, ResponseCache
from ..cache.plan import CachePlan
from ..protocol.request import ProxyRequest
from ..system.clock import Clock, spawn
from ..upstream.retry.outcome import allows_stale
from .coalescing.coalescer import Coalescer
from .coalescing.reply import Failure, Reply
from .recorder import Recorder

log = logging.getLogger("proxy.cache")

MAX_REVALIDATIONS: Final = 100
"""The number of responses that are revalidated at the same time, at most."""

PAUSE: Final = 10.0
"""Seconds until a response whose revalidation failed is revalidated again."""


class StaleFallback:
    """Finds a stored response in place of a failure. max_stale: seconds that expired responses are stored."""

    def __init__(self, cache: ResponseCache, budgets: Budgets, max_stale: float) -> None:
        self._cache = cache
        self._budgets = budgets
        self._max_stale = max_stale

    async def instead_of(self, request: ProxyRequest, plan: CachePlan, outcome: Reply | Failure) -> CacheHit | None:
        """Return the stored response to serve instead of this outcome of a fetch; None: the outcome is served."""
        receipt = outcome.receipt
        status, error = outcome.status, outcome.error.code if isinstance(outcome, Failure) else ""
        if receipt is not None and receipt.error:
            error = receipt.error
        if not error:
            return None
        budget_seconds = self._budget_seconds(plan) if error == "budget_exceeded" else 0.0
        if not (budget_seconds or allows_stale(status, error)):
            return None
        attempts = receipt.attempts if receipt is not None else 0
        return await self._cache.stale_if_error(request, plan, error, attempts, budget_seconds)

    def _budget_seconds(self, plan: CachePlan) -> float:
        """Return for how many seconds after its lifetime a response may be served because a budget is used up."""
        may_serve = plan.key and plan.read and self._budgets.active and self._budgets.cache_only
        return self._max_stale if may_serve else 0.0


class BackgroundRevalidator:
    """Fetches in the background what was served stale, one fetch for each response at a time.

    timeout: seconds that a fetch may take.
    """

    def __init__(self, coalescer: Coalescer, recorder: Recorder, clock: Clock, timeout: float) -> None:
        self._coalescer = coalescer
        self._recorder = recorder
        self._clock = clock
        self._timeout = timeout
        self._running: dict[str, asyncio.Task[None]] = {}
        self._paused: OrderedDict[str, float] = OrderedDict()

    def start(self, request: ProxyRequest, plan: CachePlan) -> bool:
        """Start a fetch with an id of its own. It belongs to no client and no run, as its cost is not theirs.

        Returns False if none is needed.
        """
        key, now = plan.key, self._clock.monotonic()
        if not plan.write or key in self._running or len(self._running) >= MAX_REVALIDATIONS:
            return False
        if now < self._paused.get(key, 0):
            return False
        own = msgspec.structs.replace(
            request,
            id=self._clock.new_id(),
            client=replace(request.client, name=""),
            options=replace(request.options, run=""),
            arrived=now,
            deadline=now + self._timeout,
            act_until=math.inf,
        )
        plan = msgspec.structs.replace(plan, reason="stale-while-revalidate", fwd="stale")
        self._running[key] = spawn(self._revalidate(own, plan), "refresh")
        return True

    async def close(self) -> None:
        """Cancel what is running."""
        running = list(self._running.values())
        for task in running:
            task.cancel()
        if running:
            await asyncio.wait(running)

    async def _revalidate(self, request: ProxyRequest, plan: CachePlan) -> None:
        failed = ""
        try:
            outcome = await self._coalescer.fetch(request, plan)
            if outcome.receipt is not None:
                self._recorder.finish(outcome.receipt)
            if isinstance(outcome, Failure):
                failed = outcome.error.code
            elif outcome.stream is not None:
                await outcome.stream.relay(_discard)
            elif outcome.status != 200:
                failed = f"upstream_{outcome.status}"
        except Exception as error:
            failed = type(error).__name__
        finally:
            del self._running[plan.key]
        if failed:
            log.warning("refreshing a stale answer (%s) failed: %s; served on meanwhile", request.endpoint, failed)
            self._paused[plan.key] = self._clock.monotonic() + PAUSE
            while len(self._paused) > MAX_REVALIDATIONS:
                self._paused.popitem(last=False)


async def _discard(data: bytes) -> None:
    """Discard the body: the response is fetched only to be stored."""
