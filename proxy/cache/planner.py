"""What the cache may do for a call, and under which key: the first decision of every journey."""

from __future__ import annotations

import asyncio
from typing import Final

from msgspec.structs import replace

from ..protocol.request import ProxyRequest
from ..services import Services
from .completeness import is_deterministic
from .embeddings import EmbeddingBatch, read_batch
from .fields import dropped_fields, request_bypass
from .key import KeyParts, NotCacheable, cache_key, canonical, partitioned
from .miss_reason import field_digests_of
from .plan import CachePlan

LARGE: Final = 1024 * 1024
"""Bodies above this are read in a thread, so that the loop stays free (bytes)."""


class Planner:
    """Plans calls in one world."""

    def __init__(self, services: Services) -> None:
        self._services = services

    async def plan(self, call: ProxyRequest) -> CachePlan:
        """What the cache may do for this call, and under which key."""
        services, options = self._services, call.options
        if services.store is None:
            why = "off" if services.settings.cache.backend == "off" else "when=never"
            return CachePlan("", why, False, False, "bypass")
        if options.no_store:
            return CachePlan("", "no-store", False, False, "bypass")
        why_not = request_bypass(call.endpoint, call.document)
        if why_not is None and services.settings.cache.when == "deterministic":
            why_not = None if is_deterministic(call.endpoint, call.document) else "uncacheable: sampled"
        if why_not is not None:
            return CachePlan("", why_not, False, False, "bypass")
        drop = dropped_fields(call.endpoint, services.settings.cache.ignore_fields)
        try:
            if len(call.body) > LARGE:
                parts = await asyncio.to_thread(self.key_parts, call, drop)
            else:
                parts = self.key_parts(call, drop)
        except NotCacheable as error:
            return CachePlan("", f"uncacheable: {error.reason}", False, False, "bypass")
        sample, scope = options.sample, call.client.cache_partition
        if options.run and not sample:
            sample = await services.runs.sample(call, partitioned((await self._key(parts))[0], scope))
        parts = _sampled(parts, sample)
        batch = await self._batch(call, parts, drop)
        bare, traits = await self._key(parts)
        if batch is not None and len(batch.order) == 1:
            bare, batch = batch.unpartitioned_keys[0], None  # the answer to one item is what is kept of that item
        if services.replays:  # whose answer it was, and how old it is, do not matter: no-cache is about age
            return CachePlan(bare, "not recorded", True, True, batch=batch, field_digests=traits)
        key = partitioned(bare, scope)
        if batch is not None and scope:
            batch = replace(batch, keys=tuple([partitioned(item, scope) for item in batch.unpartitioned_keys]))
        reason, read, forward = "new", True, "uri-miss"
        if services.settings.cache.mode == "refresh":
            reason, read, forward = "refresh", False, "bypass"
        elif options.no_cache:
            reason, read, forward = "no-cache", False, "request"
        request = services.masker.mask(parts.body).decode() if services.settings.cache.store_requests else None
        return CachePlan(key, reason, read, True, forward, batch, traits, bare if bare != key else "", request)

    async def _key(self, parts: KeyParts) -> tuple[str, str]:
        """The key less the client's scope, and the digests that tell later how it differs from another."""
        if len(parts.body) > LARGE:
            return await asyncio.to_thread(_key_and_field_digests, parts)
        return _key_and_field_digests(parts)

    def key_parts(self, call: ProxyRequest, drop: frozenset[str]) -> KeyParts:
        """What the key is made of, before sample and scope are added. Raises NotCacheable."""
        beta = [value for name, value in call.headers if len(name) == 11 and name.lower() == b"openai-beta"]
        route = call.route
        return KeyParts(
            endpoint=call.endpoint,
            namespace=call.options.namespace,
            model=f"{call.model}\n{route.deployment or ''}",
            upstreams=self._services.identity(call.model),
            beta=b", ".join(beta).decode("latin-1"),
            sample="",
            query=route.query,
            body=canonical(call.body, drop),
        )

    async def _batch(self, call: ProxyRequest, parts: KeyParts, drop: frozenset[str]) -> EmbeddingBatch | None:
        """The items of a request that have keys of their own."""
        if call.endpoint != "embeddings" or call.stream or not self._services.settings.cache.embeddings_per_item:
            return None
        if len(call.body) > LARGE:
            return await asyncio.to_thread(read_batch, call.body, call.document, parts, drop)
        return read_batch(call.body, call.document, parts, drop)


def _sampled(parts: KeyParts, sample: str) -> KeyParts:
    """Sample 0 is a request without one."""
    return parts if sample in ("", "0") else replace(parts, sample=sample)


def _key_and_field_digests(parts: KeyParts) -> tuple[str, str]:
    return cache_key(parts), field_digests_of(parts)
