"""Equal requests at the same time: one buys, the others get the same for nothing (contract 7, Cache).

`flights` decides who buys and who waits, `reel` lets one stream flow to many; here it is said what may be shared at
all, and what each of those aboard gets to see: his own id, receipt, options and usage chunk, and the saving.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from decimal import Decimal
from functools import partial
from typing import Any, Final

import msgspec

from ...cache.lookup import Hit, Shelf
from ...cache.plan import CachePlan
from ...cost.pricing import Cost
from ...cost.usage import Usage, usage_of
from ...protocol.errors import Refusal
from ...protocol.request import Call
from ...services import World
from ...upstream.deadline import Horizon
from ...upstream.progress import Progress
from ..recorder import Teller
from ..relay import Dress, Ending, Flow, with_comment
from ..response_headers import cost_comment, cost_lines
from .broadcast import Reel, View
from .cross_process import Claim, Elsewhere
from .reply import Bought, Purchase
from .single_flight import Flights, Landing, Name, Seat, Share

Value = Bought | Refusal | Hit
"""A flight's outcome; a hit: another process had bought it meanwhile."""

FREE: Final = Cost(Decimal(0), "exact")

_AGAIN: Final = frozenset(
    {
        "upstream_unreachable",
        "upstream_timeout",
        "upstream_invalid_response",
        "throttled",
        "queue_full",
        "keys_cooling",
        "client_limit",
        "budget_exceeded",
    }
)
"""Refusals that another request, with its own patience, retries and client, may be spared."""

_JSON: Final = "json"
_SSE: Final = "sse"
_BARE: Final = "sse without usage"

_NOTHING: Final = Purchase()


Buy = Callable[[Call, CachePlan, Progress], Awaitable[Bought]]
"""What the journey does for every request, shared or not."""


class Sharing:
    """Buys in company where that is possible."""

    def __init__(self, world: World, buy: Buy, shelf: Shelf, tell: Teller) -> None:
        cache = world.settings.cache
        self._world = world
        self._buy_alone = buy
        self._tell = tell
        self._shelf = shelf
        self._finish = cache.on_disconnect == "finish"
        self._coalesce = cache.coalesce
        leases = world.leases if cache.coalesce else None
        self._elsewhere = Elsewhere(world, leases, shelf) if leases is not None else None
        self.flights: Flights[Value] = Flights(world.seams.monotonic, self._finish)

    async def buy(self, call: Call, plan: CachePlan) -> Bought:
        """The answer, bought alone or together with whoever asks the same. Raises Refusal."""
        names = self._names(call, plan)
        others = self._others(call, plan) if self.flights and names else ()
        while names:
            lead = partial(self._lead, call, plan)
            seat = self.flights.board(names, lead, call.deadline, call.arrived + call.patience, others)
            if seat is None:
                break
            shared = await self._together(call, plan, seat)
            if shared is not None:
                return shared
            if not seat.guest:
                break
            others = ()  # waited once, and in vain
        return await self._buy_alone(call, plan, Progress(Horizon(call.deadline, self._world.seams.monotonic)))

    async def _together(self, call: Call, plan: CachePlan, seat: Seat[Value]) -> Bought | None:
        """What the flight brings; None: nothing that this call could take. Raises Refusal."""
        flowing = False
        try:
            landing = await seat.landing()
            value = None if landing is None else landing.value
            if isinstance(value, Bought) and value.reel is not None:
                if seat.led or _suits(call, value):
                    flowing = True
                    return self._flowing(call, plan, seat, value, value.reel)
                return None
            if value is None or isinstance(value, Hit):
                if isinstance(value, Hit) and seat.led:
                    return self._found(call, plan, seat, value)
                return await self._visited(call, plan, seat)
        except Refusal as refusal:
            self._resign(call, plan, seat, refusal.status, refusal.code)
            refusal.lines = self._tell.lines(call, _seen(plan, seat), seat.progress, "", False)
            raise
        except asyncio.CancelledError:
            self._resign(call, plan, seat, 499, "client_gone")
            await seat.flight.ended()
            raise
        finally:
            if not flowing:
                seat.leave()
        if seat.led:
            if isinstance(value, Refusal):
                raise value.again(value.lines)
            return value
        return self._given(call, plan, seat, value) if _suits(call, value) else None

    def avoid(self, call: Call, plan: CachePlan) -> None:
        """Its answer could not be kept: for a while nobody waits for one like it."""
        self.flights.avoid(self._names(call, plan))

    # -- what may be shared -------------------------------------------------------------------------------------------

    def _names(self, call: Call, plan: CachePlan) -> tuple[Name, ...]:
        """Under which names this call shares, its own first; none where it may not.

        Not shared: what is not read from the cache or not kept in it, for that is what its sender asked for. Streams
        share by whether the usage chunk is asked for upstream: with it, a stream serves those who want it and those
        who do not; without it, only the latter.
        """
        if not (plan.write and plan.key):
            return ()
        ttl = call.options.ttl if call.options.ttl is not None else self._world.ttl(call.endpoint)
        if ttl <= 0:
            return ()
        if not (self._coalesce and plan.read):
            return ((plan.key, call.id),) if self._finish else ()  # a flight of its own, that can be read to its end
        if not call.stream:
            return ((plan.key, _JSON),)
        if call.wants_usage or call.endpoint == "responses":
            return ((plan.key, _SSE),)
        options = call.document.get("stream_options")
        says = isinstance(options, dict) and "include_usage" in options
        if self._world.settings.cost.stream_usage == "inject" and not says:
            return (plan.key, _SSE), (plan.key, _BARE)
        return (plan.key, _BARE), (plan.key, _SSE)

    def _others(self, call: Call, plan: CachePlan) -> tuple[Name, ...]:
        """Whose answer, once it is stored, may be had in this call's form, too."""
        if not (self._coalesce and plan.read) or (call.stream and call.endpoint == "responses"):
            return ()
        return ((plan.key, _JSON if call.stream else _SSE),)

    # -- the one who buys ---------------------------------------------------------------------------------------------

    async def _lead(self, call: Call, plan: CachePlan, seat: Seat[Value]) -> Landing[Value]:
        """Buys for everybody aboard. What it costs is in this call's receipt, even if its client has left."""
        if self._elsewhere is None or not plan.read:
            return await self._buy(call, plan, seat)
        name = self._names(call, plan)[0]
        try:
            claim = await self._elsewhere.claim(call, plan, name, seat.progress)
        except asyncio.CancelledError:
            self._tell.record(call, plan, seat.progress, 499, error="client_gone")
            raise
        if isinstance(claim, Hit):
            return Landing(claim, Share.ALL)
        done = partial(self._bought_here, claim, name)
        try:
            landing = await self._buy(call, plan, seat)
        except BaseException:
            done()
            raise
        if landing.rest is None:
            done()
            return landing
        return msgspec.structs.replace(landing, rest=partial(_then, landing.rest, done))

    def _bought_here(self, claim: Claim | None, name: Name) -> None:
        if claim is not None:
            claim.end(avoid=self.flights.avoids(name))

    async def _buy(self, call: Call, plan: CachePlan, seat: Seat[Value]) -> Landing[Value]:
        try:
            bought = await self._buy_alone(call, plan, seat.progress)
        except Refusal as refusal:
            share = Share.AGAIN if refusal.code in _AGAIN else Share.ALL
            return Landing(refusal.again(refusal.lines), share)
        flow, flight = bought.flow, seat.flight
        if flow is None:
            return Landing(bought, bought.share)
        assert isinstance(flow, Flow)
        if bought.share is not Share.ALL:
            return Landing(bought, bought.share, drop=flow.abandon)
        dress, flow.dress, flow.quiet = flow.dress, Dress(False, None), True
        keep = self._world.settings.cache.max_entry
        reel = Reel(flow, keep, flight.close, flight.all_seated, lambda: flight.unread)
        flight.emptied = reel.go_on
        shared = msgspec.structs.replace(bought, reel=reel, dress=dress)
        return Landing(shared, Share.ALL, rest=reel.record, drop=flow.drop)

    def _resign(self, call: Call, plan: CachePlan, seat: Seat[Value], status: int, error: str) -> None:
        """Leaves before the end: the receipt is written now, or with the purchase where that is this call's."""
        if not seat.led:
            self._tell.record(call, _seen(plan, seat), seat.progress, status, error=error)
        elif not seat.flight.over:
            seat.progress.gone = status, error
        seat.leave()

    # -- those who get it, too ----------------------------------------------------------------------------------------

    def _given(self, call: Call, plan: CachePlan, seat: Seat[Value], value: Bought | Refusal) -> Bought:
        """Another's answer, whole. Raises Refusal."""
        plan, progress = self._waited(call, plan, seat)
        if isinstance(value, Refusal):
            self._tell.record(call, plan, progress, value.status, error=value.code)
            raise value.again(self._tell.lines(call, plan, progress, "", False))
        sale = value.purchase or _NOTHING
        spared = sale.spared()
        self._tell.record(
            call,
            plan,
            progress,
            value.status,
            usage=sale.usage,
            cost=FREE,
            savings=spared,
            answer_model=sale.answer_model,
            error=sale.error,
        )
        money = cost_lines(FREE, sale.usage, spared)
        return Bought(
            value.status,
            value.reason,
            value.headers,
            self._tell.lines(call, plan, progress, money, False) + value.extra,
            value.body,
        )

    async def _visited(self, call: Call, plan: CachePlan, seat: Seat[Value]) -> Bought | None:
        """What the cache has now, in this call's form."""
        hit, _ = await self._shelf.look(call, plan)
        return None if hit is None else self._found(call, plan, seat, hit)

    def _found(self, call: Call, plan: CachePlan, seat: Seat[Value], hit: Hit) -> Bought:
        """What was bought by another process, or in the other form."""
        plan, progress = self._waited(call, plan, seat)
        entry = hit.entry
        self._tell.record(
            call,
            plan,
            progress,
            entry.status,
            usage=entry.usage,
            cost=FREE,
            saved=entry.cost,
            answer_model=entry.answer_model,
        )
        lines = self._tell.lines(call, plan, progress, _saved_lines(entry.usage, entry.cost), False)
        body = hit.body
        if self._wants_comment(call):
            body = with_comment(body, cost_comment(FREE, entry.usage))
        return Bought(entry.status, "", entry.headers, lines, body)

    def _flowing(self, call: Call, plan: CachePlan, seat: Seat[Value], bought: Bought, reel: Reel) -> Bought:
        """A running stream, from its first byte on, as this client asked for it."""
        if seat.led:
            assert bought.dress is not None
            view = View(reel, bought.dress, partial(self._leader_done, bought, seat))
            return msgspec.structs.replace(bought, flow=view, reel=None, dress=None)
        plan, progress = self._waited(call, plan, seat)
        progress.first_byte_ms = (self._world.seams.monotonic() - call.arrived) * 1000
        comment = partial(_free_comment, call.endpoint, reel) if self._wants_comment(call) else None
        dress = Dress(bought.usage_asked and not call.wants_usage, comment)
        mine = Purchase(cost=FREE)
        view = View(reel, dress, partial(self._done, call, plan, seat, bought, mine))
        lines = self._tell.lines(call, plan, progress, cost_lines(FREE, None), False) + bought.extra
        return Bought(bought.status, bought.reason, bought.headers, lines, None, view, purchase=mine)

    def _leader_done(self, bought: Bought, seat: Seat[Value], ending: Ending) -> None:
        if (ending.gone or ending.failure) and not seat.flight.over:
            seat.progress.gone = _status(ending, bought)
        seat.leave()

    def _done(
        self, call: Call, plan: CachePlan, seat: Seat[Value], bought: Bought, mine: Purchase, ending: Ending
    ) -> None:
        sale = bought.purchase or _NOTHING
        status, error = _status(ending, bought)
        mine.usage, mine.savings = sale.usage, sale.spared()
        self._tell.record(
            call,
            plan,
            seat.progress,
            status,
            usage=sale.usage,
            cost=FREE,
            savings=mine.savings,
            answer_model=sale.answer_model,
            error=error,
        )
        seat.leave()

    def _wants_comment(self, call: Call) -> bool:
        return call.stream and (call.options.stream_cost or self._world.settings.cost.stream_comment)

    def _waited(self, call: Call, plan: CachePlan, seat: Seat[Value]) -> tuple[CachePlan, Progress]:
        seat.progress.upstream_ms = (self._world.seams.monotonic() - call.arrived) * 1000
        return msgspec.structs.replace(plan, collapsed=True), seat.progress


def _seen(plan: CachePlan, seat: Seat[Value]) -> CachePlan:
    return plan if seat.led else msgspec.structs.replace(plan, collapsed=True)


def _suits(call: Call, value: Bought | Refusal) -> bool:
    """Whether another's answer is one for this call: it may be given twice, and has the usage chunk where wanted."""
    if isinstance(value, Refusal):
        return True
    if value.body is not None:
        return value.share is not Share.OWN
    return value.reel is not None and (value.usage_asked or not call.wants_usage)


def _status(ending: Ending, bought: Bought) -> tuple[int, str]:
    return (499, "client_gone") if ending.gone else (bought.status, ending.failure)


def _saved_lines(usage: Usage | None, saved: str | None) -> str:
    money = cost_lines(FREE, usage)
    return money if saved is None else f"{money}X-Proxy-Cost-Saved-USD: {saved}\r\n"


def _free_comment(endpoint: str, reel: Reel) -> bytes:
    audit = reel.flow.audit
    return cost_comment(FREE, usage_of(endpoint, {"usage": audit.usage}) if audit is not None else None)


async def _then(rest: Callable[[], Coroutine[Any, Any, None]], done: Callable[[], None]) -> None:
    try:
        await rest()
    finally:
        done()
