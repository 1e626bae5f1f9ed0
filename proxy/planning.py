"""What the cache may do for a call, and under which key: the first decision of every journey."""

from __future__ import annotations

import asyncio
from typing import Final

from .core.cacheability import is_deterministic, request_bypass
from .core.call import CachePlan, Call
from .core.fingerprint import KeyParts, NotCacheable, cache_key, canonical, dropped_fields
from .world import World

LARGE: Final = 1024 * 1024
"""Bodies above this are read in a thread, so that the loop stays free (bytes)."""


class Planner:
    """Plans calls in one world."""

    def __init__(self, world: World) -> None:
        self._world = world

    async def plan(self, call: Call) -> CachePlan:
        """What the cache may do for this call, and under which key."""
        world, options = self._world, call.options
        if world.store is None:
            why = "off" if world.settings.cache.backend == "off" else "when=never"
            return CachePlan("", why, False, False, "bypass")
        if options.no_store:
            return CachePlan("", "no-store", False, False, "bypass")
        why_not = request_bypass(call.endpoint, call.document)
        if why_not is None and world.settings.cache.when == "deterministic":
            why_not = None if is_deterministic(call.endpoint, call.document) else "uncacheable: sampled"
        if why_not is not None:
            return CachePlan("", why_not, False, False, "bypass")
        drop = dropped_fields(call.endpoint, world.settings.cache.ignore_fields)
        try:
            if len(call.body) > LARGE:
                key = await asyncio.to_thread(self._key, call, drop)
            else:
                key = self._key(call, drop)
        except NotCacheable as error:
            return CachePlan("", f"uncacheable: {error.reason}", False, False, "bypass")
        if options.no_cache:
            return CachePlan(key, "no-cache", False, True, "request")
        return CachePlan(key, "new", True, True)

    def _key(self, call: Call, drop: frozenset[str]) -> str:
        beta = [value for name, value in call.headers if len(name) == 11 and name.lower() == b"openai-beta"]
        route = call.route
        return cache_key(
            KeyParts(
                endpoint=call.endpoint,
                namespace=f"{call.client.scope}\n{call.options.namespace}",
                model=f"{call.model}\n{route.deployment or ''}",
                upstreams=self._world.identity(call.model),
                beta=b", ".join(beta).decode("latin-1"),
                sample=call.options.sample,
                query=route.query,
                body=canonical(call.body, drop),
            )
        )
