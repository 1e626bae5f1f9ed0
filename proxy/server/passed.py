"""`PassedRequest`: a request that is passed through, and what its response headers and its receipt say."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from aiohttp.web import BaseRequest

from ..accounting.receipt import Receipt
from ..cost.pricing import Cost, usd
from ..cost.usage import Usage
from ..pipeline.response_headers import ZERO_COST, Pairs, Timing, cache_status, cost_headers, cost_status
from ..protocol.options import Options
from ..protocol.request import Client, ProxyRequest
from ..protocol.routes import Route
from ..protocol.traceparent import traceparent
from ..services import Services
from ..upstream.deadline import SharedDeadline
from ..upstream.keys.object_owners import UNPINNED
from ..upstream.limits.clients import ClientReservation
from ..upstream.progress import AttemptLog
from .request_parser import time_limits

REASON = "uncacheable: route"


class PassedRequest:
    """One request that is passed through.

    target: the request's, raw.
    named: the model that it names, "" for none. runs: a model runs on it.
    usage, cost, answer_model: what the response tells.
    reservation: what is held of the client's limits, until a response has it. pinned: what its objects ask of the key.
    """

    def __init__(
        self,
        services: Services,
        request: BaseRequest,
        route: Route,
        client: Client,
        options: Options,
        reason: str = REASON,
    ) -> None:
        """reason: why it is not cached."""
        clock = services.clock
        self._services = services
        self._reason = reason
        self._endpoint = route.segment
        self._headers = request.raw_headers
        self.target = request.raw_path
        self.arrived = clock.monotonic()
        self.route = route
        self.client = client
        self.options = options
        self.limits = time_limits(services.settings, options, request, self.arrived)
        self.id = clock.new_id()
        self.log = AttemptLog(SharedDeadline(self.limits.deadline, clock.monotonic, self.limits.act_until))
        self.named = ""
        self.runs = False
        self._body: tuple[bytes, Mapping[str, Any]] = b"", {}
        self._request: ProxyRequest | None = None
        self.usage: Usage | None = None
        self.cost: Cost | None = None
        self.answer_model: str | None = None
        self.is_stream = False
        self.first_byte_ms: float | None = None
        self.reservation: ClientReservation | None = None
        self.pinned = UNPINNED

    def read(self, route_model: str, runs: bool, body: bytes, document: Mapping[str, Any]) -> None:
        """Take note of the model and the body. document: the body, parsed, if it is JSON."""
        self.named, self.runs = route_model, runs
        self._body = body, document

    @property
    def parsed(self) -> ProxyRequest:
        """The request as the five endpoints have it, made when it is needed."""
        if self._request is None:
            self._request = self._parsed(*self._body)
        return self._request

    def _parsed(self, body: bytes, document: Mapping[str, Any]) -> ProxyRequest:
        return ProxyRequest.from_body(
            body,
            document,
            lambda route, body_model: self.model,
            route=self.route,
            headers=self._headers,
            options=self.options,
            client=self.client,
            id=self.id,
            arrived=self.arrived,
            deadline=self.limits.deadline,
            max_wait=self.limits.max_wait,
            act_until=self.limits.act_until,
        )

    @property
    def model(self) -> str:
        """The model that runs; "" if none does, or if it is not known which."""
        return self.named if self.runs else ""

    @property
    def max_wait(self) -> float:
        """Seconds that it may wait for a key."""
        return self.limits.max_wait

    def elapsed_ms(self) -> float:
        """Return the milliseconds since the request came."""
        return (self._services.clock.monotonic() - self.arrived) * 1000

    def headers(self) -> Pairs:
        """Return the proxy's own headers of the response."""
        log, elapsed = self.log, self.elapsed_ms()
        waited = log.queue_ms + log.paused_ms
        timing = Timing(waited, elapsed - waited, elapsed)
        return (
            ("X-Proxy-Request-Id", self.id),
            *_cache_headers(self._reason),
            *log.upstream_headers(),
            *self._services.clients.headers(self.client, self._services.clock.monotonic()),
            ("X-Proxy-Attempts", str(log.attempts)),
            ("Server-Timing", timing.header()),
        )

    def cost_headers(self) -> Pairs:
        """Return what is known of its cost."""
        return cost_headers(self.cost, self.usage)

    def receipt(self, status: int, error: str) -> Receipt:
        """Return the receipt. error: a code of the proxy's, or `upstream_STATUS`; "": none."""
        log, elapsed, cost = self.log, self.elapsed_ms(), self.cost
        waited = log.queue_ms + log.paused_ms
        return Receipt(
            id=self.id,
            client=self.client.name,
            endpoint=self._endpoint,
            model=self.model,
            status=status,
            cache="bypass",
            finished_at=self._services.clock.wall(),
            reason=self._reason,
            answer_model=self._services.masker.mask_text(self.answer_model) if self.answer_model else None,
            stream=self.is_stream,
            upstream=log.upstream,
            key=log.key,
            attempts=log.attempts,
            cost_usd=usd(cost.usd) if cost is not None else None,
            saved_usd=ZERO_COST if cost is not None else None,
            cost_status=cost_status(cost),
            usage=self.usage,
            error=error,
            queue_ms=waited,
            upstream_ms=elapsed - waited,
            total_ms=elapsed,
            tags=self.options.tags,
            run=self.options.run,
            first_byte_ms=self.first_byte_ms,
            traceparent=traceparent(self._headers),
            upstream_code=log.upstream_code if error else "",
            retries=tuple(log.causes),
        )


@lru_cache(16)
def _cache_headers(reason: str) -> Pairs:
    """Return the headers that say why the cache was not used. reason: one of a few constants."""
    return (
        ("X-Proxy-Cache", "bypass"),
        ("X-Proxy-Cache-Reason", reason),
        ("Cache-Status", cache_status("bypass", reason, False)),
    )
