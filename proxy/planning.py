"""What the cache may do for a call, and under which key: the first decision of every journey."""

from __future__ import annotations

import asyncio
from typing import Final

from msgspec.structs import replace

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
                parts = await asyncio.to_thread(self._parts, call, drop)
            else:
                parts = self._parts(call, drop)
        except NotCacheable as error:
            return CachePlan("", f"uncacheable: {error.reason}", False, False, "bypass")
        sample, scope = options.sample, call.client.scope
        if options.run and not sample:
            sample = await world.runs.sample(call, scoped(await self._key(parts), scope))
        bare = await self._key(parts, sample)
        if world.replays:  # whose answer it was, and how old it is, do not matter: no-cache is about age
            return CachePlan(bare, "not recorded", True, True)
        key = scoped(bare, scope)
        reason, read, forward = "new", True, "uri-miss"
        if world.settings.cache.mode == "refresh":
            reason, read, forward = "refresh", False, "bypass"
        elif options.no_cache:
            reason, read, forward = "no-cache", False, "request"
        request = world.masker.mask(parts.body).decode() if world.settings.cache.store_requests else None
        return CachePlan(key, reason, read, True, forward, bare if bare != key else "", request)

    async def _key(self, parts: KeyParts, sample: str = "") -> str:
        """The key less the client's scope; sample 0 is a request without one."""
        if sample not in ("", "0"):
            parts = replace(parts, sample=sample)
        if len(parts.body) > LARGE:
            return await asyncio.to_thread(cache_key, parts)
        return cache_key(parts)

    def _parts(self, call: Call, drop: frozenset[str]) -> KeyParts:
        """What the key is made of, before sample and scope are added."""
        beta = [value for name, value in call.headers if len(name) == 11 and name.lower() == b"openai-beta"]
        route = call.route
        return KeyParts(
            endpoint=call.endpoint,
            namespace=call.options.namespace,
            model=f"{call.model}\n{route.deployment or ''}",
            upstreams=self._world.identity(call.model),
            beta=b", ".join(beta).decode("latin-1"),
            sample="",
            query=route.query,
            body=canonical(call.body, drop),
        )
