"""`RequestHandler`: what happens to a request to one of the five endpoints, from top to bottom.

A repeated request of the very same bytes does not come here: `ResponseCache.peek` answers it without parsing anything.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from decimal import Decimal

from msgspec.structs import replace

from ..accounting.runs.registry import RunRegistry, run_headers
from ..cache.lookup import CacheHit, RequestDigest, ResponseCache
from ..cache.plan import CachePlan
from ..cache.planner import Planner
from ..protocol.errors import ProxyError
from ..protocol.request import ProxyRequest
from ..upstream.cost_estimate import max_cost_estimate
from ..upstream.limits.estimate import request_size
from ..upstream.target import Upstream
from .coalescing.coalescer import Coalescer
from .coalescing.reply import Failure, Reply
from .recorder import Recorder
from .stale import BackgroundRevalidator, StaleFallback


class RequestHandler:
    """Answers requests from the cache or from upstream. serving: returns the upstreams that serve a model."""

    def __init__(
        self,
        planner: Planner,
        cache: ResponseCache,
        coalescer: Coalescer,
        *,
        stale_fallback: StaleFallback,
        revalidator: BackgroundRevalidator,
        recorder: Recorder,
        runs: RunRegistry,
        serving: Callable[[str], Iterable[Upstream]],
    ) -> None:
        self.planner = planner
        self.cache = cache
        self.coalescer = coalescer
        self.stale_fallback = stale_fallback
        self.revalidator = revalidator
        self.recorder = recorder
        self._runs = runs
        self._serving = serving

    async def handle(
        self, request: ProxyRequest, check_admission: Callable[[], None], digest: RequestDigest | None = None
    ) -> CacheHit | Reply:
        """Return the response, counted in the request's run if it names one. Raises ProxyError.

        check_admission: is called before anything is sent upstream; raises ProxyError("overloaded").
        digest: by which `ResponseCache.peek` may find the response when the same bytes come again.
        """
        run = self._runs.enter(request)
        if run is None:
            return await self._answer(request, check_admission, digest)
        try:
            answer = await self._answer(request, check_admission, digest)
        except BaseException as error:
            self._runs.abandoned(request, gone=isinstance(error, asyncio.CancelledError))
            if isinstance(error, ProxyError):
                error.headers = (*error.headers, *run_headers(run))
            raise
        if isinstance(answer, CacheHit):
            self._runs.hit(request, answer.entry)
            return replace(answer, headers=run_headers(run), run=run.name)
        return replace(answer, proxy_headers=answer.proxy_headers + run_headers(run))

    async def _answer(
        self, request: ProxyRequest, check_admission: Callable[[], None], digest: RequestDigest | None
    ) -> CacheHit | Reply:
        plan = await self.planner.plan(request)
        hit, plan = await self.cache.lookup(request, plan)
        if digest is not None:
            self.cache.memoize(digest, request, plan)
        if hit is not None:
            if hit.stale:
                self.recorder.finish(self.recorder.stale_receipt(request, hit))
                if not request.options.only_if_cached:
                    self.revalidator.start(request, plan)
            return hit
        check_admission()
        if request.options.run:
            await self._runs.admit(request, self._estimate(request))
        return await self._fetch(request, plan)

    async def _fetch(self, request: ProxyRequest, plan: CachePlan) -> CacheHit | Reply:
        """Return the response from upstream, or a stale one in its place. Its receipt is finished here, and only here.

        (A stream's end, a client that leaves, and a fetch that goes on for others finish theirs themselves.)
        """
        outcome = await self.coalescer.fetch(request, plan)
        receipt = outcome.receipt
        try:
            hit = await self.stale_fallback.instead_of(request, plan, outcome)
            if hit is not None:
                receipt = self.recorder.stale_receipt(request, hit, failed=receipt)
                return hit
        finally:
            if receipt is not None:
                self.recorder.finish(receipt)
        if isinstance(outcome, Failure):
            raise outcome.error.copy(outcome.error.proxy_headers)
        return outcome

    def _estimate(self, request: ProxyRequest) -> Decimal:
        """Return what the request may cost its run, in USD."""
        size, output = request_size(request.endpoint, request.document), self._runs.expected_output(request)
        return max_cost_estimate(request, size, self._serving(request.model), output=output) or Decimal(0)
