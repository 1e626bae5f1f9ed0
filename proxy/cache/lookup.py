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
from ..protocol.errors import Refusal
from ..protocol.headers import Raw, storable_headers
from ..protocol.request import Call
from ..protocol.routes import printable
from ..services import World
from ..upstream.response import Answered
from .completeness import is_deterministic
from .embeddings import Batch, cached, item_entries, made_of
from .entry import Entry, Form
from .forms import converted, other_form
from .miss_reason import Recent, nearest, told, why_missed
from .plan import CachePlan
from .stores.build import kept_past_end
from .stores.interface import Filter, StoreError

LARGE: Final = 256 * 1024
"""Stored answers above this are converted in a thread (bytes)."""

REVALIDATING: Final = "stale-while-revalidate"

COMPARED: Final = 20_000
"""So many recorded requests are compared with one that was not."""

_MEMO_SIZE: Final = 20_000


class Hit(msgspec.Struct, frozen=True):
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
    forwarded: bool = False


class Goods(NamedTuple):
    """What was bought, less its body. model: as the answer names it."""

    answered: Answered
    headers: Sequence[Raw]
    usage: Usage | None
    cost: Cost | None
    model: object


Name = tuple[str, str, bytes]
"""What a request is remembered by: raw target, the client's scope, the digest of the raw body."""


def name_of(target: str, scope: str, body: bytes) -> Name:
    return target, scope, hashlib.sha256(body).digest()


class Remembered(msgspec.Struct, frozen=True, gc=False):
    """What the raw bytes of an earlier request turned out to ask for. (gc=False: many are kept, none in a cycle.)"""

    key: str
    form: str
    wants_usage: bool


class Shelf:
    """Finds and keeps the answers of one world."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._memo: OrderedDict[tuple[str, str, bytes], Remembered] = OrderedDict()
        self.recent = Recent()
        self._purges = 0
        self._replays = world.replays
        self._past_end = math.inf if world.replays else 0.0

    def peek(self, name: Name) -> Hit | None:
        """The stored answer to a request whose very bytes were seen before and which asks for nothing special."""
        known = self._memo.get(name)
        if known is None or self._world.store is None:
            return None
        return self._find(self._world.store.peek(known.key, known.form), known.wants_usage, None)

    def _find(
        self, entry: Entry | None, wants_usage: bool, max_age: int | None, past_end: float | None = None
    ) -> Hit | None:
        """past_end: seconds by which its lifetime may be over; None: as always in this mode."""
        if entry is None or not self._may_serve(entry, max_age, self._past_end if past_end is None else past_end):
            return None
        body = entry.body_for(wants_usage)
        if body is None:
            return None
        return Hit(entry, body, self._world.seams.new_id())

    def _may_serve(self, entry: Entry, max_age: int | None, past_end: float) -> bool:
        wall = self._world.seams.wall()
        return wall < entry.expires_at + past_end and (max_age is None or entry.age(wall) <= max_age)

    def remember(self, name: Name, call: Call, plan: CachePlan) -> None:
        """Lets `peek` answer when the same bytes come again."""
        if plan.key and plan.read and plan.write:
            self._memo[name] = Remembered(plan.key, "sse" if call.stream else "json", call.wants_usage)
            if len(self._memo) > _MEMO_SIZE:
                self._memo.popitem(last=False)

    async def look(self, call: Call, plan: CachePlan) -> tuple[Hit | None, CachePlan]:
        """The stored answer, or the plan with the reason why there is none. Raises Refusal(not_cached)."""
        store, options = self._world.store, call.options
        if store is not None and plan.read:
            form: Form = "sse" if call.stream else "json"
            wall = self._world.seams.wall()
            entry, other = await store.get_both(plan.key, form, other_form(form), wall)
            max_age = None if self._replays else options.max_age
            hit = await self._either(call, entry, other, max_age, self._past_end)
            if hit is not None:
                self.recent.add(call.client.scope, hit.entry)
                return hit, plan
            if plan.batch is not None:
                plan = await self._look_for_items(plan, plan.batch, max_age)
                if plan.batch is not None and len(plan.batch.found) == len(plan.batch.keys):
                    return await self._made_of_items(plan.key, plan.batch), plan
            if self._replays:
                plan = msgspec.structs.replace(plan, reason=await self._why_not_recorded(call, plan))
            elif plan.forward != "partial":
                reason, forward = self._why_missed(call, plan, entry, other, wall)
                plan = msgspec.structs.replace(plan, reason=reason, forward=forward)
            if while_revalidate := self._world.settings.cache.stale_while_revalidate:
                hit = await self._either(call, entry, other, max_age, while_revalidate)
                if hit is not None:
                    return msgspec.structs.replace(hit, stale=REVALIDATING), plan
        if self._replays:
            raise _not_cached(plan, _not_recorded(call, plan, self._world.identity(call.model)))
        if options.only_if_cached:
            raise _not_cached(plan, f"no stored answer ({plan.reason}), and only-if-cached asks for no other")
        return None, plan

    async def _why_not_recorded(self, call: Call, plan: CachePlan) -> str:
        """How a request differs from the nearest of those that were recorded, whatever it asks."""
        assert self._world.store is not None
        found: tuple[Entry, list[str]] | None = None
        after, compared = "", 0
        with contextlib.suppress(StoreError):
            while compared < COMPARED:
                page = await self._world.store.list(Filter(endpoint=call.endpoint), after)
                entries = [listed.entry for listed in page.entries] + ([found[0]] if found is not None else [])
                found = nearest(((entry, entry.traits) for entry in entries), plan.traits)
                after, compared = page.next, compared + len(page.entries)
                if not after:
                    break
        return f"{plan.reason}; {told(found[1])}" if found is not None and found[1] else plan.reason

    async def _look_for_items(self, plan: CachePlan, batch: Batch, max_age: int | None) -> CachePlan:
        """The plan with those items that are cached."""
        assert self._world.store is not None
        entries = await self._world.store.get_many(batch.keys, "json", self._world.seams.wall())
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
        return msgspec.structs.replace(plan, reason=new, forward="partial", batch=batch)

    async def _made_of_items(self, key: str, batch: Batch) -> Hit:
        if sum(len(found.vector) for found in batch.found.values()) > LARGE:
            entry, body = await asyncio.to_thread(made_of, key, batch)
        else:
            entry, body = made_of(key, batch)
        return Hit(entry, body, self._world.seams.new_id())

    def _why_missed(
        self, call: Call, plan: CachePlan, entry: Entry | None, other: Entry | None, wall: float
    ) -> tuple[str, str]:
        """The reason, and the `fwd` of Cache-Status."""
        why = why_missed(entry, other, wall, call.options.max_age, call.wants_usage)
        if why is not None:
            return why
        assert self._world.store is not None
        if self._purges != self._world.store.purges:
            self._purges = self._world.store.purges
            self.recent.clear()
        return self.recent.reason(call.client.scope, call.endpoint, plan.key, plan.traits, wall), plan.forward

    def patience_with_errors(self, call: Call, plan: CachePlan) -> float:
        """Seconds past its lifetime for which an answer may stand in for a failure; 0: none may.

        RFC 5861 section 4: a request's own stale-if-error goes before the setting, and before what else it says of age;
        without one its no-cache holds.
        """
        if self._world.store is None or not plan.key:
            return 0.0
        if call.options.stale_if_error is not None:
            return float(call.options.stale_if_error)
        return self._world.settings.cache.stale_if_error if plan.read else 0.0

    def patience_with_budgets(self, plan: CachePlan) -> float:
        """The same where a budget is used up: as long as answers are kept, where only the cache is to serve then."""
        world = self._world
        if world.store is None or not (plan.key and plan.read and world.budgets.active and world.budgets.cache_only):
            return 0.0
        return kept_past_end(world.settings.cache)

    async def stand_in(self, call: Call, plan: CachePlan, why: str, attempts: int, patience: float = 0.0) -> Hit | None:
        """A stored answer in place of the failure `why`, however old the settings or the request accept it to be, or
        `patience` seconds past its lifetime.
        """
        wall = self._world.seams.wall()
        store, seconds = self._world.store, max(self.patience_with_errors(call, plan), patience)
        if store is None or seconds <= 0:
            return None
        form: Form = "sse" if call.stream else "json"
        max_age = call.options.max_age if call.options.stale_if_error is None else None
        hit = await self._either(call, *await store.get_both(plan.key, form, other_form(form), wall), max_age, seconds)
        if hit is None:
            return None
        return msgspec.structs.replace(
            hit, id=call.id, stale=f"stale-if-error: {why}", attempts=attempts, forwarded=True
        )

    async def _either(
        self, call: Call, entry: Entry | None, other: Entry | None, max_age: int | None, past_end: float
    ) -> Hit | None:
        """The answer from the entry in the form asked for, else from the one in the other form."""
        hit = self._find(entry, call.wants_usage, max_age, past_end)
        if hit is None and other is not None and self._world.seams.wall() < other.expires_at + past_end:
            hit = self._find(await self._converted(call, other), call.wants_usage, max_age, past_end)
        return hit

    async def _converted(self, call: Call, other: Entry) -> Entry | None:
        """The answer as stored for the other kind of request, in this one's form; kept in it for the next time."""
        if len(other.body) > LARGE:
            entry = await asyncio.to_thread(converted, other, call.document)
        else:
            entry = converted(other, call.document)
        if entry is not None and self._world.store is not None:
            self._world.store.put(entry)
        return entry

    def keep(
        self, call: Call, plan: CachePlan, goods: Goods, body: bytes, usage_span: tuple[int, int] | None = None
    ) -> bool:
        """Stores an answer. Whether it was."""
        assert self._world.store is not None
        entry = self._entry(call, plan, goods, body, usage_span)
        return entry.ttl > 0 and self._put(call.client.scope, entry)

    async def keep_items(
        self, call: Call, plan: CachePlan, goods: Goods, numbers: Sequence[int], vectors: Sequence[bytes]
    ) -> bool:
        """Stores each of the items of these `numbers` under its own key. Whether any was."""
        store, batch = self._world.store, plan.batch
        assert store is not None
        assert batch is not None
        plan = msgspec.structs.replace(plan, traits="")  # those of the whole batch say nothing of one item
        template = self._entry(call, plan, goods._replace(cost=None), b"", None)
        if template.ttl <= 0:
            return False
        upstream, models = goods.answered.upstream, (template.answer_model, call.model)
        price = partial(upstream.prices.cost, upstream.site.kind, models) if goods.cost is not None else None
        if sum(map(len, vectors)) > LARGE:
            entries = await asyncio.to_thread(item_entries, template, batch, numbers, vectors, price)
        else:
            entries = item_entries(template, batch, numbers, vectors, price)
        if plan.request is not None:
            mask = self._world.masker.mask_text
            entries = [msgspec.structs.replace(entry, request=mask(entry.request or "")) for entry in entries]
        stored = [store.put(entry) for entry in entries]
        return any(stored)

    def _entry(
        self, call: Call, plan: CachePlan, goods: Goods, body: bytes, usage_span: tuple[int, int] | None
    ) -> Entry:
        ttl = call.options.ttl if call.options.ttl is not None else self._world.ttl(call.endpoint)
        return Entry(
            key=plan.key,
            form="sse" if call.stream else "json",
            status=goods.answered.status,
            headers=storable_headers(goods.headers),
            body=body,
            usage_span=usage_span,
            stored_at=self._world.seams.wall(),
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
            traits=plan.traits,
            request=plan.request,
            bare=plan.bare,
        )

    def _put(self, scope: str, entry: Entry) -> bool:
        assert self._world.store is not None
        stored = self._world.store.put(entry)
        if stored:
            self.recent.add(scope, entry)
        return stored


def _not_cached(plan: CachePlan, message: str) -> Refusal:
    headers = (("X-Proxy-Cache", plan.status), ("X-Proxy-Cache-Reason", plan.reason))
    return Refusal("not_cached", message, headers=headers)


def _not_recorded(call: Call, plan: CachePlan, identity: str) -> str:
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
