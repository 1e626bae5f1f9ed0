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
whoever has most (`SharedDeadline`). Memory is bounded by the requests in flight, and by `AVOIDED` names remembered.
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

from ...protocol.errors import ProxyError
from ...upstream.deadline import SharedDeadline
from ...upstream.progress import AttemptLog

log = logging.getLogger("proxy")
T = TypeVar("T")
FlightKey = tuple[str, str]
"""Cache key and form: those who name the same may share."""

MAX_LEADERS: Final = 2
"""So many leaders a flight has at most (RELIABILITY P6)."""

HIT_FOR_MISS: Final = 60.0
"""Seconds for which what could not be shared is not shared again."""

HIT_FOR_MISS_KEPT: Final = 10_000
"""Names remembered as not to be shared."""

FINISH_TIMEOUT: Final = 60.0
"""Seconds that an answer is still read for the cache when everybody has left (contract 3, `on_disconnect`)."""

_GRACE: Final = 1.0
"""Seconds that a flight has to tell of its own end, where a seat's deadline is the flight's."""


class Sharing(Enum):
    """Whose an outcome is."""

    SHARED = "all"
    RETRY = "again"
    PRIVATE = "own"


class FlightResult(msgspec.Struct, Generic[T], frozen=True):
    """An outcome. rest: what the flight still does when everybody has it (a stream's flow); drop: ends at once what
    `value` or `rest` hold open, where nobody is left to take it."""

    value: T
    share: Sharing
    rest: Callable[[], Coroutine[Any, Any, None]] | None = None
    drop: Callable[[], None] | None = None


Lead = Callable[["Waiter[T]"], Coroutine[Any, Any, FlightResult[T]]]
"""What a seat does to get the answer when it leads. Told the seat."""


class Waiter(Generic[T]):
    """One request's part in a flight. It must be left exactly when its answer is done with; leaving twice is once.

    deadline, patience: monotonic seconds until when it waits at all, and for the queue; progress: of its own call;
    led: its own call went up, so the purchase is its own; taken: it has the outcome; guest: it waits for the end.
    """

    __slots__ = (
        "_patient",
        "_result",
        "_timer",
        "attempt_log",
        "deadline",
        "flight",
        "lead",
        "led",
        "max_wait",
        "observer",
        "taken",
    )

    def __init__(self, flight: Flight[T], lead: Lead[T], deadline: float, patience: float, guest: bool) -> None:
        self.flight = flight
        self.lead = lead
        self.deadline = deadline
        self.max_wait = min(patience, deadline)
        self.observer = guest
        self.attempt_log = AttemptLog(flight.horizon)
        self.led = False
        self.taken = False
        self._result: asyncio.Future[FlightResult[T] | None] | None = flight.loop.create_future()
        self._patient = False  # it has waited as long as it would for the queue, and the queue was over
        self._timer: asyncio.TimerHandle | None = None

    async def result(self) -> FlightResult[T] | None:
        """What became of it; for guests None, when there is no more to wait for. Raises ProxyError(throttled,
        upstream_timeout) where this seat's own time is over first."""
        assert self._result is not None, "left already"
        landing = await self._result
        self.taken = True
        return landing

    def watch(self, extra: float = 0.0) -> None:
        """Ends its waiting when its own time is over. A lone leader needs no watch: the flight's time is its own."""
        if self._timer is None and self.waiting:
            until = self.deadline + extra if self.led or self.observer or self._patient else self.max_wait
            self._timer = self.flight.loop.call_later(max(0.0, until - self.flight.clock()), self._look)

    def _look(self) -> None:
        self._timer = None
        if not self.waiting:
            return
        now = self.flight.clock()
        impatient, self._patient = not (self.led or self.observer or self._patient), True
        if impatient and self.flight.queued:
            message = "an equal request waits for the configured rate limits, longer than this one may"
            self.set_exception(ProxyError("throttled", message, retry_after=1.0))
        elif now < self.deadline:
            self.watch()
        elif not self.observer and self.flight.horizon.at <= self.deadline and now < self.deadline + _GRACE:
            self.watch(_GRACE)  # the flight's time is over now, too: it says how that was
        else:
            self.set_exception(ProxyError("upstream_timeout", "the upstream did not answer in time"))

    @property
    def waiting(self) -> bool:
        return self._result is not None and not self._result.done()

    def set_result(self, landing: FlightResult[T] | None) -> None:
        if self._result is not None and not self._result.done():
            self._result.set_result(landing)
        elif self.led and landing is not None:
            _drop(landing)

    def set_exception(self, error: BaseException) -> None:
        if self._result is not None:
            self._result.set_exception(error)

    def leave(self) -> None:
        """Waits for nothing any more, and lets go of the outcome. The last one to leave ends the flight."""
        landed, self._result = self._result, None
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
        self, horizon: SharedDeadline, clock: Callable[[], float], closed: Callable[[], object], finish: bool
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
        self._waiters: dict[Waiter[T], None] = {}
        self._leader: Waiter[T] | None = None
        self._flight_result: FlightResult[T] | None = None
        self._finish_timer: asyncio.TimerHandle | None = None
        self._task: asyncio.Task[None] | None = self.loop.create_task(self._run(), name="flight")
        self._task.add_done_callback(self._let_go)

    @property
    def queued(self) -> bool:
        """Its leader waits for a key or a limit."""
        if self._leader is None:
            return False
        attempt_log = self._leader.attempt_log
        return attempt_log.attempts == 0 and not attempt_log.waiting_for_peer

    @property
    def for_cache_only(self) -> bool:
        """Nobody is aboard who takes the answer as it comes: it is for the cache alone."""
        return all(seat.observer for seat in self._waiters)

    def join(self, lead: Lead[T], deadline: float, patience: float, guest: bool = False) -> Waiter[T]:
        seat = Waiter(self, lead, deadline, patience, guest)
        if self._waiters or self._leader is not None:
            self.horizon.extend(deadline)
            if len(self._waiters) == 1:
                next(iter(self._waiters)).watch()
            seat.watch()
            if self._leader is not None:
                self._leader.attempt_log.for_cache_only = False
        self._waiters[seat] = None
        if self._flight_result is not None and not guest:
            seat.set_result(self._flight_result)
        return seat

    def all_taken(self) -> bool:
        """Whether everybody aboard has taken the outcome up."""
        return all(seat.taken or seat.observer for seat in self._waiters)

    def close(self) -> None:
        """Nobody boards any more."""
        if self._closed:
            return
        self._closed = True
        self._closed_by()
        for seat in self._waiters:
            if seat.observer and seat.waiting:
                seat.set_result(None)
        if not self._waiters:
            self._end()

    def left_by(self, seat: Waiter[T]) -> None:
        self._waiters.pop(seat, None)
        if self.over:
            return
        if self._waiters:
            if self.emptied is not None and self.for_cache_only:
                self.emptied()
            return
        if self._finish and not self._closed and self._leader is not None and not self.queued:
            if self._finish_timer is not None:
                self._finish_timer.cancel()
            self._finish_timer = self.loop.call_later(FINISH_TIMEOUT, self._end_unless_boarded)
            self._leader.attempt_log.for_cache_only = True
            if self.emptied is not None:
                self.emptied()
        else:
            self._end()

    def _end_unless_boarded(self) -> None:
        if not self._waiters:
            self._end()

    def _end(self) -> None:
        if self.over:
            return
        self.over = True
        self.close()
        if self._flight_result is not None and self._flight_result.drop is not None:
            self._flight_result.drop()  # a stream: the upstream is closed here, not in some later turn of the loop
        if self._task is not None:
            self._task.cancel()

    def _let_go(self, _: object) -> None:
        """It has ended. Those who were aboard may still hold it: it holds none of them, nor what it brought."""
        self._task = self._leader = self._flight_result = self.emptied = None

    async def ended(self) -> None:
        """Returns when a flight that is over has put everything back."""
        if self.over and self._task is not None:
            await asyncio.wait([self._task])

    def _next(self) -> Waiter[T] | None:
        """The next in line that has not got an outcome and has not led."""
        now = self.clock()
        for seat in self._waiters:
            if seat.waiting and not seat.led and not seat.observer and seat.deadline > now:
                return seat
        return None

    async def _run(self) -> None:
        try:
            leader = self._next() or next(iter(self._waiters))
            for tries in range(1, MAX_LEADERS + 1):
                if leader.observer:
                    return
                leader.led = True
                self._leader = leader
                landing = await leader.lead(leader)
                if landing.share is not Sharing.RETRY or tries == MAX_LEADERS or (successor := self._next()) is None:
                    break
                leader.set_result(landing)
                leader = successor
            self._deliver(leader, landing)
            if landing.rest is not None:
                await landing.rest()
        except asyncio.CancelledError:
            pass  # by `_end`, and it ends here: a task that ends cancelled keeps the frames, and they may hold the task
        except Exception as error:
            waiting = [seat for seat in self._waiters if seat.waiting and not seat.observer]
            for seat in waiting:
                seat.set_exception(error)
            if not waiting:
                log.exception("a request that nobody waits for any more failed inside the proxy")
        finally:
            self.over = True
            self.close()
            if self._finish_timer is not None:
                self._finish_timer.cancel()

    def _deliver(self, leader: Waiter[T], landing: FlightResult[T]) -> None:
        self._flight_result = landing
        if landing.rest is None:
            self.over = True
            self.close()
        leader.set_result(landing)
        for seat in self._waiters:
            if seat.waiting and not seat.observer:
                seat.set_result(landing)


class SingleFlight(Generic[T]):
    """All flights of one proxy. clock: monotonic seconds; finish: see `Flight`."""

    def __init__(self, clock: Callable[[], float], finish: bool = False) -> None:
        self._clock = clock
        self._finish = finish
        self._flights: dict[FlightKey, Flight[T]] = {}
        self._hit_for_miss: OrderedDict[FlightKey, float] = OrderedDict()

    def __len__(self) -> int:
        """Flights that can be boarded now."""
        return len(self._flights)

    def __contains__(self, name: FlightKey) -> bool:
        return name in self._flights

    def join(
        self,
        names: Sequence[FlightKey],
        lead: Lead[T],
        deadline: float,
        patience: float,
        others: Sequence[FlightKey] = (),
    ) -> Waiter[T] | None:
        """A seat in a flight under one of `names`, or a guest's in one of the `others`, else in a new one under the
        first name. None: to be had alone only."""
        first = names[0]
        if self._hit_for_miss and self.is_hit_for_miss(first):
            return None
        for name in names:
            if name in self._flights:
                return self._flights[name].join(lead, deadline, patience)
        for name in others:
            if name in self._flights:
                return self._flights[name].join(lead, deadline, patience, guest=True)
        return self._start(first, deadline).join(lead, deadline, patience)

    def _start(self, name: FlightKey, deadline: float) -> Flight[T]:
        horizon, closed = SharedDeadline(deadline, self._clock), partial(self._flights.pop, name, None)
        flight: Flight[T] = Flight(horizon, self._clock, closed, self._finish)
        self._flights[name] = flight
        return flight

    def mark_uncacheable(self, names: Sequence[FlightKey]) -> None:
        """For `AVOID_FOR` seconds nobody waits for another's answer under these names."""
        for name in names:
            self._hit_for_miss[name] = self._clock() + HIT_FOR_MISS
            self._hit_for_miss.move_to_end(name)
        while len(self._hit_for_miss) > HIT_FOR_MISS_KEPT:
            self._hit_for_miss.popitem(last=False)

    def is_hit_for_miss(self, name: FlightKey) -> bool:
        until = self._hit_for_miss.get(name)
        if until is None:
            return False
        if until > self._clock():
            return True
        del self._hit_for_miss[name]
        return False


def _drop(landing: FlightResult[Any]) -> None:
    """Nobody takes this: what is the leader's alone is ended. What is everybody's ends with the flight."""
    if landing.share is not Sharing.SHARED and landing.drop is not None:
        landing.drop()
