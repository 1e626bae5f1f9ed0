"""Under which names requests share one upstream request."""

from __future__ import annotations

from typing import Final

from ...cache.plan import CachePlan, ttl_of
from ...config.settings import CacheSettings, CostSettings
from ...protocol.request import ProxyRequest
from .hit_for_miss import FlightKey

_JSON: Final = "json"
_SSE: Final = "sse"
_WITHOUT_USAGE: Final = "sse without usage"


class FlightKeys:
    """Decides what may be shared at all, by the settings of the cache and of costs."""

    def __init__(self, cache: CacheSettings, cost: CostSettings) -> None:
        self._cache = cache
        self._inject_usage = cost.stream_usage == "inject"
        self._reads_on = cache.on_disconnect == "finish"

    def of(self, request: ProxyRequest, plan: CachePlan) -> tuple[FlightKey, ...]:
        """Return the keys under which this request shares, its own first; none if it may not.

        What is not read from the cache or not stored is not shared, because its sender asked for that. Streams share by
        whether the upstream is asked for the usage chunk: a stream with it serves clients with and without, a stream
        without it only the latter.
        """
        if not (plan.write and plan.key) or ttl_of(self._cache, request) <= 0:
            return ()
        if not (self._cache.coalesce and plan.read):
            return ((plan.key, request.id),) if self._reads_on else ()  # a flight of its own, which can be read on
        if not request.stream:
            return ((plan.key, _JSON),)
        if request.wants_usage or request.endpoint == "responses":
            return ((plan.key, _SSE),)
        options = request.document.get("stream_options")
        says = isinstance(options, dict) and "include_usage" in options
        if self._inject_usage and not says:
            return (plan.key, _SSE), (plan.key, _WITHOUT_USAGE)
        return (plan.key, _WITHOUT_USAGE), (plan.key, _SSE)

    def observed(self, request: ProxyRequest, plan: CachePlan) -> tuple[FlightKey, ...]:
        """Return the keys of flights whose response, once it is stored, can be converted for this request."""
        if not (self._cache.coalesce and plan.read) or (request.stream and request.endpoint == "responses"):
            return ()
        return ((plan.key, _JSON if request.stream else _SSE),)
