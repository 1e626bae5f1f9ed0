"""`CachePlan`: what a request may read and write in the cache, under which key, and why not."""

from __future__ import annotations

from typing import Literal

import msgspec

from .embeddings import EmbeddingBatch

CacheStatus = Literal["hit", "miss", "bypass", "partial", "coalesced"]


class CachePlan(msgspec.Struct, frozen=True):
    """What the cache may do for a call. key: '' where it may do nothing; reason: why a miss or bypass;
    read, write: allowed; forward: the `fwd` of Cache-Status (RFC 9211 section 2.2); batch: the items of the request,
    where each has an entry of its own; traits: of `core.explain`; bare: the key less the client's scope, '' where that
    is the key; request: the canonical body, where it is to be stored; collapsed: another's upstream call answers it."""

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
