"""What the cache may do for a request, and under which key: the first decision about every request."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from msgspec.structs import replace

from ..config.settings import CacheSettings
from ..protocol.masking import SecretMasker
from ..protocol.request import ProxyRequest
from ..protocol.routes import Shape
from ..system.threads import in_thread_if_large
from .completeness import is_deterministic
from .embeddings import EmbeddingBatch, read_batch
from .fields import dropped_fields, request_bypass
from .key import KeyParts, NotCacheable, cache_key, canonical, partitioned
from .miss_reason import field_digests_of
from .plan import CachePlan


class Planner:
    """Plans requests.

    settings: those of the cache.
    identity: returns what stands in the key for the upstreams that serve a model, for a request in a shape.
    sample: returns the sample number that a run gives a request, by its key without one.
    masker: takes secrets out of request bodies that are stored.
    """

    def __init__(
        self,
        settings: CacheSettings,
        *,
        identity: Callable[[str, Shape], str],
        sample: Callable[[ProxyRequest, str], Awaitable[str]],
        masker: SecretMasker,
    ) -> None:
        self._settings = settings
        self._identity = identity
        self._sample = sample
        self._masker = masker

    async def plan(self, request: ProxyRequest) -> CachePlan:
        """Return what the cache may do for this request, and under which key."""
        settings, options = self._settings, request.options
        why_not = self._bypass(request)
        if why_not is not None:
            return _bypassed(why_not)
        drop = dropped_fields(request.endpoint, settings.ignore_fields)
        try:
            parts = await in_thread_if_large(len(request.body), self.key_parts, request, drop)
        except NotCacheable as error:
            return _bypassed(f"uncacheable: {error.reason}")
        sample, partition = options.sample, request.client.cache_partition
        if options.run and not sample:
            sample = await self._sample(request, partitioned((await self._key(parts))[0], partition))
        parts = _with_sample(parts, sample)
        batch = await self._batch(request, parts, drop)
        unpartitioned, digests = await self._key(parts)
        if batch is not None and len(batch.order) == 1:
            unpartitioned, batch = batch.unpartitioned_keys[0], None  # stored as that one item
        if settings.mode == "replay":  # neither whose response it was nor its age matters; no-cache is about age
            return CachePlan(unpartitioned, "not recorded", True, True, batch=batch, field_digests=digests)
        key = partitioned(unpartitioned, partition)
        if batch is not None and partition:
            batch = replace(batch, keys=tuple([partitioned(item, partition) for item in batch.unpartitioned_keys]))
        reason, read, fwd = "new", True, "uri-miss"
        if settings.mode == "refresh":
            reason, read, fwd = "refresh", False, "bypass"
        elif options.no_cache:
            reason, read, fwd = "no-cache", False, "request"
        stored_body = self._masker.mask(parts.body).decode() if settings.store_requests else None
        other = unpartitioned if unpartitioned != key else ""
        return CachePlan(key, reason, read, True, fwd, batch, digests, other, stored_body)

    def _bypass(self, request: ProxyRequest) -> str | None:
        """Return why the cache may do nothing for this request; None: it may."""
        settings = self._settings
        if settings.backend == "off":
            return "off"
        if settings.when == "never":
            return "when=never"
        if request.options.no_store:
            return "no-store"
        why_not = request_bypass(request.endpoint, request.document)
        if why_not is None and settings.when == "deterministic":
            why_not = None if is_deterministic(request.endpoint, request.document) else "uncacheable: sampled"
        return why_not

    async def _key(self, parts: KeyParts) -> tuple[str, str]:
        """Return the key without the client's partition, and the digests that tell how it differs from another."""
        return await in_thread_if_large(len(parts.body), _key_and_field_digests, parts)

    def key_parts(self, request: ProxyRequest, drop: frozenset[str]) -> KeyParts:
        """Return what the key is made of, without sample and partition. Raises NotCacheable."""
        beta = [value for name, value in request.headers if len(name) == 11 and name.lower() == b"openai-beta"]
        route = request.route
        return KeyParts(
            endpoint=request.endpoint,
            namespace=request.options.namespace,
            model=f"{request.model}\n{route.deployment or ''}",
            upstreams=self._identity(request.model, route.shape),
            beta=b", ".join(beta).decode("latin-1"),
            sample="",
            query=route.query,
            body=canonical(request.body, drop),
        )

    async def _batch(self, request: ProxyRequest, parts: KeyParts, drop: frozenset[str]) -> EmbeddingBatch | None:
        """Return the items of a request that have keys of their own."""
        if request.endpoint != "embeddings" or request.stream or not self._settings.embeddings_per_item:
            return None
        return await in_thread_if_large(len(request.body), read_batch, request.body, request.document, parts, drop)


def _bypassed(reason: str) -> CachePlan:
    return CachePlan("", reason, read=False, write=False, fwd="bypass")


def _with_sample(parts: KeyParts, sample: str) -> KeyParts:
    """Sample 0 is a request without one."""
    return parts if sample in ("", "0") else replace(parts, sample=sample)


def _key_and_field_digests(parts: KeyParts) -> tuple[str, str]:
    return cache_key(parts), field_digests_of(parts)
