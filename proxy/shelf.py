"""The cache as the journey sees it: what is found there, in either form, and what is put there.

`peek` is the short way: an answer from memory, found by the digest of the raw bytes, without parsing anything.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from typing import Final

import msgspec

from .answered import Answered
from .core.cacheability import is_deterministic
from .core.call import CachePlan, Call
from .core.entry import Entry, Form
from .core.errors import Refusal
from .core.forms import converted, other_form
from .core.headers import Raw, storable_headers
from .core.pricing import Cost, usd
from .core.usage import Usage
from .world import World

LARGE: Final = 256 * 1024
"""Stored answers above this are converted in a thread (bytes)."""

_MEMO_SIZE: Final = 20_000


class Hit(msgspec.Struct, frozen=True):
    """An answer from the cache. body: as this caller asked for it; sampled is told in Cache-Status."""

    entry: Entry
    body: bytes
    id: str


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

    def peek(self, name: Name) -> Hit | None:
        """The stored answer to a request whose very bytes were seen before and which asks for nothing special."""
        known = self._memo.get(name)
        if known is None or self._world.store is None:
            return None
        return self._find(self._world.store.peek(known.key, known.form), known.wants_usage, None)

    def _find(self, entry: Entry | None, wants_usage: bool, max_age: int | None) -> Hit | None:
        if entry is None:
            return None
        wall = self._world.seams.wall()
        if not entry.fresh(wall) or (max_age is not None and entry.age(wall) > max_age):
            return None
        body = entry.body_for(wants_usage)
        if body is None:
            return None
        return Hit(entry, body, self._world.seams.new_id())

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
            hit = self._find(entry, call.wants_usage, options.max_age)
            if hit is None and other is not None and other.fresh(wall):
                hit = self._find(await self._converted(call, other), call.wants_usage, options.max_age)
            if hit is not None:
                return hit, plan
            if entry is not None:
                if not entry.fresh(wall):
                    plan = CachePlan(plan.key, "expired", True, True, "stale")
                elif options.max_age is not None and entry.age(wall) > options.max_age:
                    plan = CachePlan(plan.key, "max-age", True, True, "request")
        if options.only_if_cached:
            raise Refusal("not_cached", f"no stored answer ({plan.reason}), and only-if-cached asks for no other")
        return None, plan

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
        self,
        call: Call,
        plan: CachePlan,
        answered: Answered,
        headers: Sequence[Raw],
        body: bytes,
        usage_span: tuple[int, int] | None,
        usage: Usage | None,
        cost: Cost | None,
        answer_model: object,
    ) -> bool:
        world = self._world
        assert world.store is not None
        ttl = call.options.ttl if call.options.ttl is not None else world.ttl(call.endpoint)
        if ttl <= 0:
            return False
        return world.store.put(
            Entry(
                key=plan.key,
                form="sse" if call.stream else "json",
                status=answered.status,
                headers=storable_headers(headers),
                body=body,
                usage_span=usage_span,
                stored_at=world.seams.wall(),
                ttl=ttl,
                endpoint=call.endpoint,
                model=call.model,
                answer_model=answer_model if isinstance(answer_model, str) else None,
                usage=usage,
                cost=usd(cost.usd) if cost is not None else None,
                namespace=call.options.namespace,
                tags=call.options.tags,
                sampled=not is_deterministic(call.endpoint, call.document),
                usage_asked=call.wants_usage or answered.injected,
            )
        )
