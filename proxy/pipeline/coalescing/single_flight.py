"""Single flight: requests that ask the same at the same time share one upstream request.

Each request has a `Waiter` in a `Flight`. The flight is a task of its own, so a client that leaves does not affect the
others. When the last one leaves the flight ends and the upstream connection is closed (or, with `reads_on`, the
response is read to its end for the cache alone). One waiter leads: its request is sent upstream and it pays; the others
get the same for free. How a flight can end is its `Sharing`:

- SHARED: all have the response, or an error that none would escape. A stream goes on after that, and requests that come
  later join it.
- RETRY: a failure that may not come again. It is the leader's; the next waiter leads, with its own request, options and
  time. After `MAX_LEADERS` leaders all get the failure.
- PRIVATE: a response that may not be given to another request. The others fetch on their own, at the same time, and so
  do all that ask the same within the next minute (`HitForMiss`): they must not wait in line for what cannot be shared.

An observer asks the same in the other form (plain or streamed). It waits until no request can join the flight any more,
because then its response is stored or is known not to be, and looks into the cache. It never leads.

A waiter's own deadline and `max_wait` end its own waiting only; the flight has the time of the request with the latest
deadline (`SharedDeadline`). Memory is bounded by the requests in flight.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable, Coroutine, Sequence
from enum import Enum
from functools import partial
from typing import Any, Final, Generic, TypeVar

import msgspec

from ...protocol.errors import ProxyError
from ...upstream.deadline import SharedDeadline
from ...upstream.progress import AttemptLog
from .hit_for_miss import FlightKey, HitForMiss

log = logging.getLogger("proxy")
T = TypeVar("T")

MAX_LEADERS: Final = 2
"""The number of leaders that a flight has, at most."""

READ_ON_TIMEOUT: Final = 60.0
"""Seconds for which a response is still read for the cache when all clients have left."""

_GRACE: Final = 1.0
"""Seconds that a flight has to tell of its own end, if a waiter's deadline is the flight's."""


class Sharing(Enum):
    """Which requests may have a result."""

    SHARED = "all"
    RETRY = "again"
    PRIVATE = "own"


class FlightResult(msgspec.Struct, Generic[T], frozen=True):
    """What a flight brings.

    rest: what the flight still does when all have the result (a stream flows). drop: closes at once what `value` or
    `rest` hold open, if no waiter is left to take it. unclaimed: is called if the leader does not take it any more.
    """

    value: T
    sharing: Sharing
    rest: Callable[[], Coroutine[Any, Any, None]] | None = None
    drop: Callable[[], None] | None = None
    unclaimed: Callable[[], None] | None = None


Lead = Callable[["Waiter[T]"], Coroutine[Any, Any, FlightResult[T]]]
"""Gets the result for a waiter that leads."""


class Waiter(Generic[T]):
    """One request's part in a flight. `leave` is called when its response is done with; twice is once.

    deadline, max_wait: monotonic seconds until which it waits at all, and for the queue.
    attempt_log: of its own request upstream. led: its own request was sent. taken: it has the result.
    observer: it waits for the end of the flight only.
    """

    __slots__ = (
        "_past_queue",
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

    def __init__(self, flight: Flight[T], lead: Lead[T], deadline: float, max_wait: float, observer: bool) -> None:
        self.flight = flight
        self.lead = lead
        self.deadline = deadline
        self.max_wait = min(max_wait, deadline)
        self.observer = observer
        self.attempt_log = AttemptLog(flight.shared_deadline)
        self.led = False
        self.taken = False
        self._result: asyncio.Future[FlightResult[T] | None] | None = flight.loop.create_future()
        self._past_queue = False  # its `max_wait` is over, and the queue was over before
        self._timer: asyncio.TimerHandle | None = None

    async def result(self) -> FlightResult[T] | None:
        """Return what the flight brings; None for observers, when there is no more to wait for.

        Raises ProxyError(throttled, upstream_timeout) if this waiter's own time is over first.
        """
        assert self._result is not None, "left already"
        result = await self._result
        self.taken = True
        return result

    def watch(self, extra: float = 0.0) -> None:
        """End its waiting when its own time is over. A lone leader needs no timer: the flight's time is its own."""
        if self._timer is None and self.waiting:
            until = self.deadline + extra if self.led or self.observer or self._past_queue else self.max_wait
            self._timer = self.flight.loop.call_later(max(0.0, until - self.flight.clock()), self._look)

    def _look(self) -> None:
        self._timer = None
        if not self.waiting:
            return
        now = self.flight.clock()
        waited_too_long, self._past_queue = not (self.led or self.observer or self._past_queue), True
        if waited_too_long and self.flight.queued:
            message = "an equal request waits for the configured rate limits, longer than this one may"
            self.set_exception(ProxyError("throttled", message, retry_after=1.0))
        elif now < self.deadline:
            self.watch()
        elif not self.observer and self.flight.shared_deadline.at <= self.deadline and now < self.deadline + _GRACE:
            self.watch(_GRACE)  # the flight's time is over now, too: it says how that was
        else:
            self.set_exception(ProxyError("upstream_timeout", "the upstream did not answer in time"))

    @property
    def waiting(self) -> bool:
        return self._result is not None and not self._result.done()

    def set_result(self, result: FlightResult[T] | None) -> None:
        if self._result is not None and not self._result.done():
            self._result.set_result(result)
        elif self.led and result is not None:
            _leave_unclaimed(result)

    def set_exception(self, error: BaseException) -> None:
        if self._result is not None:
            self._result.set_exception(error)

    def leave(self) -> None:
        """Wait for nothing any more, and let go of the result. The last one to leave ends the flight."""
        future, self._result = self._result, None
        if future is None:
            return
        if self._timer is not None:
            self._timer.cancel()
        if not future.done():
            future.cancel()
        elif not future.cancelled() and future.exception() is None and self.led and not self.taken:
            result = future.result()
            if result is not None:
                _leave_unclaimed(result)
        self.flight.left_by(self)


class Flight(Generic[T]):
    """One response on its way to all that wait for it.

    clock: returns monotonic seconds. closed: is called when no request can join any more.
    reads_on: the response is read to its end when all clients have left, if its request was sent.
    """

    def __init__(
        self, shared_deadline: SharedDeadline, clock: Callable[[], float], closed: Callable[[], object], reads_on: bool
    ) -> None:
        self.loop = asyncio.get_running_loop()
        self.shared_deadline = shared_deadline
        self.clock = clock
        self.over = False
        self.emptied: Callable[[], None] | None = None
        """Is called when no waiter is left that takes the response as it comes."""
        self._reads_on = reads_on
        self._closed_by = closed
        self._closed = False
        self._waiters: dict[Waiter[T], None] = {}
        self._leader: Waiter[T] | None = None
        self._flight_result: FlightResult[T] | None = None
        self._read_on_timer: asyncio.TimerHandle | None = None
        self._task: asyncio.Task[None] | None = self.loop.create_task(self._run(), name="flight")
        self._task.add_done_callback(self._let_go)

    @property
    def queued(self) -> bool:
        """Whether its leader waits for a key or a limit."""
        if self._leader is None:
            return False
        attempt_log = self._leader.attempt_log
        return attempt_log.attempts == 0 and not attempt_log.waiting_for_peer

    @property
    def for_cache_only(self) -> bool:
        """Whether no waiter takes the response as it comes: it is for the cache alone."""
        return all(waiter.observer for waiter in self._waiters)

    def join(
        self, lead: Lead[T], deadline: float, max_wait: float, act_until: float, observer: bool = False
    ) -> Waiter[T]:
        waiter = Waiter(self, lead, deadline, max_wait, observer)
        if self._waiters or self._leader is not None:
            self.shared_deadline.extend(deadline, act_until)
            if len(self._waiters) == 1:
                next(iter(self._waiters)).watch()
            waiter.watch()
            if self._leader is not None:
                self._leader.attempt_log.for_cache_only = False
        self._waiters[waiter] = None
        if self._flight_result is not None and not observer:
            waiter.set_result(self._flight_result)
        return waiter

    def all_taken(self) -> bool:
        """Whether every waiter has taken the result."""
        return all(waiter.taken or waiter.observer for waiter in self._waiters)

    def close(self) -> None:
        """No request joins any more."""
        if self._closed:
            return
        self._closed = True
        self._closed_by()
        for waiter in self._waiters:
            if waiter.observer and waiter.waiting:
                waiter.set_result(None)
        if not self._waiters:
            self._end()

    def left_by(self, waiter: Waiter[T]) -> None:
        self._waiters.pop(waiter, None)
        if self.over:
            return
        if self._waiters:
            if self.emptied is not None and self.for_cache_only:
                self.emptied()
            return
        if self._reads_on and not self._closed and self._leader is not None and not self.queued:
            if self._read_on_timer is not None:
                self._read_on_timer.cancel()
            self._read_on_timer = self.loop.call_later(READ_ON_TIMEOUT, self._end_unless_joined)
            self._leader.attempt_log.for_cache_only = True
            if self.emptied is not None:
                self.emptied()
        else:
            self._end()

    def _end_unless_joined(self) -> None:
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
        """Hold neither waiters nor result: waiters may still hold the flight when it has ended."""
        self._task = self._leader = self._flight_result = self.emptied = None

    async def ended(self) -> None:
        """Return when a flight that is over has given everything back."""
        if self.over and self._task is not None:
            await asyncio.wait([self._task])

    def _next(self) -> Waiter[T] | None:
        """Return the next waiter that has no result and has not led."""
        now = self.clock()
        for waiter in self._waiters:
            if waiter.waiting and not waiter.led and not waiter.observer and waiter.deadline > now:
                return waiter
        return None

    async def _run(self) -> None:
        try:
            leader = self._next() or next(iter(self._waiters))
            for tries in range(1, MAX_LEADERS + 1):
                if leader.observer:
                    return
                leader.led = True
                self._leader = leader
                result = await leader.lead(leader)
                if result.sharing is not Sharing.RETRY or tries == MAX_LEADERS or (successor := self._next()) is None:
                    break
                leader.set_result(result)
                leader = successor
            self._deliver(leader, result)
            if result.rest is not None:
                await result.rest()
        except asyncio.CancelledError:
            pass  # by `_end`, and it ends here: a task that ends cancelled keeps the frames, and they may hold the task
        except Exception as error:
            waiting = [waiter for waiter in self._waiters if waiter.waiting and not waiter.observer]
            for waiter in waiting:
                waiter.set_exception(error)
            if not waiting:
                log.exception("a request that nobody waits for any more failed inside the proxy")
        finally:
            self.over = True
            self.close()
            if self._read_on_timer is not None:
                self._read_on_timer.cancel()

    def _deliver(self, leader: Waiter[T], result: FlightResult[T]) -> None:
        self._flight_result = result
        if result.rest is None:
            self.over = True
            self.close()
        leader.set_result(result)
        for waiter in self._waiters:
            if waiter.waiting and not waiter.observer:
                waiter.set_result(result)


class SingleFlight(Generic[T]):
    """All flights of one process. clock: returns monotonic seconds; reads_on: as in `Flight`."""

    def __init__(self, clock: Callable[[], float], hit_for_miss: HitForMiss, reads_on: bool = False) -> None:
        self._clock = clock
        self.hit_for_miss = hit_for_miss
        self._reads_on = reads_on
        self._flights: dict[FlightKey, Flight[T]] = {}

    def __len__(self) -> int:
        """Return the number of flights that can be joined now."""
        return len(self._flights)

    def __contains__(self, key: FlightKey) -> bool:
        return key in self._flights

    def join(
        self,
        keys: Sequence[FlightKey],
        lead: Lead[T],
        deadline: float,
        max_wait: float,
        observed: Sequence[FlightKey] = (),
        act_until: float = math.inf,
    ) -> Waiter[T] | None:
        """Join a flight under one of `keys`, or as an observer under one of `observed`, else start one under the first.

        None: the request cannot share and is to be sent alone.
        """
        first = keys[0]
        if first in self.hit_for_miss:
            return None
        for key in keys:
            if key in self._flights:
                return self._flights[key].join(lead, deadline, max_wait, act_until)
        for key in observed:
            if key in self._flights:
                return self._flights[key].join(lead, deadline, max_wait, act_until, observer=True)
        return self._start(first, deadline, act_until).join(lead, deadline, max_wait, act_until)

    def _start(self, key: FlightKey, deadline: float, act_until: float) -> Flight[T]:
        shared_deadline = SharedDeadline(deadline, self._clock, act_until)
        closed = partial(self._flights.pop, key, None)
        flight: Flight[T] = Flight(shared_deadline, self._clock, closed, self._reads_on)
        self._flights[key] = flight
        return flight


def _leave_unclaimed(result: FlightResult[Any]) -> None:
    """The leader does not take its result. What only it may have is closed; what all may have ends with the flight."""
    if result.unclaimed is not None:
        result.unclaimed()
    if result.sharing is not Sharing.SHARED and result.drop is not None:
        result.drop()
