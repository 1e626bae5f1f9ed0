"""Receipts of finished requests, as `GET /_proxy/requests/{id}` shows them."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, Final

import msgspec

from ..cache.entry import Entry
from ..cost.usage import Usage
from ..protocol.json_parse import printable_name

RECEIPTS_KEPT: Final = 10_000


class Receipt(msgspec.Struct, frozen=True, gc=False):
    """The receipt of one request. Thousands are kept; none can be part of a reference cycle, hence `gc=False`.

    cost_usd, saved_usd: decimals as text; None if unknown.
    queue_ms, upstream_ms, total_ms: milliseconds.
    first_byte_ms: milliseconds until a stream's first event; None if the response was not streamed.
    finished_at: Unix seconds.
    sampled: the request has neither temperature 0 nor a seed.
    traceparent: the request's trace, if it names a valid one.
    upstream_code: of an error, the upstream's own code for it.
    retries: why each further attempt was made.
    """

    id: str
    client: str
    endpoint: str
    model: str
    status: int
    cache: str
    finished_at: float
    reason: str = ""
    answer_model: str | None = None
    stream: bool = False
    upstream: str = ""
    key: str = ""
    attempts: int = 0
    cost_usd: str | None = None
    saved_usd: str | None = None
    cost_status: str = "unknown"
    usage: Usage | None = None
    error: str = ""
    queue_ms: float = 0.0
    upstream_ms: float = 0.0
    total_ms: float = 0.0
    tags: tuple[str, ...] = ()
    run: str = ""
    first_byte_ms: float | None = None
    cache_key: str = ""
    sampled: bool = False
    traceparent: str = ""
    upstream_code: str = ""
    retries: tuple[str, ...] = ()

    def as_json(self) -> dict[str, Any]:
        usage = self.usage
        return {
            "id": self.id,
            "endpoint": self.endpoint,
            "model": printable_name(self.model),
            "answer_model": printable_name(self.answer_model) if self.answer_model is not None else None,
            "client": self.client or None,
            "status": self.status,
            "stream": self.stream,
            "cache": self.cache,
            "cache_reason": self.reason or None,
            "upstream": self.upstream or None,
            "key": self.key or None,
            "attempts": self.attempts,
            "cost_usd": self.cost_usd,
            "saved_usd": self.saved_usd,
            "cost_status": self.cost_status,
            "prompt_tokens": usage.prompt_tokens if usage else None,
            "cached_tokens": usage.cached_tokens if usage else None,
            "completion_tokens": usage.completion_tokens if usage else None,
            "total_tokens": usage.total_tokens if usage else None,
            "error": self.error or None,
            "upstream_code": self.upstream_code or None,
            "retries": list(self.retries),
            "queue_ms": round(self.queue_ms, 3),
            "upstream_ms": round(self.upstream_ms, 3),
            "total_ms": round(self.total_ms, 3),
            "first_byte_ms": round(self.total_ms if self.first_byte_ms is None else self.first_byte_ms, 3),
            "tags": list(self.tags),
            "run": self.run or None,
            "traceparent": self.traceparent or None,
            "finished_at": round(self.finished_at, 3),
        }


class Receipts:
    """The last receipts. kept: how many."""

    def __init__(self, kept: int = RECEIPTS_KEPT) -> None:
        self._kept = kept
        self._by_id: OrderedDict[str, Receipt | tuple[Any, ...]] = OrderedDict()

    def put(self, receipt: Receipt) -> None:
        self._by_id[receipt.id] = receipt
        if len(self._by_id) > self._kept:
            self._by_id.popitem(last=False)

    def put_hit(
        self, id_: str, client: str, entry: Entry, wall: float, run: str = "", tags: tuple[str, ...] = ()
    ) -> None:
        """Note a hit. Its receipt is built only on request, since hits are frequent; the entry's body is not kept.

        wall: Unix seconds.
        """
        self._by_id[id_] = (
            client,
            entry.endpoint,
            entry.model,
            entry.answer_model,
            entry.form,
            entry.cost,
            entry.usage,
            entry.estimated,
            wall,
            run,
            tags,
        )
        if len(self._by_id) > self._kept:
            self._by_id.popitem(last=False)

    def get(self, id_: str) -> Receipt | None:
        found = self._by_id.get(id_)
        if found is None or isinstance(found, Receipt):
            return found
        client, endpoint, model, answer_model, form, cost, usage, estimated, wall, run, tags = found
        return Receipt(
            id=id_,
            client=client,
            endpoint=endpoint,
            model=model,
            status=200,
            cache="hit",
            finished_at=wall,
            answer_model=answer_model,
            stream=form == "sse",
            cost_usd="0.000000",
            saved_usd=cost,
            cost_status="estimated" if estimated else "exact",
            usage=usage,
            run=run,
            tags=tags,
        )
