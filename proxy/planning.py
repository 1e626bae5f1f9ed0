"""What the cache may do for a call, and under which key: the first decision of every journey."""

from __future__ import annotations

import asyncio
from typing import Final

from .core.cacheability import is_deterministic, request_bypass
from .core.call import CachePlan, Call
from .core.fingerprint import KeyParts, NotCacheable, cache_key, canonical, dropped_fields, scoped
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
                bare, body = await asyncio.to_thread(self._key, call, drop)
            else:
                bare, body = self._key(call, drop)
        except NotCacheable as error:
            return CachePlan("", f"uncacheable: {error.reason}", False, False, "bypass")
        if world.replays:  # whose answer it was, and how old it is, do not matter: no-cache is about age
            return CachePlan(bare, "not recorded", True, True)
        key = scoped(bare, call.client.scope)
        reason, read, forward = "new", True, "uri-miss"
        if world.settings.cache.mode == "refresh":
            reason, read, forward = "refresh", False, "bypass"
        elif options.no_cache:
            reason, read, forward = "no-cache", False, "request"
        request = world.masker.mask(body).decode() if world.settings.cache.store_requests else None
        return CachePlan(key, reason, read, True, forward, bare if bare != key else "", request)

    def _key(self, call: Call, drop: frozenset[str]) -> tuple[str, bytes]:
        """The key less the client's scope, and the canonical body."""
        beta = [value for name, value in call.headers if len(name) == 11 and name.lower() == b"openai-beta"]
        route = call.route
        body = canonical(call.body, drop)
        bare = cache_key(
            KeyParts(
                endpoint=call.endpoint,
                namespace=call.options.namespace,
                model=f"{call.model}\n{route.deployment or ''}",
                upstreams=self._world.identity(call.model),
                beta=b", ".join(beta).decode("latin-1"),
                sample=call.options.sample,
                query=route.query,
                body=body,
            )
        )
        return bare, body
