"""The waiting room, in turned time: order, patience, wake-ups, and nobody forgotten whatever is cancelled."""

from __future__ import annotations

import asyncio
import heapq
import itertools
import math
import random
import time
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, TypeVar

import pytest

from proxy.config.limits import Limits
from proxy.upstream.limits.queue import AdmissionQueue, QueueFull, TimedOut
from proxy.upstream.limits.rate_limiter import ExceedsLimit, RateLimiter, Reservation, Wait

T = TypeVar("T")


class Turned:
    """A clock that stands still until `turn`, with the timers that hang on it."""

    def __init__(self) -> None:
        self.now = 1000.0
        self._timers: list[tuple[float, int, _Timer]] = []
        self._order = itertools.count()

    def __call__(self) -> float:
        return self.now

    def call_later(self, delay: float, callback: Callable[[], None], /) -> _Timer:
        assert 0 <= delay < math.inf
        timer = _Timer(callback)
        heapq.heappush(self._timers, (self.now + delay, next(self._order), timer))
        return timer

    @property
    def pending(self) -> int:
        return sum(timer.live for *_, timer in self._timers)

    async def turn(self, seconds: float) -> None:
        end = self.now + seconds
        await settled()
        while self._timers and self._timers[0][0] <= end:
            due, _, timer = heapq.heappop(self._timers)
            self.now = max(self.now, due)
            if timer.live:
                timer.live = False
                timer.callback()
                await settled()
        self.now = end
        await settled()


class _Timer:
    def __init__(self, callback: Callable[[], None]) -> None:
        self.callback = callback
        self.live = True

    def cancel(self) -> None:
        self.live = False


async def settled() -> None:
    for _ in range(60):
        await asyncio.sleep(0)


class Room:
    """A scripted limit: `free` admissions, then the wait it says; notes who asked and when."""

    def __init__(self, free: int = 0, says: float = math.inf) -> None:
        self.free = free
        self.says = says
        self.asked: list[tuple[object, float]] = []

    def ask(self, who: object) -> Callable[[float], object]:
        def attempt(now: float) -> object:
            self.asked.append((who, now))
            if self.free:
                self.free -= 1
                return who
            return Wait(self.says)

        return attempt


def gate_and_clock(max_queue: int = 1000) -> tuple[AdmissionQueue, Turned]:
    clock = Turned()
    return AdmissionQueue(max_queue, clock, clock.call_later), clock


def enter(
    gate: AdmissionQueue, room: Room, who: object, patience: float = 60.0, lane: str = "m", client: str = ""
) -> asyncio.Task[object]:
    return asyncio.create_task(gate.acquire(lane, room.ask(who), patience, client))


def stepped_once(awaitable: Awaitable[T]) -> T:
    """The result of a coroutine that must not suspend."""
    step: Any = awaitable.__await__()
    with pytest.raises(StopIteration) as done:
        next(step)
    result: T = done.value.value
    return result


# --- the fast path --------------------------------------------------------------------------------


def test_with_room_and_nobody_waiting_it_does_not_suspend() -> None:
    gate, clock = gate_and_clock()
    assert stepped_once(gate.acquire("m", Room(free=1).ask("a"), 60)) == "a"
    assert gate.depth == 0
    assert clock.pending == 0


def test_only_a_wait_means_waiting() -> None:
    gate, _ = gate_and_clock(max_queue=0)
    never = ExceedsLimit("too large")
    assert stepped_once(gate.acquire("m", lambda now: never, 60)) is never
    assert stepped_once(gate.acquire("m", lambda now: None, 0)) is None


def test_an_error_of_the_attempt_is_the_callers() -> None:
    gate, _ = gate_and_clock()

    def attempt(now: float) -> Wait:
        raise LookupError

    with pytest.raises(LookupError):
        asyncio.run(gate.acquire("m", attempt, 60))
    assert gate.depths() == {}


# --- waiting --------------------------------------------------------------------------------------


async def test_the_head_asks_again_exactly_when_it_was_told() -> None:
    gate, clock = gate_and_clock()
    room = Room(says=2.0)
    waiting = enter(gate, room, "a", patience=5)
    await clock.turn(1.999)
    assert not waiting.done()
    room.free = 1
    await clock.turn(0.001)
    assert await waiting == "a"
    assert room.asked == [("a", 1000.0), ("a", 1002.0)]
    assert gate.depth == 0
    assert clock.pending == 0


async def test_only_the_head_asks_and_order_is_kept() -> None:
    gate, clock = gate_and_clock()
    room = Room(says=2.0)
    waiting = [enter(gate, room, who) for who in "abcd"]
    await clock.turn(0)
    assert [who for who, _ in room.asked] == ["a"]
    assert gate.depths() == {"m": 4}
    room.free = 2
    await clock.turn(2)
    assert [task.done() for task in waiting] == [True, True, False, False]
    assert [who for who, _ in room.asked] == ["a", "a", "b", "c"]
    room.free = 5
    late = enter(gate, room, "e")
    await clock.turn(1)
    assert not late.done(), "nobody overtakes, whatever room there is"
    await clock.turn(1)
    assert [await task for task in [*waiting, late]] == list("abcde")
    assert gate.depths() == {}


async def test_models_do_not_wait_for_each_other() -> None:
    gate, clock = gate_and_clock()
    slow = enter(gate, Room(), "slow", lane="one")
    await clock.turn(0)
    assert await gate.acquire("two", Room(free=1).ask("quick"), 60) == "quick"
    slow.cancel()
    await settled()
    assert gate.depth == 0


async def test_a_wait_longer_than_max_wait_fails_at_once_with_the_delay() -> None:
    gate, _ = gate_and_clock()
    with pytest.raises(TimedOut) as refused:
        await gate.acquire("m", Room(says=7200.0).ask("a"), 60)
    assert refused.value.retry_after == 7200.0
    assert "7200.000 s" in str(refused.value)
    assert gate.depths() == {}


async def test_max_wait_may_be_exactly_the_wait() -> None:
    gate, clock = gate_and_clock()
    room = Room(says=60.0)
    waiting = enter(gate, room, "a", patience=60)
    await clock.turn(59)
    room.free = 1
    await clock.turn(1)
    assert await waiting == "a"


@pytest.mark.parametrize("patience", [0.0, -3.0])
async def test_with_max_wait_0_nothing_waits(patience: float) -> None:
    gate, clock = gate_and_clock(max_queue=1)
    assert await gate.acquire("m", Room(free=1).ask("a"), patience) == "a"
    for says, delay in ((0.25, 0.25), (0.0, 0.0), (math.inf, 1.0)):
        with pytest.raises(TimedOut) as refused:
            await gate.acquire("m", Room(says=says).ask("a"), patience)
        assert refused.value.retry_after == delay
    head = enter(gate, Room(says=30.0), "head")
    await clock.turn(10)
    untried = Room(free=1)
    with pytest.raises(TimedOut) as refused:
        await gate.acquire("m", untried.ask("b"), patience)
    assert refused.value.retry_after == 20.0
    assert untried.asked == [], "it would have overtaken the head"
    head.cancel()


async def test_the_heads_wait_may_grow_beyond_max_wait() -> None:
    gate, clock = gate_and_clock()
    room, patient = Room(says=3.0), Room(says=3.0)
    first, second = enter(gate, room, "a", patience=5), enter(gate, patient, "b", patience=60)
    await clock.turn(0)
    await clock.turn(3)  # asks, is told 3 more, has 2
    with pytest.raises(TimedOut) as refused:
        await first
    assert refused.value.retry_after == 3.0
    assert patient.asked == [("b", 1003.0)], "the next one is head at once"
    patient.free = 1
    await clock.turn(3)
    assert await second == "b"


async def test_a_later_waiter_that_times_out_never_asks() -> None:
    gate, clock = gate_and_clock()
    head = enter(gate, Room(says=30.0), "a")
    room = Room(free=1)
    later = enter(gate, room, "b", patience=10)
    nearly = enter(gate, room, "c", patience=29.5)
    await clock.turn(10)
    with pytest.raises(TimedOut) as refused:
        await later
    assert refused.value.retry_after == 20.0
    await clock.turn(19.5)
    with pytest.raises(TimedOut) as refused:
        await nearly
    assert refused.value.retry_after == 1.0, "never less than a second"
    assert room.asked == []
    assert gate.depths() == {"m": 1}
    head.cancel()


async def test_a_queue_that_is_full_says_so_at_once() -> None:
    gate, clock = gate_and_clock(max_queue=2)
    one, two = enter(gate, Room(), "a", lane="x"), enter(gate, Room(), "b", lane="y")
    await clock.turn(0)
    for lane in ("x", "z"):
        with pytest.raises(QueueFull):
            await gate.acquire(lane, Room().ask("c"), 60)
    assert await gate.acquire("z", Room(free=1).ask("c"), 60) == "c", "who need not wait is let in"
    one.cancel()
    await settled()
    three = enter(gate, Room(), "d", lane="z")
    await clock.turn(0)
    assert gate.depths() == {"y": 1, "z": 1}
    two.cancel()
    three.cancel()
    await settled()
    assert gate.depth == 0


# --- notify ---------------------------------------------------------------------------------------


async def test_an_unknown_wait_ends_with_wake() -> None:
    gate, clock = gate_and_clock()
    room = Room()
    waiting = [enter(gate, room, who, patience=math.inf) for who in "abc"]
    await clock.turn(1e6)
    assert clock.pending == 0
    assert len(room.asked) == 1
    room.free = 1
    gate.wake("m")
    gate.wake("m")
    gate.wake("another")
    await settled()
    assert [task.done() for task in waiting] == [True, False, False]
    assert [who for who, _ in room.asked] == ["a", "a", "b"], "one wake-up, and one for the new head"
    room.free = 2
    gate.wake()
    await settled()
    assert [await task for task in waiting] == list("abc")
    gate.wake()


async def test_an_unknown_wait_ends_with_max_wait() -> None:
    gate, clock = gate_and_clock()
    waiting = enter(gate, Room(), "a", patience=10)
    await clock.turn(9.9)
    assert not waiting.done()
    await clock.turn(0.1)
    with pytest.raises(TimedOut) as refused:
        await waiting
    assert refused.value.retry_after == 1.0


async def test_wake_wakes_the_head_of_every_queue() -> None:
    gate, clock = gate_and_clock()
    rooms = [Room(), Room(), Room()]
    waiting = [enter(gate, room, n, lane=str(n)) for n, room in enumerate(rooms) for _ in range(5)]
    await clock.turn(0)
    gate.wake()
    await settled()
    assert [len(room.asked) for room in rooms] == [2, 2, 2]
    for task in waiting:
        task.cancel()
    await settled()
    assert gate.depths() == {}


async def test_wake_from_within_an_attempt_does_not_spin() -> None:
    gate, clock = gate_and_clock()
    asked = 0

    def attempt(now: float) -> Wait:
        nonlocal asked
        asked += 1
        gate.wake()
        return Wait(5.0)

    waiting: asyncio.Task[None] = asyncio.create_task(gate.acquire("m", attempt, 60))
    await clock.turn(5)
    assert asked == 2
    waiting.cancel()


async def test_a_timer_that_fires_early_changes_nothing() -> None:
    clock = Turned()
    gate = AdmissionQueue(10, clock, lambda delay, callback: clock.call_later(delay * 0.9, callback))
    room = Room(says=30.0)
    head, later = enter(gate, room, "a"), enter(gate, room, "b", patience=10)
    await clock.turn(9.99)
    assert not later.done()
    await clock.turn(0.1)
    with pytest.raises(TimedOut):
        await later
    head.cancel()


# --- leaving --------------------------------------------------------------------------------------


async def test_a_cancelled_head_wakes_the_next() -> None:
    gate, clock = gate_and_clock()
    room = Room(says=30.0)
    first, second = enter(gate, room, "a"), enter(gate, room, "b")
    await clock.turn(1)
    first.cancel()
    await settled()
    assert room.asked == [("a", 1000.0), ("b", 1001.0)]
    room.free = 1
    gate.wake("m")
    assert await second == "b"
    assert clock.pending == 0


async def test_a_head_cancelled_after_its_wake_up_passes_it_on() -> None:
    gate, clock = gate_and_clock()
    room = Room()
    first, second = enter(gate, room, "a"), enter(gate, room, "b")
    await clock.turn(1)
    room.free = 1
    gate.wake("m")
    first.cancel()  # woken, but not running yet
    assert await second == "b"
    with pytest.raises(asyncio.CancelledError):
        await first
    assert gate.depth == 0


async def test_a_waiter_that_leaves_from_the_middle_wakes_nobody() -> None:
    gate, clock = gate_and_clock()
    room = Room(says=30.0)
    waiting = [enter(gate, room, who) for who in "abc"]
    await clock.turn(1)
    waiting[1].cancel()
    await settled()
    assert len(room.asked) == 1
    room.free = 2
    await clock.turn(30)
    assert await waiting[0] == "a"
    assert await waiting[2] == "c"


async def test_an_attempt_that_fails_leaves_the_queue() -> None:
    gate, clock = gate_and_clock()
    room = Room(says=5.0)

    def breaking(now: float) -> Wait:
        if now > 1000:
            raise LookupError
        return Wait(5.0)

    first: asyncio.Task[None] = asyncio.create_task(gate.acquire("m", breaking, 60))
    second = enter(gate, room, "b")
    await clock.turn(0)
    room.free = 1
    await clock.turn(5)
    with pytest.raises(LookupError):
        await first
    assert await second == "b"


async def test_a_cancellation_never_loses_what_was_obtained() -> None:
    gate, clock = gate_and_clock()
    room = Room(says=5.0)
    got: list[object] = []

    async def caller() -> None:
        def attempt(now: float) -> object:
            answer = room.ask("a")(now)
            if answer == "a":
                task.cancel()  # as late as can be: with the answer in hand
            return answer

        got.append(await gate.acquire("m", attempt, 60))
        await asyncio.sleep(0)
        raise AssertionError("the cancellation comes at the caller's next await")

    task = asyncio.create_task(caller())
    await clock.turn(4)
    room.free = 1
    await clock.turn(1)
    with pytest.raises(asyncio.CancelledError):
        await task
    assert got == ["a"]
    assert gate.depth == 0


# --- clients --------------------------------------------------------------------------------------


async def test_clients_take_turns_and_each_ones_requests_keep_their_order() -> None:
    gate, clock = gate_and_clock()
    room, went = Room(says=1.0), list[str]()
    names = [f"a{n}" for n in range(6)] + ["b0", "b1", "c0", "b2"]
    tasks = [enter(gate, room, name, client=name[0]) for name in names]
    await clock.turn(0)
    for _ in names:
        room.free = 1
        await clock.turn(1)
        went += [name for name, task in zip(names, tasks, strict=True) if task.done() and name not in went]
    assert went == ["a0", "b0", "c0", "a1", "b1", "a2", "b2", "a3", "a4", "a5"]
    assert gate.depths() == {}


async def test_a_waiter_that_leaves_keeps_its_clients_turn_and_wakes_the_next() -> None:
    gate, clock = gate_and_clock()
    room = Room(says=30.0)
    a0, a1, b0 = (enter(gate, room, name, client=name[0]) for name in ("a0", "a1", "b0"))
    await clock.turn(1)
    a0.cancel()
    await settled()
    assert room.asked == [("a0", 1000.0), ("a1", 1001.0)]
    room.free = 2
    gate.wake("m")
    assert (await a1, await b0) == ("a1", "b0")


async def test_a_client_with_a_thousand_requests_does_not_starve_another() -> None:
    gate, clock = gate_and_clock()
    room = Room(says=1.0)
    crowd = [enter(gate, room, n, patience=math.inf, client="crowd") for n in range(900)]
    await clock.turn(0)
    lonely = enter(gate, room, "lonely", patience=math.inf, client="lonely")
    for _ in range(2):
        room.free = 1
        await clock.turn(1)
    assert await lonely == "lonely"
    assert sum(task.done() for task in crowd) == 1
    for task in crowd:
        task.cancel()
    await settled()
    assert gate.depth == 0


async def test_a_large_request_is_not_overtaken_for_ever_by_small_ones() -> None:
    """900 of 1,000 tokens, while another client asks for 100 all the time: it goes within two windows."""
    gate, clock = gate_and_clock()
    allowance = RateLimiter(Limits(tpm=1000))

    async def small() -> None:
        while True:
            await gate.acquire("m", lambda now: allowance.reserve(100, now), math.inf, "small")

    async def large() -> float:
        await gate.acquire("m", lambda now: allowance.reserve(900, now), math.inf, "large")
        return clock.now

    busy = [asyncio.create_task(small()) for _ in range(5)]
    await clock.turn(30)
    waiting = asyncio.create_task(large())
    await clock.turn(121)
    assert waiting.done()
    for task in busy:
        task.cancel()
    await settled()


# --- answers from afar ----------------------------------------------------------------------------


def _arrive(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


class Afar(Room):
    """A limit that is asked over a wire: the answer is a coroutine, and takes 10 ms."""

    def __init__(self, clock: Turned, free: int = 0, says: float = math.inf) -> None:
        super().__init__(free, says)
        self.clock = clock
        self.given_back = 0

    def ask(self, who: object) -> Callable[[float], Any]:
        decide = super().ask(who)

        async def asked() -> object:
            answer = decide(self.clock.now)
            arrived = asyncio.get_running_loop().create_future()
            self.clock.call_later(0.01, partial(_arrive, arrived))
            try:
                await arrived
            except asyncio.CancelledError:
                self.given_back += not isinstance(answer, Wait)
                raise
            return answer

        return lambda now: asked()


async def test_with_room_coroutine_attempts_run_side_by_side() -> None:
    gate, clock = gate_and_clock()
    room = Afar(clock, free=3)
    tasks = [enter(gate, room, n) for n in range(3)]
    await clock.turn(0.01)
    assert [await task for task in tasks] == [0, 1, 2]
    assert clock.now == 1000.01


async def test_a_coroutine_attempt_told_to_wait_joins_the_queue() -> None:
    gate, clock = gate_and_clock()
    room = Afar(clock, says=5.0)
    tasks = [enter(gate, room, who) for who in "abc"]
    await clock.turn(0.02)
    assert gate.depths() == {"m": 3}
    room.free = 3
    await clock.turn(6)
    assert [await task for task in tasks] == list("abc")
    assert [who for who, _ in room.asked] == list("abcabc")
    with pytest.raises(TimedOut):
        await asyncio.gather(enter(gate, room, "d", patience=4), clock.turn(1))


async def test_a_wake_up_during_a_coroutine_attempt_is_not_lost() -> None:
    gate, clock = gate_and_clock()
    room = Afar(clock)
    waiting = enter(gate, room, "a")
    await clock.turn(1)
    gate.wake("m")  # it asks ...
    await settled()
    room.free = 1
    gate.wake("m")  # ... and while it is told to wait, something comes back
    await clock.turn(0.05)
    assert waiting.done()


async def test_a_cancelled_coroutine_attempt_gives_back_what_it_took() -> None:
    gate, clock = gate_and_clock()
    room = Afar(clock, free=1)
    waiting = enter(gate, room, "a")
    await settled()
    waiting.cancel()
    await settled()
    assert room.given_back == 1
    assert gate.depth == 0


async def test_the_head_asks_again_after_recheck() -> None:
    clock = Turned()
    gate = AdmissionQueue(10, clock, clock.call_later, recheck=0.5)
    room = Room()
    waiting = enter(gate, room, "a")
    await clock.turn(1.2)
    assert len(room.asked) == 3
    room.free = 1
    await clock.turn(0.5)
    assert await waiting == "a"


# --- everything at once ---------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(8))
async def test_order_and_places_survive_random_departures(seed: int) -> None:
    rng = random.Random(seed)
    gate, clock = gate_and_clock(max_queue=150)
    lanes = {
        "requests": RateLimiter(Limits(rpm=40)),
        "tokens": RateLimiter(Limits(rpm=60, tpm=3000)),
        "slots": RateLimiter(Limits(concurrency=3)),
    }
    admitted: dict[str, list[int]] = {lane: [] for lane in lanes}
    ends: dict[str, int] = {}
    delays: list[float] = []

    async def story(number: int, lane: str, cost: int, patience: float, works: float) -> None:
        how = "cancelled"
        reservation: Reservation | None = None
        try:
            answer = await gate.acquire(lane, lambda now: lanes[lane].reserve(cost, now), patience)
            assert isinstance(answer, Reservation)
            reservation = answer
            admitted[lane].append(number)
            done = asyncio.Event()
            timer = clock.call_later(works, done.set)
            try:
                await done.wait()
            finally:
                timer.cancel()
            how = "served"
        except (TimedOut, QueueFull) as refused:
            how = type(refused).__name__
            delays.append(getattr(refused, "retry_after", 1.0))
        finally:
            ends[how] = ends.get(how, 0) + 1
            if reservation is not None:
                (reservation.settle if rng.random() < 0.8 else lambda _: reservation.cancel())(cost // 2)
                gate.wake(lane)

    tasks: list[asyncio.Task[None]] = []
    for number in range(500):
        patience = rng.choice([0.0, 1.0, 5.0, 30.0, 90.0, math.inf])
        lane = rng.choice(list(lanes))
        tasks.append(
            asyncio.create_task(story(number, lane, rng.randint(1, 150), patience, rng.choice([0.0, 0.3, 4.0])))
        )
        if rng.random() < 0.4:
            await clock.turn(rng.choice([0.0, 0.05, 0.6]))
        if rng.random() < 0.25:
            rng.choice(tasks[-40:]).cancel()
        if rng.random() < 0.05:
            gate.wake()
    for _ in range(200):
        if all(task.done() for task in tasks):
            break
        await clock.turn(10)
    outcomes = await asyncio.gather(*tasks, return_exceptions=True)
    assert all(outcome is None or isinstance(outcome, asyncio.CancelledError) for outcome in outcomes), outcomes
    assert gate.depth == 0
    assert gate.depths() == {}
    assert clock.pending == 0
    for lane, numbers in admitted.items():
        assert numbers == sorted(numbers), lane
        assert len(numbers) > 20
        assert lanes[lane].idle(clock.now + 61)
    assert all(0 < delay < math.inf for delay in delays)
    assert min(ends.get(how, 0) for how in ("served", "cancelled", "TimedOut")) > 10, ends


async def test_the_loops_own_timers() -> None:
    gate = AdmissionQueue(10, time.monotonic)
    allowance = RateLimiter(Limits(concurrency=1))
    held = allowance.reserve(1, time.monotonic())
    assert isinstance(held, Reservation)
    ready = time.monotonic() + 0.03

    def soon(now: float) -> str | Wait:
        return "in" if now >= ready else Wait(ready - now)

    assert await gate.acquire("timed", soon, 5) == "in"
    waiting = asyncio.create_task(gate.acquire("m", lambda now: allowance.reserve(1, now), 5))
    await asyncio.sleep(0)
    held.settle(None)
    gate.wake("m")
    assert isinstance(await waiting, Reservation)
    with pytest.raises(TimedOut):
        await gate.acquire("m", lambda now: allowance.reserve(1, now), 0.02)
