"""Admission to the limits: one queue for each model, bounded in time and length (`docs/keys-and-limits.md`).

Within a queue clients take turns, so a client with a thousand requests delays nobody else. Each client's own requests
keep their order of arrival. Only the head of a queue asks for admission, and it stays the head until it is admitted or
leaves: small requests do not overtake a large one for ever, and freed capacity wakes one waiter a queue, not all of
them. There are no tasks here. Each waiter sleeps on a future of its own, which a timer, `wake` or the departure of the
waiter before it resolves.
"""

from __future__ import annotations

import asyncio
import math
from collections import OrderedDict
from collections.abc import Callable, Coroutine
from typing import Any, Protocol, TypeVar

from .rate_limiter import Wait

# The wait told to a client when nobody knows it: a request in flight may end at any moment.
UNKNOWN_WAIT = 1.0

T = TypeVar("T")


class QueueFull(Exception):
    """`max_queue` requests wait already."""


class TimedOut(Exception):
    """The limits will have no room in time. `retry_after`: seconds until room is expected."""

    def __init__(self, retry_after: float) -> None:
        super().__init__(f"no room in time; expected in {retry_after:.3f} s")
        self.retry_after = retry_after


class Timer(Protocol):
    """What a `CallLater` returns."""

    def cancel(self) -> None: ...


class CallLater(Protocol):
    """Calls `callback` after `delay` seconds: `loop.call_later`, or the virtual clock of a test."""

    def __call__(self, delay: float, callback: Callable[[], None], /) -> Timer: ...


class _Waiter:
    """One request that waits. A wake-up while it is awake is only noted: it has just asked, or is about to."""

    __slots__ = ("_future", "wake_missed")

    def __init__(self) -> None:
        self._future: asyncio.Future[None] | None = None
        self.wake_missed = False

    async def wait(self, seconds: float, call_later: CallLater | None) -> None:
        """Sleep until `wake`, at most `seconds`."""
        loop = asyncio.get_running_loop()
        self._future = loop.create_future()
        timer = None if seconds == math.inf else (call_later or loop.call_later)(seconds, self.wake)
        try:
            await self._future
        finally:
            if timer is not None:
                timer.cancel()

    def wake(self) -> None:
        if self._future is not None and not self._future.done():
            self._future.set_result(None)
        else:
            self.wake_missed = True


class _ModelQueue:
    """The waiters of one model. retry_at: when the head was told to ask again, monotonic s; math.inf if unknown."""

    __slots__ = ("by_client", "length", "retry_at")

    def __init__(self, retry_at: float) -> None:
        self.retry_at = retry_at
        self.length = 0
        # Client -> its waiters. The head is the first waiter of the first client. Ordered dicts find the head and
        # remove a waiter from the middle in constant time.
        self.by_client: OrderedDict[str, OrderedDict[_Waiter, None]] = OrderedDict()

    def head(self) -> _Waiter:
        return next(iter(next(iter(self.by_client.values()))))

    def enter(self, client: str, waiter: _Waiter) -> None:
        self.by_client.setdefault(client, OrderedDict())[waiter] = None
        self.length += 1

    def leave(self, client: str, waiter: _Waiter) -> None:
        waiters = self.by_client[client]
        del waiters[waiter]
        if not waiters:
            del self.by_client[client]
        self.length -= 1

    def end_turn(self, client: str) -> None:
        """Let the other clients go before this one."""
        self.by_client.move_to_end(client)

    def expected_wait(self, now: float) -> float:
        """Return the seconds until the head asks again, as far as is known."""
        return UNKNOWN_WAIT if self.retry_at == math.inf else max(self.retry_at - now, UNKNOWN_WAIT)


Attempt = Callable[[float], T | Wait | Coroutine[Any, Any, T | Wait]]
"""Asks for admission at a monotonic time; returns what was reserved, or how long to wait."""


class AdmissionQueue:
    """The queues of all models.

    max_queue: most requests that may wait. clock: monotonic seconds. call_later: the running loop's own unless a test
    gives another. recheck: seconds after which a head asks again even if it was told to wait longer; needed where
    other processes free capacity without notifying this one.
    """

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
        self._queues: dict[str, _ModelQueue] = {}
        self.depth = 0

    def is_empty(self, model: str) -> bool:
        """Return whether nobody waits for this model, so that a request need not queue."""
        return model not in self._queues

    async def acquire(self, model: str, attempt: Attempt[T], max_wait: float, client: str = "") -> T:
        """Return what `attempt(now)` returns once it is no `Wait`. It is asked in turn, and again when `Wait` says so.

        Does not suspend when nobody waits for this model and there is room, unless `attempt` returns a coroutine,
        whose result counts then. max_wait: seconds, math.inf for ever. client: clients take turns. A result once
        obtained is returned without another await, so no cancellation can lose it; a cancelled coroutine must give
        back what it took. `attempt` must not call `wake` for what it gives back itself: queues would wake each other
        without end.

        Raises TimedOut as soon as it is known that waiting `max_wait` will not do, QueueFull if `max_queue` requests
        wait already.
        """
        now = self._clock()
        deadline = now + max_wait
        queue = self._queues.get(model)
        sleep, retry_at = max_wait, math.inf
        if queue is None:
            answer = attempt(now)
            if isinstance(answer, Coroutine):
                answer = await answer
                now = self._clock()
            if not isinstance(answer, Wait):
                return answer
            sleep = self._sleep_time(answer, deadline - now)
            retry_at = now + answer.seconds
            queue = self._queues.get(model)
            if queue is not None:  # others came while it asked
                sleep = deadline - now
        elif max_wait <= 0:
            raise TimedOut(queue.expected_wait(now))
        if self.depth >= self.max_queue:
            raise QueueFull
        if queue is None:
            queue = self._queues[model] = _ModelQueue(retry_at)
        waiter = _Waiter()
        queue.enter(client, waiter)
        self.depth += 1
        try:
            result = await self._wait_in(queue, waiter, attempt, sleep, deadline)
        except BaseException:
            self._leave(model, queue, waiter, client)
            raise
        self._leave(model, queue, waiter, client, admitted=True)
        return result

    async def _wait_in(
        self, queue: _ModelQueue, waiter: _Waiter, attempt: Attempt[T], sleep: float, deadline: float
    ) -> T:
        """Sleep and ask in turn until `attempt` succeeds. Raises TimedOut."""
        while True:
            await waiter.wait(sleep, self._call_later)
            now = self._clock()
            if queue.head() is waiter:
                waiter.wake_missed = False
                answer = attempt(now)
                suspended = isinstance(answer, Coroutine)
                if isinstance(answer, Coroutine):
                    answer = await answer
                    now = self._clock()
                if not isinstance(answer, Wait):
                    return answer
                queue.retry_at = now + answer.seconds
                sleep = self._sleep_time(answer, deadline - now)
                if suspended and waiter.wake_missed:
                    sleep = 0.0
            elif now >= deadline:
                raise TimedOut(queue.expected_wait(now))
            else:  # the timer was a little early
                sleep = deadline - now

    def _leave(self, model: str, queue: _ModelQueue, waiter: _Waiter, client: str, *, admitted: bool = False) -> None:
        was_head = queue.head() is waiter
        if admitted:
            queue.end_turn(client)
        queue.leave(client, waiter)
        self.depth -= 1
        if not queue.length:
            del self._queues[model]
        elif was_head:
            queue.head().wake()

    def wake(self, model: str | None = None) -> None:
        """Let the head of a model's queue ask again, or that of every queue (None): capacity may have come back."""
        if model is None:
            for queue in self._queues.values():
                queue.head().wake()
        elif model in self._queues:
            self._queues[model].head().wake()

    def depths(self) -> dict[str, int]:
        """Return how many requests wait for each model. A model that nobody waits for is not listed."""
        return {model: queue.length for model, queue in self._queues.items()}

    def _sleep_time(self, answer: Wait, left: float) -> float:
        """Return how long the head may sleep if it may wait `left` s more. Raises TimedOut if sleeping cannot help."""
        if answer.seconds == math.inf:
            if left <= 0:
                raise TimedOut(UNKNOWN_WAIT)
        elif left <= 0 or answer.seconds > left:
            raise TimedOut(answer.seconds)
        return min(answer.seconds, left, self._recheck)
