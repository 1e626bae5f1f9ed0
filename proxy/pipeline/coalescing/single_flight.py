"""Single flight: requests that ask the same at the same time share one upstream call (contract 7, Cache).

Everybody who asks takes a `Seat` in a `Flight`. The flight is a task of its own, so whoever leaves, leaves alone; with
the last one it ends, and the upstream is closed (or, with `finish`, it is read to its end for the cache alone). One
seat leads: what goes up is its request, what comes down is its purchase; the others get the same for nothing. How a
flight can end (`Share`):

- ALL: everybody has the answer, or the error that nobody would escape. A stream goes on after that, and who comes
  later boards it still.
- AGAIN: a failure that may not come again. It is its leader's; the next in line leads, with its own request, options
  and patience. After `TRIES` leaders the failure is everybody's.
- OWN: an answer that may not be given to another. The others go each on their own, at the same time; and so do all who
  ask this within the next minute (hit-for-miss), for nobody may wait in line for what cannot be shared.

A guest asks the same in the other form (plain, streamed): he waits until nobody can board the flight any more, which is
when its answer is stored or is known not to be, and then looks into the cache. He never leads.

Nobody waits longer than he said: a seat's own deadline and patience end its own waiting, the flight has the time of
whoever has most (`Horizon`). Memory is bounded by the requests in flight, and by `AVOIDED` names remembered.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Callable, Coroutine, Sequence
from enum import Enum
from functools import partial
from typing import Any, Final, Generic, TypeVar

import msgspec

from ...protocol.errors import Refusal
from ...upstream.deadline import Horizon
from ...upstream.progress import Progress

log = logging.getLogger("proxy")
T = TypeVar("T")
Name = tuple[str, str]
"""Cache key and form: those who name the same may share."""

TRIES: Final = 2
"""So many leaders a flight has at most (RELIABILITY P6)."""

AVOID_FOR: Final = 60.0
"""Seconds for which what could not be shared is not shared again."""

AVOIDED: Final = 10_000
"""Names remembered as not to be shared."""

FINISH_FOR: Final = 60.0
"""Seconds that an answer is still read for the cache when everybody has left (contract 3, `on_disconnect`)."""

_GRACE: Final = 1.0
"""Seconds that a flight has to tell of its own end, where a seat's deadline is the flight's."""


class Share(Enum):
    """Whose an outcome is."""

    ALL = "all"
    AGAIN = "again"
    OWN = "own"


class Landing(msgspec.Struct, Generic[T], frozen=True):
    """An outcome. rest: what the flight still does when everybody has it (a stream's flow); drop: ends at once what
    `value` or `rest` hold open, where nobody is left to take it."""

    value: T
    share: Share
    rest: Callable[[], Coroutine[Any, Any, None]] | None = None
    drop: Callable[[], None] | None = None


Lead = Callable[["Seat[T]"], Coroutine[Any, Any, Landing[T]]]
"""What a seat does to get the answer when it leads. Told the seat."""


class Seat(Generic[T]):
    """One request's part in a flight. It must be left exactly when its answer is done with; leaving twice is once.

    deadline, patience: monotonic seconds until when it waits at all, and for the queue; progress: of its own call;
    led: its own call went up, so the purchase is its own; taken: it has the outcome; guest: it waits for the end.
    """

    __slots__ = (
        "_landed",
        "_patient",
        "_timer",
        "deadline",
        "flight",
        "guest",
        "lead",
        "led",
        "patience",
        "progress",
        "taken",
    )

    def __init__(self, flight: Flight[T], lead: Lead[T], deadline: float, patience: float, guest: bool) -> None:
        self.flight = flight
        self.lead = lead
        self.deadline = deadline
        self.patience = min(patience, deadline)
        self.guest = guest
        self.progress = Progress(flight.horizon)
        self.led = False
        self.taken = False
        self._landed: asyncio.Future[Landing[T] | None] | None = flight.loop.create_future()
        self._patient = False  # it has waited as long as it would for the queue, and the queue was over
        self._timer: asyncio.TimerHandle | None = None

    async def landing(self) -> Landing[T] | None:
        """What became of it; for guests None, when there is no more to wait for. Raises Refusal(throttled,
        upstream_timeout) where this seat's own time is over first."""
        assert self._landed is not None, "left already"
        landing = await self._landed
        self.taken = True
        return landing

    def watch(self, extra: float = 0.0) -> None:
        """Ends its waiting when its own time is over. A lone leader needs no watch: the flight's time is its own."""
        if self._timer is None and self.waiting:
            until = self.deadline + extra if self.led or self.guest or self._patient else self.patience
            self._timer = self.flight.loop.call_later(max(0.0, until - self.flight.clock()), self._look)

    def _look(self) -> None:
        self._timer = None
        if not self.waiting:
            return
        now = self.flight.clock()
        impatient, self._patient = not (self.led or self.guest or self._patient), True
        if impatient and self.flight.queued:
            message = "an equal request waits for the configured rate limits, longer than this one may"
            self.fail(Refusal("throttled", message, retry_after=1.0))
        elif now < self.deadline:
            self.watch()
        elif not self.guest and self.flight.horizon.until <= self.deadline and now < self.deadline + _GRACE:
            self.watch(_GRACE)  # the flight's time is over now, too: it says how that was
        else:
            self.fail(Refusal("upstream_timeout", "the upstream did not answer in time"))

    @property
    def waiting(self) -> bool:
        return self._landed is not None and not self._landed.done()

    def give(self, landing: Landing[T] | None) -> None:
        if self._landed is not None and not self._landed.done():
            self._landed.set_result(landing)
        elif self.led and landing is not None:
            _drop(landing)

    def fail(self, error: BaseException) -> None:
        if self._landed is not None:
            self._landed.set_exception(error)

    def leave(self) -> None:
        """Waits for nothing any more, and lets go of the outcome. The last one to leave ends the flight."""
        landed, self._landed = self._landed, None
        if landed is None:
            return
        if self._timer is not None:
            self._timer.cancel()
        if not landed.done():
            landed.cancel()
        elif not landed.cancelled() and landed.exception() is None and self.led and not self.taken:
            landing = landed.result()
            if landing is not None:
                _drop(landing)
        self.flight.left_by(self)


class Flight(Generic[T]):
    """One answer on its way, for all who are aboard. finish: it is read to its end when all have left, if it went
    up."""

    def __init__(
        self, horizon: Horizon, clock: Callable[[], float], closed: Callable[[], object], finish: bool
    ) -> None:
        self.loop = asyncio.get_running_loop()
        self.horizon = horizon
        self.clock = clock
        self.over = False
        self.emptied: Callable[[], None] | None = None
        """Told when nobody is left who takes the answer as it comes."""
        self._finish = finish
        self._closed_by = closed
        self._closed = False
        self._aboard: dict[Seat[T], None] = {}
        self._leader: Seat[T] | None = None
        self._landing: Landing[T] | None = None
        self._last_call: asyncio.TimerHandle | None = None
        self._task: asyncio.Task[None] | None = self.loop.create_task(self._fly(), name="flight")
        self._task.add_done_callback(self._let_go)

    @property
    def queued(self) -> bool:
        """Its leader waits for a key or a limit."""
        if self._leader is None:
            return False
        progress = self._leader.progress
        return progress.attempts == 0 and not progress.elsewhere

    @property
    def unread(self) -> bool:
        """Nobody is aboard who takes the answer as it comes: it is for the cache alone."""
        return all(seat.guest for seat in self._aboard)

    def board(self, lead: Lead[T], deadline: float, patience: float, guest: bool = False) -> Seat[T]:
        seat = Seat(self, lead, deadline, patience, guest)
        if self._aboard or self._leader is not None:
            self.horizon.extend(deadline)
            if len(self._aboard) == 1:
                next(iter(self._aboard)).watch()
            seat.watch()
            if self._leader is not None:
                self._leader.progress.unread = False
        self._aboard[seat] = None
        if self._landing is not None and not guest:
            seat.give(self._landing)
        return seat

    def all_seated(self) -> bool:
        """Whether everybody aboard has taken the outcome up."""
        return all(seat.taken or seat.guest for seat in self._aboard)

    def close(self) -> None:
        """Nobody boards any more."""
        if self._closed:
            return
        self._closed = True
        self._closed_by()
        for seat in self._aboard:
            if seat.guest and seat.waiting:
                seat.give(None)
        if not self._aboard:
            self._end()

    def left_by(self, seat: Seat[T]) -> None:
        self._aboard.pop(seat, None)
        if self.over:
            return
        if self._aboard:
            if self.emptied is not None and self.unread:
                self.emptied()
            return
        if self._finish and not self._closed and self._leader is not None and not self.queued:
            if self._last_call is not None:
                self._last_call.cancel()
            self._last_call = self.loop.call_later(FINISH_FOR, self._end_unless_boarded)
            self._leader.progress.unread = True
            if self.emptied is not None:
                self.emptied()
        else:
            self._end()

    def _end_unless_boarded(self) -> None:
        if not self._aboard:
            self._end()

    def _end(self) -> None:
        if self.over:
            return
        self.over = True
        self.close()
        if self._landing is not None and self._landing.drop is not None:
            self._landing.drop()  # a stream: the upstream is closed here, not in some later turn of the loop
        if self._task is not None:
            self._task.cancel()

    def _let_go(self, _: object) -> None:
        """It has ended. Those who were aboard may still hold it: it holds none of them, nor what it brought."""
        self._task = self._leader = self._landing = self.emptied = None

    async def ended(self) -> None:
        """Returns when a flight that is over has put everything back."""
        if self.over and self._task is not None:
            await asyncio.wait([self._task])

    def _next(self) -> Seat[T] | None:
        """The next in line that has not got an outcome and has not led."""
        now = self.clock()
        for seat in self._aboard:
            if seat.waiting and not seat.led and not seat.guest and seat.deadline > now:
                return seat
        return None

    async def _fly(self) -> None:
        try:
            leader = self._next() or next(iter(self._aboard))
            for tries in range(1, TRIES + 1):
                if leader.guest:
                    return
                leader.led = True
                self._leader = leader
                landing = await leader.lead(leader)
                if landing.share is not Share.AGAIN or tries == TRIES or (successor := self._next()) is None:
                    break
                leader.give(landing)
                leader = successor
            self._land(leader, landing)
            if landing.rest is not None:
                await landing.rest()
        except asyncio.CancelledError:
            pass  # by `_end`, and it ends here: a task that ends cancelled keeps the frames, and they may hold the task
        except Exception as error:
            waiting = [seat for seat in self._aboard if seat.waiting and not seat.guest]
            for seat in waiting:
                seat.fail(error)
            if not waiting:
                log.exception("a request that nobody waits for any more failed inside the proxy")
        finally:
            self.over = True
            self.close()
            if self._last_call is not None:
                self._last_call.cancel()

    def _land(self, leader: Seat[T], landing: Landing[T]) -> None:
        self._landing = landing
        if landing.rest is None:
            self.over = True
            self.close()
        leader.give(landing)
        for seat in self._aboard:
            if seat.waiting and not seat.guest:
                seat.give(landing)


class Flights(Generic[T]):
    """All flights of one proxy. clock: monotonic seconds; finish: see `Flight`."""

    def __init__(self, clock: Callable[[], float], finish: bool = False) -> None:
        self._clock = clock
        self._finish = finish
        self._aloft: dict[Name, Flight[T]] = {}
        self._avoided: OrderedDict[Name, float] = OrderedDict()

    def __len__(self) -> int:
        """Flights that can be boarded now."""
        return len(self._aloft)

    def __contains__(self, name: Name) -> bool:
        return name in self._aloft

    def board(
        self, names: Sequence[Name], lead: Lead[T], deadline: float, patience: float, others: Sequence[Name] = ()
    ) -> Seat[T] | None:
        """A seat in a flight under one of `names`, or a guest's in one of the `others`, else in a new one under the
        first name. None: to be had alone only."""
        first = names[0]
        if self._avoided and self.avoids(first):
            return None
        for name in names:
            if name in self._aloft:
                return self._aloft[name].board(lead, deadline, patience)
        for name in others:
            if name in self._aloft:
                return self._aloft[name].board(lead, deadline, patience, guest=True)
        return self._start(first, deadline).board(lead, deadline, patience)

    def _start(self, name: Name, deadline: float) -> Flight[T]:
        horizon, closed = Horizon(deadline, self._clock), partial(self._aloft.pop, name, None)
        flight: Flight[T] = Flight(horizon, self._clock, closed, self._finish)
        self._aloft[name] = flight
        return flight

    def avoid(self, names: Sequence[Name]) -> None:
        """For `AVOID_FOR` seconds nobody waits for another's answer under these names."""
        for name in names:
            self._avoided[name] = self._clock() + AVOID_FOR
            self._avoided.move_to_end(name)
        while len(self._avoided) > AVOIDED:
            self._avoided.popitem(last=False)

    def avoids(self, name: Name) -> bool:
        until = self._avoided.get(name)
        if until is None:
            return False
        if until > self._clock():
            return True
        del self._avoided[name]
        return False


def _drop(landing: Landing[Any]) -> None:
    """Nobody takes this: what is the leader's alone is ended. What is everybody's ends with the flight."""
    if landing.share is not Share.ALL and landing.drop is not None:
        landing.drop()
