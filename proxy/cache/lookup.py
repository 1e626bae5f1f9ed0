"""The cache as the journey sees it: what is found there, in either form, and what is put there.

`peek` is the short way: an answer from memory, found by the digest of the raw bytes, without parsing anything.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import math
from collections import OrderedDict
from collections.abc import Sequence
from functools import partial
from typing import Final, NamedTuple

import msgspec

from ..cost.pricing import Cost, usd
from ..cost.usage import Usage
from ..protocol.errors import ProxyError
from ..protocol.headers import Raw, storable_headers
from ..protocol.request import ProxyRequest
from ..protocol.routes import printable
from ..services import Services
from ..upstream.response import ResponseInHand
from .completeness import is_deterministic
from .embeddings import EmbeddingBatch, cached, item_entries, made_of
from .entry import Entry, Form
from .forms import converted, other_form
from .miss_reason import RecentRequests, nearest, shown_names, why_missed
from .plan import CachePlan
from .stores.build import max_stale
from .stores.interface import Filter, StoreError

LARGE: Final = 256 * 1024
"""Stored answers above this are converted in a thread (bytes)."""

REVALIDATING: Final = "stale-while-revalidate"

COMPARED: Final = 20_000
"""So many recorded requests are compared with one that was not."""

_MEMO_SIZE: Final = 20_000


class CacheHit(msgspec.Struct, frozen=True):
    """An answer from the cache. body: as this caller asked for it; sampled is told in Cache-Status; lines: more of our
    headers; run: whose it is.

    stale: why an entry past its lifetime was served, '' on other hits; attempts: calls that failed before it was;
    forwarded: whether it stands in for an upstream's answer.
    """

    entry: Entry
    body: bytes
    id: str
    lines: str = ""
    run: str = ""
    stale: str = ""
    attempts: int = 0
    fwd: bool = False


class NewEntry(NamedTuple):
    """What was bought, less its body. model: as the answer names it."""

    answered: ResponseInHand
    headers: Sequence[Raw]
    usage: Usage | None
    cost: Cost | None
    model: object


RequestDigest = tuple[str, str, bytes]
"""What a request is remembered by: raw target, the client's scope, the digest of the raw body."""


def digest_of_request(target: str, scope: str, body: bytes) -> RequestDigest:
    return target, scope, hashlib.sha256(body).digest()


class MemoizedKey(msgspec.Struct, frozen=True, gc=False):
    """What the raw bytes of an earlier request turned out to ask for. (gc=False: many are kept, none in a cycle.)"""

    key: str
    form: str
    wants_usage: bool


class ResponseCache:
    """Finds and keeps the answers of one world."""

    def __init__(self, services: Services) -> None:
        self._services = services
        self._memo: OrderedDict[tuple[str, str, bytes], MemoizedKey] = OrderedDict()
        self.recent = RecentRequests()
        self._purges = 0
        self._replays = services.replays
        self._past_end = math.inf if services.replays else 0.0

    def peek(self, name: RequestDigest) -> CacheHit | None:
        """The stored answer to a request whose very bytes were seen before and which asks for nothing special."""
        known = self._memo.get(name)
        if known is None or self._services.store is None:
            return None
        return self._find(self._services.store.peek(known.key, known.form), known.wants_usage, None)

    def _find(
        self, entry: Entry | None, wants_usage: bool, max_age: int | None, past_end: float | None = None
    ) -> CacheHit | None:
        """past_end: seconds by which its lifetime may be over; None: as always in this mode."""
        if entry is None or not self._may_serve(entry, max_age, self._past_end if past_end is None else past_end):
            return None
        body = entry.body_for(wants_usage)
        if body is None:
            return None
        return CacheHit(entry, body, self._services.clock.new_id())

    def _may_serve(self, entry: Entry, max_age: int | None, past_end: float) -> bool:
        wall = self._services.clock.wall()
        return wall < entry.expires_at + past_end and (max_age is None or entry.age(wall) <= max_age)

    def memoize(self, name: RequestDigest, call: ProxyRequest, plan: CachePlan) -> None:
        """Lets `peek` answer when the same bytes come again."""
        if plan.key and plan.read and plan.write:
            self._memo[name] = MemoizedKey(plan.key, "sse" if call.stream else "json", call.wants_usage)
            if len(self._memo) > _MEMO_SIZE:
                self._memo.popitem(last=False)

    async def lookup(self, call: ProxyRequest, plan: CachePlan) -> tuple[CacheHit | None, CachePlan]:
        """The stored answer, or the plan with the reason why there is none. Raises ProxyError(not_cached)."""
        store, options = self._services.store, call.options
        if store is not None and plan.read:
            form: Form = "sse" if call.stream else "json"
            wall = self._services.clock.wall()
            entry, other = await store.get_both(plan.key, form, other_form(form), wall)
            max_age = None if self._replays else options.max_age
            hit = await self._in_either_form(call, entry, other, max_age, self._past_end)
            if hit is not None:
                self.recent.add(call.client.cache_partition, hit.entry)
                return hit, plan
            if plan.batch is not None:
                plan = await self._lookup_items(plan, plan.batch, max_age)
                if plan.batch is not None and len(plan.batch.found) == len(plan.batch.keys):
                    return await self._made_of_items(plan.key, plan.batch), plan
            if self._replays:
                plan = msgspec.structs.replace(plan, reason=await self._why_not_recorded(call, plan))
            elif plan.fwd != "partial":
                reason, forward = self._why_missed(call, plan, entry, other, wall)
                plan = msgspec.structs.replace(plan, reason=reason, fwd=forward)
            if while_revalidate := self._services.settings.cache.stale_while_revalidate:
                hit = await self._in_either_form(call, entry, other, max_age, while_revalidate)
                if hit is not None:
                    return msgspec.structs.replace(hit, stale=REVALIDATING), plan
        if self._replays:
            raise _not_cached(plan, _not_recorded(call, plan, self._services.identity(call.model)))
        if options.only_if_cached:
            raise _not_cached(plan, f"no stored answer ({plan.reason}), and only-if-cached asks for no other")
        return None, plan

    async def _why_not_recorded(self, call: ProxyRequest, plan: CachePlan) -> str:
        """How a request differs from the nearest of those that were recorded, whatever it asks."""
        assert self._services.store is not None
        found: tuple[Entry, list[str]] | None = None
        after, compared = "", 0
        with contextlib.suppress(StoreError):
            while compared < COMPARED:
                page = await self._services.store.list(Filter(endpoint=call.endpoint), after)
                entries = [listed.entry for listed in page.entries] + ([found[0]] if found is not None else [])
                found = nearest(((entry, entry.traits) for entry in entries), plan.field_digests)
                after, compared = page.next, compared + len(page.entries)
                if not after:
                    break
        return f"{plan.reason}; {shown_names(found[1])}" if found is not None and found[1] else plan.reason

    async def _lookup_items(self, plan: CachePlan, batch: EmbeddingBatch, max_age: int | None) -> CachePlan:
        """The plan with those items that are cached."""
        assert self._services.store is not None
        entries = await self._services.store.get_many(batch.keys, "json", self._services.clock.wall())
        usable = {
            number: entry
            for number, entry in enumerate(entries)
            if entry is not None and self._may_serve(entry, max_age, self._past_end)
        }
        if sum(len(entry.body) for entry in usable.values()) > LARGE:
            found = await asyncio.to_thread(cached, usable)
        else:
            found = cached(usable)
        if not found:
            return plan
        new = f"{len(batch.keys) - len(found)} of {len(batch.keys)} new"
        batch = msgspec.structs.replace(batch, found=found)
        return msgspec.structs.replace(plan, reason=new, fwd="partial", batch=batch)

    async def _made_of_items(self, key: str, batch: EmbeddingBatch) -> CacheHit:
        if sum(len(found.vector) for found in batch.found.values()) > LARGE:
            entry, body = await asyncio.to_thread(made_of, key, batch)
        else:
            entry, body = made_of(key, batch)
        return CacheHit(entry, body, self._services.clock.new_id())

    def _why_missed(
        self, call: ProxyRequest, plan: CachePlan, entry: Entry | None, other: Entry | None, wall: float
    ) -> tuple[str, str]:
        """The reason, and the `fwd` of Cache-Status."""
        why = why_missed(entry, other, wall, call.options.max_age, call.wants_usage)
        if why is not None:
            return why
        assert self._services.store is not None
        if self._purges != self._services.store.purges:
            self._purges = self._services.store.purges
            self.recent.clear()
        return self.recent.reason(
            call.client.cache_partition, call.endpoint, plan.key, plan.field_digests, wall
        ), plan.fwd

    def stale_if_error_seconds(self, call: ProxyRequest, plan: CachePlan) -> float:
        """Seconds past its lifetime for which an answer may stand in for a failure; 0: none may.

        RFC 5861 section 4: a request's own stale-if-error goes before the setting, and before what else it says of age;
        without one its no-cache holds.
        """
        if self._services.store is None or not plan.key:
            return 0.0
        if call.options.stale_if_error is not None:
            return float(call.options.stale_if_error)
        return self._services.settings.cache.stale_if_error if plan.read else 0.0

    def stale_if_budget_seconds(self, plan: CachePlan) -> float:
        """The same where a budget is used up: as long as answers are kept, where only the cache is to serve then."""
        services = self._services
        if services.store is None or not (
            plan.key and plan.read and services.budgets.active and services.budgets.cache_only
        ):
            return 0.0
        return max_stale(services.settings.cache)

    async def stale_if_error(
        self, call: ProxyRequest, plan: CachePlan, why: str, attempts: int, patience: float = 0.0
    ) -> CacheHit | None:
        """A stored answer in place of the failure `why`, however old the settings or the request accept it to be, or
        `patience` seconds past its lifetime.
        """
        wall = self._services.clock.wall()
        store, seconds = self._services.store, max(self.stale_if_error_seconds(call, plan), patience)
        if store is None or seconds <= 0:
            return None
        form: Form = "sse" if call.stream else "json"
        max_age = call.options.max_age if call.options.stale_if_error is None else None
        hit = await self._in_either_form(
            call, *await store.get_both(plan.key, form, other_form(form), wall), max_age, seconds
        )
        if hit is None:
            return None
        return msgspec.structs.replace(hit, id=call.id, stale=f"stale-if-error: {why}", attempts=attempts, fwd=True)

    async def _in_either_form(
        self, call: ProxyRequest, entry: Entry | None, other: Entry | None, max_age: int | None, past_end: float
    ) -> CacheHit | None:
        """The answer from the entry in the form asked for, else from the one in the other form."""
        hit = self._find(entry, call.wants_usage, max_age, past_end)
        if hit is None and other is not None and self._services.clock.wall() < other.expires_at + past_end:
            hit = self._find(await self._converted(call, other), call.wants_usage, max_age, past_end)
        return hit

    async def _converted(self, call: ProxyRequest, other: Entry) -> Entry | None:
        """The answer as stored for the other kind of request, in this one's form; kept in it for the next time."""
        if len(other.body) > LARGE:
            entry = await asyncio.to_thread(converted, other, call.document)
        else:
            entry = converted(other, call.document)
        if entry is not None and self._services.store is not None:
            self._services.store.put(entry)
        return entry

    def store(
        self,
        call: ProxyRequest,
        plan: CachePlan,
        goods: NewEntry,
        body: bytes,
        usage_span: tuple[int, int] | None = None,
    ) -> bool:
        """Stores an answer. Whether it was."""
        assert self._services.store is not None
        entry = self._entry(call, plan, goods, body, usage_span)
        return entry.ttl > 0 and self._put(call.client.cache_partition, entry)

    async def store_items(
        self, call: ProxyRequest, plan: CachePlan, goods: NewEntry, numbers: Sequence[int], vectors: Sequence[bytes]
    ) -> bool:
        """Stores each of the items of these `numbers` under its own key. Whether any was."""
        store, batch = self._services.store, plan.batch
        assert store is not None
        assert batch is not None
        plan = msgspec.structs.replace(plan, field_digests="")  # those of the whole batch say nothing of one item
        template = self._entry(call, plan, goods._replace(cost=None), b"", None)
        if template.ttl <= 0:
            return False
        upstream, models = goods.answered.upstream, (template.answer_model, call.model)
        price = partial(upstream.prices.cost, upstream.address.kind, models) if goods.cost is not None else None
        if sum(map(len, vectors)) > LARGE:
            entries = await asyncio.to_thread(item_entries, template, batch, numbers, vectors, price)
        else:
            entries = item_entries(template, batch, numbers, vectors, price)
        if plan.request is not None:
            mask = self._services.masker.mask_text
            entries = [msgspec.structs.replace(entry, request=mask(entry.request or "")) for entry in entries]
        stored = [store.put(entry) for entry in entries]
        return any(stored)

    def _entry(
        self, call: ProxyRequest, plan: CachePlan, goods: NewEntry, body: bytes, usage_span: tuple[int, int] | None
    ) -> Entry:
        ttl = call.options.ttl if call.options.ttl is not None else self._services.ttl(call.endpoint)
        return Entry(
            key=plan.key,
            form="sse" if call.stream else "json",
            status=goods.answered.status,
            headers=storable_headers(goods.headers),
            body=body,
            usage_span=usage_span,
            stored_at=self._services.clock.wall(),
            ttl=ttl,
            endpoint=call.endpoint,
            model=call.model,
            answer_model=goods.model if isinstance(goods.model, str) else None,
            usage=goods.usage,
            cost=usd(goods.cost.usd) if goods.cost is not None else None,
            namespace=call.options.namespace,
            tags=call.options.tags,
            sampled=not is_deterministic(call.endpoint, call.document),
            usage_asked=call.wants_usage or goods.answered.injected,
            traits=plan.field_digests,
            request=plan.request,
            bare=plan.unpartitioned_key,
        )

    def _put(self, scope: str, entry: Entry) -> bool:
        assert self._services.store is not None
        stored = self._services.store.put(entry)
        if stored:
            self.recent.add(scope, entry)
        return stored


def _not_cached(plan: CachePlan, message: str) -> ProxyError:
    headers = (("X-Proxy-Cache", plan.status), ("X-Proxy-Cache-Reason", plan.reason))
    return ProxyError("not_cached", message, headers=headers)


def _not_recorded(call: ProxyRequest, plan: CachePlan, identity: str) -> str:
    """What a person needs to find out why a replay has no answer: what it looked for."""
    if not plan.key:
        return f"replay: this request is never stored ({plan.reason}), and nothing is sent upstream"
    options = call.options
    asked = {"namespace": options.namespace, "sample": options.sample, "query": call.route.query}
    further = "".join(f", {name} {value!r}" for name, value in asked.items() if value)
    model, upstream = printable(call.model, 60), printable(identity.replace("\n", " + "))
    return (
        f"replay: {plan.reason}, and nothing is sent upstream; looked for {call.endpoint}, model {model!r}, "
        f"upstream {upstream}{further}"
    )
