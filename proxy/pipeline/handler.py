"""The story of a request to one of the five endpoints, top to bottom.

`shelf.peek` is the short way: an answer from memory, found by the digest of the raw bytes, without parsing anything.
`serve` is the whole way: plan what the cache may do (`planning`), look (`shelf`), else buy the answer (`exchange`), and
either read it whole or let it flow (`relay`); then settle the limits, price it, keep it, and write the receipt. No
aiohttp, no redis, no sqlite here.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from typing import Any, Final

from msgspec.structs import replace

from ..accounting.receipt import Receipt
from ..accounting.runs.registry import run_headers, run_lines
from ..cache.completeness import plain_complete
from ..cache.embeddings import in_order, join, read_answer, vectors_of
from ..cache.lookup import Goods, Hit, Name, Shelf
from ..cache.plan import CachePlan
from ..cache.planner import Planner
from ..cache.stream_audit import StreamAudit
from ..cost.pricing import Cost
from ..cost.usage import NO_TOKENS, Usage, usage_of
from ..protocol.errors import Refusal
from ..protocol.headers import Raw, downstream_headers
from ..protocol.json_parse import parse_leniently
from ..protocol.request import Call
from ..services import World
from ..upstream.interfaces import WayUp
from ..upstream.progress import Progress
from ..upstream.response import Answered, Read
from ..upstream.retry.fallback import asking
from ..upstream.retry.outcome import Class, TransportFailure
from ..upstream.sender import Exchange
from .coalescing.coalescer import Sharing
from .coalescing.reply import Bought, Purchase
from .coalescing.single_flight import Share
from .embeddings import SPILL_OF_ITEMS, Items
from .recorder import Teller
from .relay import Dress, Ending, Flow
from .response_headers import cost_comment, cost_lines
from .stale import Refresher, StandIns

log = logging.getLogger("proxy.request")

LARGE: Final = 1024 * 1024
"""Bodies above this are parsed in a thread, so that the loop stays free (bytes)."""

SPILL: Final = 64 * 1024 * 1024
"""A plain answer above this is no longer held to be understood: it flows through (bytes)."""


_RETRYABLE: Final = frozenset({Class.RETRY, Class.RATE_LIMITED})
"""Upstream errors that another try, on behalf of somebody else who waits, may be spared."""


class Journey:
    """Serves calls in one world."""

    def __init__(self, world: World, way_up: WayUp, observe: Callable[[Receipt], None]) -> None:
        self.world = world
        self.tell = Teller(world, observe)
        self.exchange = Exchange(world, way_up)
        self.planner = Planner(world)
        self.shelf = Shelf(world)
        self.sharing = Sharing(world, self.buy_alone, self.shelf, self.tell)
        self.items = Items(world, self.exchange, self.shelf, self._read)
        self.stand_ins = StandIns(world, self.shelf, self.sharing.buy, self.tell.finish)
        self.tell.held = self.stand_ins.holds
        self.refresher = Refresher(world, self.sharing.buy)

    async def serve(self, call: Call, check_room: Callable[[], None], name: Name | None = None) -> Hit | Bought:
        """The answer, from the cache or bought; counted where it is in a run. Raises Refusal.

        check_room: asked before anything goes upstream, raises Refusal(overloaded); name: by which `shelf.peek` may
        find the answer when the same bytes come again.
        """
        runs = self.world.runs
        run = runs.enter(call)
        if run is None:
            return await self._serve(call, check_room, name)
        try:
            served = await self._serve(call, check_room, name)
        except BaseException as error:
            runs.left(call, gone=isinstance(error, asyncio.CancelledError))
            if isinstance(error, Refusal):
                error.headers = (*error.headers, *run_headers(run))
            raise
        if isinstance(served, Hit):
            runs.hit(call, served.entry)
            return replace(served, lines=run_lines(run), run=run.name)
        return replace(served, lines=served.lines + run_lines(run))

    async def _serve(self, call: Call, check_room: Callable[[], None], name: Name | None) -> Hit | Bought:
        plan = await self.planner.plan(call)
        hit, plan = await self.shelf.look(call, plan)
        if name is not None:
            self.shelf.remember(name, call, plan)
        if hit is not None:
            if hit.stale:
                self.stand_ins.served(call, hit)
                if not call.options.only_if_cached:
                    self.refresher.refresh(call, plan)
            return hit
        check_room()
        if call.options.run:
            await self.world.runs.admit(self.world, call)
        return await self.stand_ins.buy(call, plan)

    # -- from upstream -------------------------------------------------------------------------------------------------

    async def buy_alone(self, call: Call, plan: CachePlan, progress: Progress) -> Bought:
        """The answer from upstream. Raises Refusal."""
        try:
            if plan.batch is not None and plan.batch.changes:
                return await self._buy_items(call, plan, progress)
            answered = await self.exchange.run(call, progress)
            if progress.model:  # another model answers: it is priced as such and never stored under this one
                call, plan = asking(call, progress.model), replace(plan, write=False)
            if answered.body is not None:
                return self._error_answer(call, plan, answered, progress)
            if answered.is_stream or answered.opaque:
                return self._stream_answer(call, plan, answered, progress)
            return await self._plain_answer(call, plan, answered, progress)
        except Refusal as refusal:
            self.tell.record(call, plan, progress, refusal.status, error=refusal.code)
            refusal.lines = self.tell.lines(call, plan, progress, "", stored=False)
            raise
        except asyncio.CancelledError:
            self.tell.record(call, plan, progress, 499, error="client_gone")
            raise

    def _error_answer(self, call: Call, plan: CachePlan, answered: Answered, progress: Progress) -> Bought:
        """The upstream's own error, with its status and body; keys masked."""
        assert answered.body is not None
        code = "no_usable_key" if progress.no_usable_key else ""
        sale = Purchase(error=code or f"upstream_{answered.status}")
        self.tell.record(call, plan, progress, answered.status, error=sale.error)
        lines = self.tell.lines(call, plan, progress, "X-Proxy-Cost-Status: unknown\r\n", stored=False)
        extra = progress.verdict()
        headers = self._headers(answered, replaced=b"x-should-retry" if progress.spent or code else b"")
        masked = self.world.masker.mask(answered.body)
        reason, share = answered.reply.reason, Share.AGAIN if answered.outcome in _RETRYABLE else Share.ALL
        return Bought(answered.status, reason, headers, lines + extra, masked, None, share, sale, extra)

    async def _plain_answer(self, call: Call, plan: CachePlan, answered: Answered, progress: Progress) -> Bought:
        """A good answer, read whole. Settles the lease."""
        read = await self._read(call, answered, progress, SPILL if plan.batch is None else SPILL_OF_ITEMS)
        if read is None:
            return self._stream_answer(call, plan, answered, progress)
        body, document, usage, cost = read.body, read.document, read.usage, read.cost
        progress.usage, progress.cost = usage, cost  # paid, even if the client leaves while it is stored
        stored, why_not = False, None
        answer_model = document.get("model") if isinstance(document, Mapping) else None
        if plan.write and not answered.leaked and not call.stream:
            if answered.status == 200 and isinstance(document, Mapping):
                why_not = plain_complete(call.endpoint, call.document, document)
                if why_not is None:
                    vectors = vectors_of(document) if plan.batch is not None else None
                    if vectors is not None and plan.batch is not None and not in_order(document):
                        body = join(dict(enumerate(vectors)), plan.batch.order, answer_model, usage)
                    goods = Goods(answered, read.headers, usage, cost, answer_model)
                    stored = self.shelf.keep(call, plan, goods, body)
                    if vectors is not None:
                        numbers = range(len(vectors))
                        stored |= await self.shelf.keep_items(call, plan, goods, numbers, vectors)
            else:
                why_not = "not a JSON answer"
        if not stored:
            self.sharing.avoid(call, plan)
        lines = self.tell.lines(call, plan, progress, cost_lines(cost, usage), stored, why_not)
        self.tell.record(call, plan, progress, answered.status, usage=usage, cost=cost, answer_model=answer_model)
        reason, sale = answered.reply.reason, Purchase(usage, cost, answer_model)
        share = Share.ALL if stored else Share.OWN
        return Bought(answered.status, reason, read.headers, lines, body, None, share, sale)

    async def _read(self, call: Call, answered: Answered, progress: Progress, most: int) -> Read | None:
        """A good answer, read whole and priced, its lease settled; None, and nothing settled, where it is longer than
        `most` bytes.
        """
        began = self.world.seams.monotonic()
        settled = False
        try:
            body = await self._read_whole(answered, progress, most)
            if body is None:
                settled = True
                return None
            document = await self._understand(call, answered, body)
            progress.upstream_ms += (self.world.seams.monotonic() - began) * 1000
            usage, cost = self._price(call, answered, document)
            self.exchange.settle(call, answered.lease, usage.total_tokens if usage else None, cost=cost)
            self.exchange.learn(call, progress, usage)
            settled = True
            self.world.objects.note(self.world.ring, call, answered.lease.key, document)
        except TransportFailure as failure:
            raise failure.refusal() from None
        finally:
            if not settled:
                self.exchange.settle(call, answered.lease, None)
                answered.reply.close()
        answered.reply.close()
        headers = self._headers(answered)
        if self.world.masker.found_in(body):
            answered.leaked = True
            body = self.world.masker.mask(body)
        return Read(headers, body, document, usage, cost)

    async def _buy_items(self, call: Call, plan: CachePlan, progress: Progress) -> Bought:
        """The answer to a batch that goes upstream only in part, or in parts."""
        bought = await self.items.buy(call, plan, progress)
        if isinstance(bought, Answered):
            return self._error_answer(call, plan, bought, progress)
        usage, cost, savings = progress.usage, progress.cost, bought.savings
        lines = self.tell.lines(call, bought.plan, progress, cost_lines(cost, usage, savings), bought.stored)
        self.tell.record(call, bought.plan, progress, 200, answer_model=bought.model, savings=savings)
        if not bought.stored:
            self.sharing.avoid(call, plan)
        share, sale = Share.ALL if bought.stored else Share.OWN, Purchase(usage, cost, bought.model, savings=savings)
        return Bought(200, bought.reason, bought.headers, lines, bought.body, None, share, sale)

    async def _read_whole(self, answered: Answered, progress: Progress, most: int) -> bytes | None:
        """The body, or None where it grows beyond `most` bytes: then `answered.first` holds what was read."""
        if not answered.decoded and (whole := answered.reply.ready()) is not None:
            return whole
        parts: list[bytes] = []
        size = 0
        try:
            async with progress.horizon.limit():
                async for chunk in answered.more:
                    parts.append(chunk)
                    size += len(chunk)
                    if size > most:
                        answered.first = parts
                        return None
                    if progress.unread and size > self.world.settings.cache.max_entry:
                        raise TransportFailure("invalid", "too large for the cache, and nobody else wants it")
        except TimeoutError:
            raise TransportFailure("timeout", "the upstream did not finish its answer in time") from None
        return parts[0] if len(parts) == 1 else b"".join(parts)

    async def _understand(self, call: Call, answered: Answered, body: bytes) -> Any:
        """The parsed body of a JSON answer, None of any other. Raises TransportFailure(invalid) where JSON is promised
        and broken.
        """
        parse = read_answer if call.endpoint == "embeddings" else parse_leniently
        content_type = answered.reply.headers.get("Content-Type", "").partition(";")[0].strip().lower()
        if content_type != "application/json" and not content_type.endswith("+json"):
            return None
        if answered.status == 204:
            return None
        try:
            if len(body) > LARGE:
                return await asyncio.to_thread(parse, body)
            return parse(body)
        except ValueError:
            raise TransportFailure("invalid", "the upstream's JSON answer is cut short or broken") from None

    def _stream_answer(self, call: Call, plan: CachePlan, answered: Answered, progress: Progress) -> Bought:
        """A good answer that flows. Its end settles, prices, stores and records."""
        world = self.world
        sse = answered.is_stream and not answered.opaque
        audit = StreamAudit(call.endpoint, call.document) if sse else None
        headers = self._headers(answered, replaced=b"x-should-retry" if progress.spent else b"")
        began = answered.sent_at
        progress.first_byte_ms = (world.seams.monotonic() - call.arrived) * 1000
        sale = Purchase()

        def price(seen: StreamAudit) -> tuple[Usage | None, Cost | None]:
            usage = usage_of(call.endpoint, {"usage": seen.usage, "output": seen.output, "tools": seen.tools})
            kind, models = answered.upstream.site.kind, (seen.model, call.model)
            if usage is not None:
                return usage, answered.upstream.prices.cost(kind, models, usage, seen.service_tier)
            if seen.error and not seen.said:
                return None, None
            # Cut short, or the upstream does not say: what was asked and what was said so far.
            usage = self.exchange.used(call, progress, seen.said)
            cost = answered.upstream.prices.cost(kind, models, usage, seen.service_tier)
            return (usage, Cost(cost.usd, "estimated")) if cost is not None else (None, None)

        def ended(ending: Ending) -> None:
            progress.upstream_ms = (world.seams.monotonic() - began) * 1000
            usage, cost = price(audit) if audit is not None else (None, None)
            model = audit.model if audit is not None else None
            known, price_of_it = (usage, cost) if audit is not None and audit.usage is not None else (None, None)
            self.exchange.settle(call, answered.lease, known.total_tokens if known else None, cost=cost)
            self.exchange.learn(call, progress, known)
            sale.usage, sale.cost, sale.answer_model = usage, cost, model
            stored = False
            if ending.why is None and ending.body is not None and not world.masker.found_in(ending.body):
                span = audit.usage_span if audit else None
                goods = Goods(answered, headers, known, price_of_it, model)
                stored = self.shelf.keep(call, plan, goods, ending.body, span)
            if not (stored or ending.failure or ending.gone or (audit is not None and audit.error)):
                self.sharing.avoid(call, plan)
            error = ending.failure or ("client_gone" if ending.gone else "")
            status = 499 if ending.gone else answered.status
            self.tell.record(call, plan, progress, status, usage=usage, cost=cost, answer_model=model, error=error)

        def comment() -> bytes:
            assert audit is not None
            usage, cost = price(audit)
            return cost_comment(cost, usage)

        wants_comment = call.stream and (call.options.stream_cost or world.settings.cost.stream_comment)
        storable = plan.write and call.stream and answered.status == 200 and not answered.leaked
        flow = Flow(
            answered=answered,
            audit=audit,
            keep=world.settings.cache.max_entry if storable else 0,
            dress=Dress(answered.injected and sse, comment if wants_comment and sse else None),
            ended=ended,
        )
        if sse:
            flow.read = world.tallies.reads(world.seams.monotonic)
        lines = self.tell.lines(call, plan, progress, "X-Proxy-Cost-Status: pending\r\n", stored=False)
        extra = progress.verdict()
        share = Share.ALL if storable and sse else Share.OWN
        if answered.outcome in _RETRYABLE:
            share = Share.AGAIN
        elif share is Share.OWN:
            self.sharing.avoid(call, plan)
        reason, asked = answered.reply.reason, answered.injected or call.wants_usage
        return Bought(
            answered.status, reason, headers, lines + extra, None, flow, share, sale, extra, usage_asked=asked
        )

    # -- what every answer needs --------------------------------------------------------------------------------------

    def _headers(self, answered: Answered, replaced: bytes = b"") -> list[Raw]:
        """The upstream's headers for the client, pool keys masked; without the one we say ourselves."""
        pooled = not self.world.passthrough
        headers = downstream_headers(answered.reply.raw_headers, pooled=pooled, decoded=answered.decoded)
        masker = self.world.masker
        if masker.found_in(b"\n".join([value for _, value in headers])):
            answered.leaked = True
            headers = [(name, masker.mask(value)) for name, value in headers]
        if replaced:
            headers = [(name, value) for name, value in headers if name.lower() != replaced]
        return headers

    def _price(self, call: Call, answered: Answered, document: Any) -> tuple[Usage | None, Cost | None]:
        usage = usage_of(call.endpoint, document)
        if (
            usage is None
            and call.endpoint == "moderations"
            and isinstance(document, Mapping)
            and answered.status == 200
        ):
            usage = NO_TOKENS
        if usage is None:
            return None, None
        asked = document if isinstance(document, Mapping) else {}
        kind, models = answered.upstream.site.kind, (asked.get("model"), call.model)
        return usage, answered.upstream.prices.cost(kind, models, usage, asked.get("service_tier"))
