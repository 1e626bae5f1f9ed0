"""The waiting room before the limits: a lane for each model, bounded in time and length.

Within a lane clients take turns, so that one with a thousand requests starves nobody, and each client's own requests
go in order of arrival. Only the head of a lane asks for admission, and stays the head until it is in or gone: a large
request is not overtaken for ever by small ones, and what comes back wakes one waiter a lane, not all of them. There are
no tasks here: each waiter sleeps on a future of its own, resolved by a timer, by `notify`, or by the departure of the
one before it.
"""

from __future__ import annotations

import asyncio
import math
from collections import OrderedDict
from collections.abc import Callable, Coroutine
from typing import Any, Protocol, TypeVar

from .rate_limiter import Wait

# Said where nobody knows when room will come: the request at work may end at any moment.
UNKNOWN = 1.0

T = TypeVar("T")


class QueueFull(Exception):
    """As many wait already as may."""


class TimedOut(Exception):
    """Room would come too late. `retry_after`: seconds until it is expected."""

    def __init__(self, retry_after: float) -> None:
        super().__init__(f"no room in time; expected in {retry_after:.3f} s")
        self.retry_after = retry_after


class Timer(Protocol):
    """What a `CallLater` answers."""

    def cancel(self) -> None: ...


class CallLater(Protocol):
    """Has the loop call `callback` after `delay` seconds: `loop.call_later`, or a test's turned clock."""

    def __call__(self, delay: float, callback: Callable[[], None], /) -> Timer: ...


class _Waiter:
    """One sleeper. A wake-up while it is awake is only noted (`missed`): it is about to ask, or has just asked."""

    __slots__ = ("_sleep", "missed")

    def __init__(self) -> None:
        self._sleep: asyncio.Future[None] | None = None
        self.missed = False

    async def wait(self, seconds: float, call_later: CallLater | None) -> None:
        """Until `wake`, at most `seconds`."""
        loop = asyncio.get_running_loop()
        self._sleep = loop.create_future()
        timer = None if seconds == math.inf else (call_later or loop.call_later)(seconds, self.wake)
        try:
            await self._sleep
        finally:
            if timer is not None:
                timer.cancel()

    def wake(self) -> None:
        if self._sleep is not None and not self._sleep.done():
            self._sleep.set_result(None)
        else:
            self.missed = True


class _ModelQueue:
    """Who waits, in order, and when (monotonic s; math.inf: unknown) the head was told to ask again."""

    __slots__ = ("count", "due", "queues")

    def __init__(self, due: float) -> None:
        self.due = due
        self.count = 0
        # Client -> its waiters; the first one of the first client is the head. Ordered: constant time both to find
        # the head and to leave from the middle.
        self.queues: OrderedDict[str, OrderedDict[_Waiter, None]] = OrderedDict()

    def head(self) -> _Waiter:
        return next(iter(next(iter(self.queues.values()))))

    def enter(self, client: str, waiter: _Waiter) -> None:
        self.queues.setdefault(client, OrderedDict())[waiter] = None
        self.count += 1

    def leave(self, client: str, waiter: _Waiter) -> None:
        queue = self.queues[client]
        del queue[waiter]
        if not queue:
            del self.queues[client]
        self.count -= 1

    def pass_on(self, client: str) -> None:
        """This client's turn is over."""
        self.queues.move_to_end(client)

    def expected(self, now: float) -> float:
        return UNKNOWN if self.due == math.inf else max(self.due - now, UNKNOWN)


class AdmissionQueue:
    """`clock`: monotonic seconds. `call_later`: the running loop's own unless a test turns time. `recheck`: seconds
    after which a head asks again though it was told a longer wait: where others may give back unheard."""

    def __init__(
        self,
        max_queue: int,
        clock: Callable[[], float],
        call_later: CallLater | None = None,
        recheck: float = math.inf,
    ) -> None:
        self._recheck = recheck
        self.max_queue = max_queue
        self._clock = clock
        self._call_later = call_later
        self._lanes: dict[str, _ModelQueue] = {}
        self.depth = 0

    async def acquire(
        self,
        lane: str,
        attempt: Callable[[float], T | Wait | Coroutine[Any, Any, T | Wait]],
        patience: float,
        client: str = "",
    ) -> T:
        """What `attempt(now)` answers once it is no `Wait`, asking in turn and when `Wait` says.

        Does not suspend when nobody waits in this lane and there is room, unless `attempt` answers a coroutine, whose
        result counts then. `patience`: seconds, math.inf for ever. client: whose turn it is; clients alternate. An
        answer once obtained is returned without another await, so that no cancellation can lose it (a coroutine that
        is cancelled gives back itself). `attempt` must not `notify` of what it gives back itself: lanes would wake
        each other without end. Raises TimedOut as soon as it is known that patience will not do; QueueFull where
        `max_queue` wait already.
        """
        now = self._clock()
        deadline = now + patience
        line = self._lanes.get(lane)
        nap, due = patience, math.inf
        if line is None:
            answer = attempt(now)
            if isinstance(answer, Coroutine):
                answer = await answer
                now = self._clock()
            if not isinstance(answer, Wait):
                return answer
            nap = self._wait(answer, deadline - now)
            due = now + answer.seconds
            line = self._lanes.get(lane)
            if line is not None:  # others came while it asked
                nap = deadline - now
        elif patience <= 0:
            raise TimedOut(line.expected(now))
        if self.depth >= self.max_queue:
            raise QueueFull
        if line is None:
            line = self._lanes[lane] = _ModelQueue(due)
        waiter = _Waiter()
        line.enter(client, waiter)
        self.depth += 1
        admitted = False
        try:
            while True:
                await waiter.wait(nap, self._call_later)
                now = self._clock()
                if line.head() is waiter:
                    waiter.missed = False
                    answer = attempt(now)
                    asked = isinstance(answer, Coroutine)
                    if isinstance(answer, Coroutine):
                        answer = await answer
                        now = self._clock()
                    if not isinstance(answer, Wait):
                        admitted = True
                        return answer
                    line.due = now + answer.seconds
                    nap = self._wait(answer, deadline - now)
                    if asked and waiter.missed:
                        nap = 0.0
                elif now >= deadline:
                    raise TimedOut(line.expected(now))
                else:  # the timer ran a hair fast
                    nap = deadline - now
        finally:
            was_head = line.head() is waiter
            if admitted:
                line.pass_on(client)
            line.leave(client, waiter)
            self.depth -= 1
            if not line.count:
                del self._lanes[lane]
            elif was_head:
                line.head().wake()

    def wake(self, lane: str | None = None) -> None:
        """Something came back (None: perhaps to every lane): the head asks again, one wake-up a lane."""
        if lane is None:
            for line in self._lanes.values():
                line.head().wake()
        elif lane in self._lanes:
            self._lanes[lane].head().wake()

    def depths(self) -> dict[str, int]:
        """How many wait in each lane; a lane without waiters does not exist."""
        return {lane: line.count for lane, line in self._lanes.items()}

    def _wait(self, answer: Wait, left: float) -> float:
        """How long the head may sleep with `left` s of patience. Raises TimedOut where sleep cannot help."""
        if answer.seconds == math.inf:
            if left <= 0:
                raise TimedOut(UNKNOWN)
        elif left <= 0 or answer.seconds > left:
            raise TimedOut(answer.seconds)
        return min(answer.seconds, left, self._recheck)
