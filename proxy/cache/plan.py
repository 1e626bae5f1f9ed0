"""`CachePlan`: what a request may read and write in the cache, under which key, or why it may not."""

from __future__ import annotations

from typing import Literal

import msgspec

from ..config.settings import CacheSettings
from ..protocol.request import ProxyRequest
from .embeddings import EmbeddingBatch

CacheStatus = Literal["hit", "miss", "bypass", "partial", "coalesced"]


class CachePlan(msgspec.Struct, frozen=True):
    """What the cache may do for a request.

    key: '' if nothing. reason: why it is a miss or bypass. read, write: allowed. fwd: as in Cache-Status (RFC 9211
    section 2.2). batch: the items of an embeddings request, if each has an entry of its own. field_digests: as in
    `miss_reason`. unpartitioned_key: the key without the client's partition, '' if that is the key. request: the
    canonical body, if it is to be stored. collapsed: another request's upstream call answers it.
    """

    key: str
    reason: str
    read: bool
    write: bool
    fwd: str = "uri-miss"
    batch: EmbeddingBatch | None = None
    field_digests: str = ""
    unpartitioned_key: str = ""
    request: str | None = None
    collapsed: bool = False

    @property
    def status(self) -> CacheStatus:
        if self.collapsed:
            return "coalesced"
        if self.batch is not None and self.batch.found:
            return "partial"
        return "miss" if self.key else "bypass"


def endpoint_ttl(settings: CacheSettings, endpoint: str) -> float:
    """Return for how many seconds responses of this endpoint are fresh, by the settings."""
    seconds: float = getattr(settings.ttl, endpoint)
    return seconds


def ttl_of(settings: CacheSettings, request: ProxyRequest) -> float:
    """Return for how many seconds the response to this request is fresh."""
    asked = request.options.ttl
    return endpoint_ttl(settings, request.endpoint) if asked is None else asked
