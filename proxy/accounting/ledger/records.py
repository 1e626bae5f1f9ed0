"""Rows of the ledger: a kind, which many requests share, and the numbers of one request.

Amounts of money are exact: whole 1e-12 USD as an integer, which SQL can add up, and the rest as decimal text. A row
holds names, counts, costs, times and 60 bits of the cache key, but no text of a request or response and no credential.
"""

from __future__ import annotations

import hashlib
from decimal import Context, Decimal
from functools import lru_cache, reduce
from typing import Final, NamedTuple

import msgspec

from ...cache.entry import Entry
from ...cost.usage import Usage
from ...protocol.json_parse import printable_name
from ..receipt import Receipt

MAX_NAME: Final = 200
"""Characters kept of a name that a client chose: a model, a tag, a run."""

MAX_TAGS: Final = 32
PLACES: Final = 12
"""Decimal places of the integers, whose unit is 1e-12 USD."""

_LARGEST: Final = 10**15
"""Amounts of 1,000 USD and more are kept as text, so that sums of integers stay far below 64 bits."""

_EXACT: Final = Context(prec=80)
_USUAL: Final = frozenset({"prompt_tokens", "cached_tokens", "completion_tokens", "total_tokens"})


class RecordKind(NamedTuple):
    """What requests have in common. key: the upstream key's label; sampled: neither temperature 0 nor a seed."""

    client: str
    endpoint: str
    model: str
    answer_model: str
    status: int
    error: str
    cache: str
    stream: bool
    upstream: str
    key: str
    cost_status: str
    sampled: bool
    tags: tuple[str, ...]
    run: str


class LedgerRecord(NamedTuple):
    """One row: one or more requests of a kind. Tokens, attempts and amounts are sums.

    time: Unix milliseconds.
    other: tokens and calls of rarer kinds, as JSON.
    cost, saved: 1e-12 USD; None if unknown.
    rest: what these two leave out, as `cost saved` in USD.
    queue, upstream, duration, first: the mean in microseconds.
    digest: 60 bits of the cache key; None without one.
    """

    time: int
    kind: int
    requests: int
    attempts: int
    prompt: int
    cached: int
    completion: int
    total: int
    other: str | None
    cost: int | None
    saved: int | None
    rest: str | None
    queue: int
    upstream: int
    duration: int
    first: int
    digest: int | None


class HitCounter:
    """Hits of one entry by one client between two flushes. `count` and `milliseconds` grow.

    wall: Unix seconds of the first hit.
    spent: milliseconds in which the first hit was served.
    """

    __slots__ = (
        *(
            "answer_model",
            "client",
            "cost",
            "count",
            "endpoint",
            "estimated",
            "form",
            "key",
            "milliseconds",
            "model",
            "run",
        ),
        *("sampled", "tags", "usage", "wall"),
    )

    def __init__(self, entry: Entry, client: str, tags: tuple[str, ...], run: str, wall: float, spent: float) -> None:
        self.count = 1
        self.milliseconds = spent
        self.wall = wall
        self.client = client
        self.tags = tags
        self.run = run
        self.key = entry.key
        self.form = entry.form
        self.endpoint = entry.endpoint
        self.model = entry.model
        self.answer_model = entry.answer_model
        self.cost = entry.cost
        self.usage = entry.usage
        self.sampled = entry.sampled
        self.estimated = entry.estimated

    def receipt(self) -> Receipt:
        """Return the receipt of one of the hits, with the mean of their times."""
        return Receipt(
            id="",
            client=self.client,
            endpoint=self.endpoint,
            model=self.model,
            status=200,
            cache="hit",
            finished_at=self.wall,
            answer_model=self.answer_model,
            stream=self.form == "sse",
            cost_usd="0.000000",
            saved_usd=self.cost,
            cost_status="estimated" if self.estimated else "exact",
            usage=self.usage,
            total_ms=self.milliseconds / self.count,
            tags=self.tags,
            run=self.run,
            cache_key=self.key,
            sampled=self.sampled,
        )


def error_receipt(code: str, status: int, client: str, endpoint: str, wall: float) -> Receipt:
    """Return the receipt of a request that was refused before it was parsed. wall: Unix seconds."""
    return Receipt(
        id="",
        client=client,
        endpoint=endpoint,
        model="",
        status=status,
        cache="bypass",
        finished_at=wall,
        error=code,
    )


def kind_of(receipt: Receipt) -> RecordKind:
    """Return the kind of a request. Names are cut, so that a client cannot fill the ledger with them."""
    return RecordKind(
        client=receipt.client,
        endpoint=_name(receipt.endpoint),
        model=_name(receipt.model),
        answer_model=_name(receipt.answer_model or ""),
        status=receipt.status,
        error=_name(f"{receipt.error} {receipt.upstream_code}") if receipt.upstream_code else receipt.error,
        cache=receipt.cache,
        stream=receipt.stream,
        upstream=receipt.upstream,
        key=receipt.key,
        cost_status=receipt.cost_status,
        sampled=receipt.sampled,
        tags=tuple(map(_name, receipt.tags[:MAX_TAGS])),
        run=_name(receipt.run),
    )


def kind_id(kind: RecordKind) -> int:
    """Return a kind's number: 63 bits of a digest, so that every process gives it the same without reading the file."""
    return int.from_bytes(hashlib.blake2b(msgspec.json.encode(kind), digest_size=8).digest(), "big") >> 1


def record_of(receipt: Receipt, kind: int, count: int = 1) -> LedgerRecord:
    """Return the row for `count` requests with this receipt."""
    usage = receipt.usage
    cost, cost_rest = amount(receipt.cost_usd, count)
    saved, saved_rest = amount(receipt.saved_usd, count)
    first = receipt.total_ms if receipt.first_byte_ms is None else receipt.first_byte_ms
    return LedgerRecord(
        time=int(receipt.finished_at * 1000),
        kind=kind,
        requests=count,
        attempts=receipt.attempts * count,
        prompt=usage.prompt_tokens * count if usage else 0,
        cached=usage.cached_tokens * count if usage else 0,
        completion=usage.completion_tokens * count if usage else 0,
        total=usage.total_tokens * count if usage else 0,
        other=_other(usage, count) if usage else None,
        cost=cost,
        saved=saved,
        rest=f"{cost_rest:f} {saved_rest:f}" if cost_rest or saved_rest else None,
        queue=round(receipt.queue_ms * 1000),
        upstream=round(receipt.upstream_ms * 1000),
        duration=round(receipt.total_ms * 1000),
        first=round(first * 1000),
        digest=_digest(receipt.cache_key) if receipt.cache_key else None,
    )


def amount(text: str | None, count: int = 1) -> tuple[int | None, Decimal]:
    """Return `count` times an amount of USD, as whole 1e-12 USD and the exact rest; (None, 0) if it is unknown."""
    if text is None:
        return None, Decimal(0)
    whole, rest = _amount(text)
    if count != 1:
        whole, rest = whole * count, _EXACT.multiply(rest, count)
    if whole > _LARGEST:
        whole, rest = 0, _EXACT.add(rest, _EXACT.scaleb(Decimal(whole), -PLACES))
    return whole, rest


@lru_cache(4096)
def _amount(text: str) -> tuple[int, Decimal]:
    whole = _EXACT.scaleb(Decimal(text), PLACES)
    number = int(whole)
    return number, _EXACT.scaleb(_EXACT.subtract(whole, Decimal(number)), -PLACES)


def dollars(whole: int, *rests: Decimal) -> Decimal:
    """Return the exact sum, in USD, of 1e-12 USD and what they leave out."""
    return reduce(_EXACT.add, rests, _EXACT.scaleb(Decimal(whole), -PLACES))


def _other(usage: Usage, count: int) -> str | None:
    """Return tokens and calls of rarer kinds, as JSON."""
    if usage.plain and not usage.cache_write_tokens:
        return None
    counts: dict[str, int] = msgspec.to_builtins(usage)
    return msgspec.json.encode({name: n * count for name, n in counts.items() if n and name not in _USUAL}).decode()


def _digest(key: str) -> int:
    """Return the first 60 bits of a cache key, which is hexadecimal."""
    return int(key[:15], 16)


def _name(text: str) -> str:
    return text if text.isascii() and len(text) <= MAX_NAME else printable_name(text[:MAX_NAME])
