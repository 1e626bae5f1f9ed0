"""`ResponseCache`: finds stored responses, in either form, and stores new ones.

`peek` is the fast path: it finds a response in memory by the digest of the raw bytes, without parsing anything.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

import msgspec

from ..config.settings import CacheSettings
from ..cost.pricing import Cost, usd
from ..cost.usage import Usage
from ..protocol.errors import ProxyError
from ..protocol.headers import Raw, storable_headers
from ..protocol.request import ProxyRequest
from ..protocol.routes import Shape, printable
from ..system.clock import Clock
from ..system.threads import in_thread_if_large
from .completeness import is_deterministic
from .embeddings import EmbeddingBatch, answer_from_items, cached_items, item_entries
from .entry import Entry, Form
from .forms import converted, other_form
from .miss_reason import RecentRequests, nearest, shown_names, why_missed
from .plan import CachePlan, ttl_of
from .stores.interface import Filter, StoreError
from .stores.tiered import TieredStore

REVALIDATING: Final = "stale-while-revalidate"

COMPARED: Final = 20_000
"""The number of recorded requests that one which was not recorded is compared with, at most."""

_MEMO_SIZE: Final = 20_000


class CacheHit(msgspec.Struct, frozen=True):
    """A response from the cache.

    body: in the form this client asked for. headers: more of the proxy's own. run: the name of the request's run.
    stale: why an expired entry was served, "" on other hits. attempts: upstream attempts that failed before it was.
    fwd: it replaces an upstream response that failed (`fwd=stale`, RFC 9211).
    """

    entry: Entry
    body: bytes
    id: str
    headers: tuple[tuple[str, str], ...] = ()
    run: str = ""
    stale: str = ""
    attempts: int = 0
    fwd: bool = False


class NewEntry(NamedTuple):
    """A response to be stored, without its body.

    model: as the response names it. injected: the proxy asked for the usage chunk, the client did not.
    price: returns the cost of a part of its usage.
    """

    status: int
    headers: Sequence[Raw]
    usage: Usage | None
    cost: Cost | None
    model: object
    injected: bool = False
    price: Callable[[Usage], Cost | None] | None = None


RequestDigest = tuple[str, str, bytes]
"""What a request is remembered by: raw target, the client's cache partition, digest of the raw body."""


def digest_of_request(target: str, partition: str, body: bytes) -> RequestDigest:
    return target, partition, hashlib.sha256(body).digest()


class MemoizedKey(msgspec.Struct, frozen=True, gc=False):
    """What the raw bytes of an earlier request turned out to ask for. (gc=False: many are kept, none in a cycle.)"""

    key: str
    form: str
    wants_usage: bool


class ResponseCache:
    """Finds and stores responses.

    settings: those of the cache.
    identity: returns what stands in the key for the upstreams that serve a model, for a request in a shape.
    mask: takes secrets out of a text.
    """

    def __init__(
        self,
        store: TieredStore,
        settings: CacheSettings,
        clock: Clock,
        *,
        identity: Callable[[str, Shape], str],
        mask: Callable[[str], str],
    ) -> None:
        self._store = store
        self._settings = settings
        self._clock = clock
        self._identity = identity
        self._mask = mask
        self._memo: OrderedDict[RequestDigest, MemoizedKey] = OrderedDict()
        self.recent = RecentRequests()
        self._purges = 0
        self._replays = settings.mode == "replay"
        self._past_end = math.inf if self._replays else 0.0

    def peek(self, digest: RequestDigest) -> CacheHit | None:
        """Return the response to a request whose very bytes were seen before and which asks for nothing special."""
        known = self._memo.get(digest)
        if known is None:
            return None
        return self._find(self._store.peek(known.key, known.form), known.wants_usage, None, self._past_end)

    def _find(self, entry: Entry | None, wants_usage: bool, max_age: int | None, past_end: float) -> CacheHit | None:
        """Return the hit that this entry is for the client. past_end: seconds by which its lifetime may be over."""
        if entry is None or not self._may_serve(entry, max_age, past_end):
            return None
        body = entry.body_for(wants_usage)
        if body is None:
            return None
        return CacheHit(entry, body, self._clock.new_id())

    def _may_serve(self, entry: Entry, max_age: int | None, past_end: float) -> bool:
        wall = self._clock.wall()
        return entry.usable(wall, past_end) and (max_age is None or entry.age(wall) <= max_age)

    def memoize(self, digest: RequestDigest, request: ProxyRequest, plan: CachePlan) -> None:
        """Let `peek` answer when the same bytes come again."""
        if plan.key and plan.read and plan.write:
            self._memo[digest] = MemoizedKey(plan.key, "sse" if request.stream else "json", request.wants_usage)
            if len(self._memo) > _MEMO_SIZE:
                self._memo.popitem(last=False)

    async def lookup(self, request: ProxyRequest, plan: CachePlan) -> tuple[CacheHit | None, CachePlan]:
        """Return the stored response, or None and the plan with the reason. Raises ProxyError(not_cached)."""
        if plan.read:
            form: Form = "sse" if request.stream else "json"
            wall = self._clock.wall()
            entry, other = await self._store.get_both(plan.key, form, other_form(form), wall)
            max_age = None if self._replays else request.options.max_age
            hit = await self._in_either_form(request, entry, other, max_age, self._past_end)
            if hit is not None:
                self.recent.add(request.client.cache_partition, hit.entry)
                return hit, plan
            if plan.batch is not None:
                plan = await self._lookup_items(plan, plan.batch, max_age)
                if plan.batch is not None and len(plan.batch.found) == len(plan.batch.keys):
                    return await self._made_of_items(plan.key, plan.batch), plan
            if self._replays:
                plan = msgspec.structs.replace(plan, reason=await self._why_not_recorded(request, plan))
            elif plan.fwd != "partial":
                reason, fwd = self._why_missed(request, plan, entry, other, wall)
                plan = msgspec.structs.replace(plan, reason=reason, fwd=fwd)
            if seconds := self._settings.stale_while_revalidate:
                hit = await self._in_either_form(request, entry, other, max_age, seconds)
                if hit is not None:
                    return msgspec.structs.replace(hit, stale=REVALIDATING), plan
        if self._replays:
            raise _not_cached(plan, _not_recorded(request, plan, self._identity(request.model, request.route.shape)))
        if request.options.only_if_cached:
            raise _not_cached(plan, f"no stored answer ({plan.reason}), and only-if-cached asks for no other")
        return None, plan

    async def _why_not_recorded(self, request: ProxyRequest, plan: CachePlan) -> str:
        """Return how a request differs from the nearest of those that were recorded."""
        found: tuple[Entry, list[str]] | None = None
        after, compared = "", 0
        with contextlib.suppress(StoreError):
            while compared < COMPARED:
                page = await self._store.list(Filter(endpoint=request.endpoint), after)
                entries = [listed.entry for listed in page.entries] + ([found[0]] if found is not None else [])
                found = nearest(((entry, entry.traits) for entry in entries), plan.field_digests)
                after, compared = page.next, compared + len(page.entries)
                if not after:
                    break
        return f"{plan.reason}; {shown_names(found[1])}" if found is not None and found[1] else plan.reason

    async def _lookup_items(self, plan: CachePlan, batch: EmbeddingBatch, max_age: int | None) -> CachePlan:
        """Return the plan with those items that are cached."""
        entries = await self._store.get_many(batch.keys, "json", self._clock.wall())
        usable = {
            number: entry
            for number, entry in enumerate(entries)
            if entry is not None and self._may_serve(entry, max_age, self._past_end)
        }
        found = await in_thread_if_large(sum(len(entry.body) for entry in usable.values()), cached_items, usable)
        if not found:
            return plan
        new = f"{len(batch.keys) - len(found)} of {len(batch.keys)} new"
        batch = msgspec.structs.replace(batch, found=found)
        return msgspec.structs.replace(plan, reason=new, fwd="partial", batch=batch)

    async def _made_of_items(self, key: str, batch: EmbeddingBatch) -> CacheHit:
        size = sum(len(found.vector) for found in batch.found.values())
        entry, body = await in_thread_if_large(size, answer_from_items, key, batch)
        return CacheHit(entry, body, self._clock.new_id())

    def _why_missed(
        self, request: ProxyRequest, plan: CachePlan, entry: Entry | None, other: Entry | None, wall: float
    ) -> tuple[str, str]:
        """Return the reason of a miss, and the `fwd` of Cache-Status."""
        why = why_missed(entry, other, wall, request.options.max_age, request.wants_usage)
        if why is not None:
            return why
        if self._purges != self._store.purges:
            self._purges = self._store.purges
            self.recent.clear()
        partition = request.client.cache_partition
        return self.recent.reason(partition, request.endpoint, plan.key, plan.field_digests, wall), plan.fwd

    # -- in place of a failure ----------------------------------------------------------------------------------------

    def stale_if_error_seconds(self, request: ProxyRequest, plan: CachePlan) -> float:
        """Return for how many seconds after its lifetime a response may replace a failure; 0: not at all.

        A request's own stale-if-error overrides the setting and what else the request says of age; without one its
        no-cache holds (RFC 5861 section 4).
        """
        if not plan.key:
            return 0.0
        if request.options.stale_if_error is not None:
            return float(request.options.stale_if_error)
        return self._settings.stale_if_error if plan.read else 0.0

    async def stale_if_error(
        self, request: ProxyRequest, plan: CachePlan, why: str, attempts: int, max_stale: float = 0.0
    ) -> CacheHit | None:
        """Return a stored response in place of the failure `why`; None: there is none.

        It may be as old as the settings or the request allow, or `max_stale` seconds past its lifetime.
        """
        seconds = max(self.stale_if_error_seconds(request, plan), max_stale)
        if seconds <= 0:
            return None
        form: Form = "sse" if request.stream else "json"
        max_age = request.options.max_age if request.options.stale_if_error is None else None
        entry, other = await self._store.get_both(plan.key, form, other_form(form), self._clock.wall())
        hit = await self._in_either_form(request, entry, other, max_age, seconds)
        if hit is None:
            return None
        return msgspec.structs.replace(hit, id=request.id, stale=f"stale-if-error: {why}", attempts=attempts, fwd=True)

    async def _in_either_form(
        self, request: ProxyRequest, entry: Entry | None, other: Entry | None, max_age: int | None, past_end: float
    ) -> CacheHit | None:
        """Return the hit made of the entry in the form asked for, else of the one in the other form."""
        hit = self._find(entry, request.wants_usage, max_age, past_end)
        if hit is None and other is not None and other.usable(self._clock.wall(), past_end):
            hit = self._find(await self._converted(request, other), request.wants_usage, max_age, past_end)
        return hit

    async def _converted(self, request: ProxyRequest, other: Entry) -> Entry | None:
        """Return the entry in this request's form, and store it in that form for the next time."""
        entry = await in_thread_if_large(len(other.body), converted, other, request.document)
        if entry is not None:
            self._store.put(entry)
        return entry

    # -- storing ------------------------------------------------------------------------------------------------------

    def store(
        self,
        request: ProxyRequest,
        plan: CachePlan,
        new: NewEntry,
        body: bytes,
        usage_span: tuple[int, int] | None = None,
    ) -> bool:
        """Store a response. Returns whether it was stored."""
        entry = self._entry(request, plan, new, body, usage_span)
        stored = entry.ttl > 0 and self._store.put(entry)
        if stored:
            self.recent.add(request.client.cache_partition, entry)
        return stored

    async def store_items(
        self, request: ProxyRequest, plan: CachePlan, new: NewEntry, numbers: Sequence[int], vectors: Sequence[bytes]
    ) -> bool:
        """Store each of the items of these `numbers` under its own key. Returns whether any was stored."""
        batch = plan.batch
        assert batch is not None
        plan = msgspec.structs.replace(plan, field_digests="")  # those of the whole batch say nothing of one item
        template = self._entry(request, plan, new._replace(cost=None), b"", None)
        if template.ttl <= 0:
            return False
        price = new.price if new.cost is not None else None
        size = sum(map(len, vectors))
        entries = await in_thread_if_large(size, item_entries, template, batch, numbers, vectors, price)
        if plan.request is not None:
            entries = [msgspec.structs.replace(entry, request=self._mask(entry.request or "")) for entry in entries]
        stored = [self._store.put(entry) for entry in entries]
        return any(stored)

    def _entry(
        self, request: ProxyRequest, plan: CachePlan, new: NewEntry, body: bytes, usage_span: tuple[int, int] | None
    ) -> Entry:
        return Entry(
            key=plan.key,
            form="sse" if request.stream else "json",
            status=new.status,
            headers=storable_headers(new.headers),
            body=body,
            usage_span=usage_span,
            stored_at=self._clock.wall(),
            ttl=ttl_of(self._settings, request),
            endpoint=request.endpoint,
            model=request.model,
            answer_model=self._mask(new.model) if isinstance(new.model, str) else None,
            usage=new.usage,
            cost=usd(new.cost.usd) if new.cost is not None else None,
            namespace=request.options.namespace,
            tags=request.options.tags,
            sampled=not is_deterministic(request.endpoint, request.document),
            usage_asked=request.wants_usage or new.injected,
            traits=plan.field_digests,
            request=plan.request,
            bare=plan.unpartitioned_key,
        )


def _not_cached(plan: CachePlan, message: str) -> ProxyError:
    headers = (("X-Proxy-Cache", plan.status), ("X-Proxy-Cache-Reason", plan.reason))
    return ProxyError("not_cached", message, headers=headers)


def _not_recorded(request: ProxyRequest, plan: CachePlan, identity: str) -> str:
    """Return what a person needs to find out why a replay has no response: what it looked for."""
    if not plan.key:
        return f"replay: this request is never stored ({plan.reason}), and nothing is sent upstream"
    options = request.options
    asked = {"namespace": options.namespace, "sample": options.sample, "query": request.route.query}
    further = "".join(f", {name} {value!r}" for name, value in asked.items() if value)
    model, upstream = printable(request.model, 60), printable(identity.replace("\n", " + "))
    return (
        f"replay: {plan.reason}, and nothing is sent upstream; looked for {request.endpoint}, model {model!r}, "
        f"upstream {upstream}{further}"
    )
