"""Limits over Redis: the promise against a brute-force reference in turned time, and what happens when things break."""

from __future__ import annotations

import asyncio
import logging
import math
import random
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Any, cast

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from proxy.config.limits import Limits
from proxy.system import redis as redis_link
from proxy.system.redis_keys import SLOTS, shape
from proxy.upstream.limits import redis as module
from proxy.upstream.limits import redis_loss as redis_silence
from proxy.upstream.limits.rate_limiter import ExceedsLimit, Reservation, Wait
from proxy.upstream.limits.redis import RedisLimits
from proxy.upstream.limits.redis_limiter import RedisRateLimiter, RedisReservation, part
from proxy.upstream.limits.shared import RECHECK
from tests.cache.stores.kit import HASTY, PATIENT, Valkey, redis_url, until, valkey
from tests.upstream.limits.test_rate_limiter import OF_TOKENS, SECONDS

pytestmark = pytest.mark.slow

WHERE = ("quota", "gpt-4o")


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with redis_url() as given_url:
        yield given_url


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Redis counts as lost soon after it refuses connections, and is found again soon."""
    monkeypatch.setattr(redis_silence, "SETTLING", 0.0)
    monkeypatch.setattr(redis_silence, "REFUSED_FOR", 0.05)
    monkeypatch.setattr(redis_link, "_PROBE_FIRST", 0.05)
    monkeypatch.setattr(redis_link, "_PROBE_LAST", 0.1)


class Proxies:
    """Several limiters over one Redis, in a time that is turned by hand. Nothing beats but `beat`."""

    def __init__(self, url: str, count: int, prefix: str) -> None:
        self.now = 1000.0
        self.limiters = [
            RedisLimits(url, prefix, f"p{n}", lambda: self.now, deadline=PATIENT, offset=lambda: round(self.now * 1000))
            for n in range(count)
        ]
        self.allowances: list[RedisRateLimiter] = []
        self.adopted: list[tuple[Any, ...]] = []

    async def open(self, limits: Limits) -> None:
        for limiter in self.limiters:
            await limiter.open(lambda *state: self.adopted.append(state))
            assert limiter._beating is not None
            limiter._beating.cancel()
            self.allowances.append(cast(RedisRateLimiter, limiter.rate_limiter(WHERE, limits, 1.0)))

    async def ask(self, n: int, tokens: int) -> RedisReservation | Wait | ExceedsLimit:
        """As the exchange asks."""
        while True:
            answer = self.allowances[n].reserve(tokens, self.now)
            if not isinstance(answer, Reservation):
                return answer
            assert isinstance(answer, RedisReservation)
            if await self.limiters[n].confirm(answer):
                return answer

    async def settled(self) -> None:
        """What was settled is known to Redis."""
        for limiter in self.limiters:
            while limiter._outbox:
                await limiter._flush()
            if limiter._flushing is not None:
                await asyncio.wait({limiter._flushing})

    async def beat(self) -> None:
        for limiter in self.limiters:
            await limiter._beat()

    async def close(self) -> None:
        for limiter in self.limiters:
            await limiter.close()


_numbers = iter(range(10**9))


@asynccontextmanager
async def proxies(url: str, limits: Limits, count: int = 2) -> AsyncIterator[Proxies]:
    group = Proxies(url, count, f"t{next(_numbers)}-{random.getrandbits(40)}")
    await group.open(limits)
    try:
        yield group
    finally:
        await group.close()


# --- the promise ----------------------------------------------------------------------------------


@dataclass
class Admitted:
    stamp: float
    tokens: int
    reservation: RedisReservation
    up: bool = True
    running: bool = True


limit_values = st.builds(
    Limits,
    rpm=st.none() | st.integers(1, 8),
    tpm=st.none() | st.integers(1, 300),
    rpd=st.none() | st.integers(1, 15),
    tpd=st.none() | st.integers(1, 600),
    concurrency=st.none() | st.integers(1, 5),
)
gaps = st.one_of(
    st.just(0.0),
    st.floats(0, 0.5),
    st.floats(0, 20),
    st.sampled_from([0.202, 59.9, 60.0, 60.6, 60.9]),
    st.floats(0, 200),
    st.floats(3_000, 90_000),
)
steps = st.one_of(
    st.tuples(st.just("arrive"), gaps, st.integers(0, 120), st.integers(0, 2)),
    st.tuples(st.just("settle"), st.integers(0, 50), st.none() | st.integers(-5, 250), st.just(0)),
    st.tuples(st.just("cancel"), st.integers(0, 50), st.none(), st.just(0)),
)


@given(limits=limit_values, script=st.lists(steps, max_size=40))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_window_admits_more_than_the_limit_over_all_proxies(
    url: str, limits: Limits, script: list[tuple[str, float, int | None, int]]
) -> None:
    asyncio.run(story(url, limits, script))


async def story(url: str, limits: Limits, script: list[tuple[str, float, int | None, int]]) -> None:
    caps = {name: cap for name in OF_TOKENS if (cap := getattr(limits, name)) is not None}
    done: list[Admitted] = []

    def held(name: str, now: float, span: float) -> int:
        return sum(one.tokens if OF_TOKENS[name] else 1 for one in done if one.up and one.stamp + span > now)

    def running() -> int:
        return sum(one.running for one in done)

    async with proxies(url, limits, 3) as group:
        for what, number, tokens, who in script:
            if what != "arrive":
                if done:
                    one = done[int(number) % len(done)]
                    if what == "settle":
                        one.reservation.settle(tokens)
                        if one.running and tokens is not None:
                            one.tokens = max(tokens, 0)
                    else:
                        one.reservation.cancel()
                        one.up = one.up and not one.running
                    one.running = False
                    await group.settled()
                continue
            assert tokens is not None
            group.now += number
            if limits.concurrency is not None:
                await group.beat()  # real time has signs of life every second
            # By the server's clock, which went on a little, too: what counts is its stamp.
            must = (limits.concurrency is None or running() < limits.concurrency) and all(
                held(name, group.now, SECONDS[name] * 1.01 * (1 + 1.1 / SLOTS) + 5) + (tokens if OF_TOKENS[name] else 1)
                <= cap
                for name, cap in caps.items()
            )
            too_large = any((tokens if OF_TOKENS[name] else 1) > cap for name, cap in caps.items())
            answer = await group.ask(who, tokens)
            assert isinstance(answer, ExceedsLimit) == too_large
            if isinstance(answer, RedisReservation):
                done.append(Admitted(group.now, tokens, answer))
                assert limits.concurrency is None or running() <= limits.concurrency
                for name, cap in caps.items():
                    assert held(name, group.now, SECONDS[name]) <= cap, name
            elif isinstance(answer, Wait):
                blocked = group.allowances[who]._blocked[0] > group.now
                assert not must or blocked
                assert answer.seconds > 0
        for one in done:
            one.reservation.settle(None)
        await group.settled()
        group.now += 90_000
        for n in range(3):
            answer = await group.ask(n, 1)
            assert isinstance(answer, RedisReservation)
            answer.cancel()
            await group.settled()


@pytest.mark.parametrize(
    ("limits", "every", "cost", "seconds"),
    [
        (Limits(rpm=100), 0.1, 1, 300),
        (Limits(tpm=20_000), 0.1, 137, 300),
        (Limits(rpm=200, tpm=20_000), 0.1, 100, 300),
        (Limits(rpd=500), 120.0, 1, 5 * 86_400),
    ],
)
async def test_nearly_all_of_each_limit_is_usable(
    url: str, limits: Limits, every: float, cost: int, seconds: float
) -> None:
    async with proxies(url, limits, 2) as group:
        admitted, start, turn = 0, group.now, 0
        while group.now < start + seconds:
            turn += 1
            answer = await group.ask(turn % 2, cost)
            if isinstance(answer, RedisReservation):
                admitted += 1
                answer.settle(cost)
            group.now += every
        for name, span in SECONDS.items():
            limit = getattr(limits, name)
            if limit is not None:
                amount = admitted * (cost if OF_TOKENS[name] else 1)
                assert 0.95 * limit * seconds / span <= amount <= limit * (math.ceil(seconds / span) + 1)


async def test_a_burst_of_the_whole_limit_is_admitted_over_several_proxies(url: str) -> None:
    async with proxies(url, Limits(rpm=100, tpm=1000), 4) as group:
        answers = await asyncio.gather(*(group.ask(n % 4, 10) for n in range(200)))
        assert sum(isinstance(answer, RedisReservation) for answer in answers) == 100
        for answer in answers:
            if isinstance(answer, Wait):
                assert 30 < answer.seconds <= 61  # the server's own clock goes on


async def test_concurrency_is_shared_and_released(url: str) -> None:
    async with proxies(url, Limits(concurrency=3), 3) as group:
        answers = await asyncio.gather(*(group.ask(n % 3, 1) for n in range(30)))
        taken = [answer for answer in answers if isinstance(answer, RedisReservation)]
        assert len(taken) == 3
        taken[0].settle(1)
        await group.settled()
        group.now += RECHECK
        answers = await asyncio.gather(*(group.ask(n % 3, 1) for n in range(9)))
        assert sum(isinstance(answer, RedisReservation) for answer in answers) == 1


async def test_permits_of_a_killed_proxy_are_released(url: str) -> None:
    async with proxies(url, Limits(concurrency=2), 2) as group:
        for _ in range(2):
            assert isinstance(await group.ask(0, 1), RedisReservation)
        assert isinstance(await group.ask(1, 1), Wait)
        group.now += 8
        await group.beat()
        assert isinstance(await group.ask(1, 1), Wait), "it lives"
        group.now += 11
        await group.limiters[1]._beat()
        assert isinstance(await group.ask(1, 1), RedisReservation)


async def test_a_settlement_by_one_makes_room_for_another(url: str) -> None:
    async with proxies(url, Limits(tpm=1000), 2) as group:
        first = await group.ask(0, 1000)
        assert isinstance(first, RedisReservation)
        assert first.stamp is not None
        span, width = shape(first.limiter.windows[0].span)
        longest = (first.stamp // width + 1) * width + span - first.stamp  # ms, asked in the moment of the first
        answer = await group.ask(1, 500)
        assert isinstance(answer, Wait)
        assert 30 < answer.seconds <= longest / 1000 + 1e-6, "the true wait, so that patience is judged rightly"
        first.settle(400)
        await group.settled()
        group.now += RECHECK
        assert isinstance(await group.ask(1, 500), RedisReservation)
        assert group.allowances[1].usage(group.now)["tpm"]["used"] == 900
        never = await group.ask(1, 50)
        assert isinstance(never, RedisReservation)
        never.cancel()
        await group.settled()
        assert isinstance(await group.ask(0, 100), RedisReservation)


# --- keys -----------------------------------------------------------------------------------------


async def test_a_key_state_learned_by_one_proxy_applies_to_all(url: str) -> None:
    async with proxies(url, Limits(), 2) as group:
        one, other = group.limiters
        one.publish_key_state("k1", "m", {"cools m": ("cooling", 30.0, "429")})
        await eventually(lambda: other.confirm(None, "k1", "m"), False)
        label, model, status, seconds, reason = group.adopted[-1]
        assert (label, model, status, reason) == ("k1", "m", "cooling", "429")
        assert 15 < seconds <= 31
        assert await other.confirm(None, "k1", "another")
        assert await other.confirm(None, "k2", "m")
        one.publish_key_state("k1", "m", {"cools m": ("cooling", 5.0, "429")})  # never shortened
        await asyncio.sleep(0.05)
        await other.confirm(None, "k1", "m")
        assert 15 < group.adopted[-1][3] <= 31


async def test_a_key_that_works_again_is_ready_for_all(url: str) -> None:
    async with proxies(url, Limits(), 2) as group:
        one, other = group.limiters
        one.publish_key_state("k1", "m", {"rests *": ("rejected", 600.0, "401")})
        await eventually(lambda: other.confirm(None, "k1", "anything"), False)
        assert group.adopted[-1][:3] == ("k1", "*", "rejected")
        other.publish_key_state("k1", "anything", {})
        await eventually(lambda: one.confirm(None, "k1", "m"), True)


async def eventually(ask: Callable[[], Awaitable[bool]], expected: bool) -> None:
    async with asyncio.timeout(PATIENT):
        while await ask() is not expected:  # noqa: ASYNC110
            await asyncio.sleep(0.005)


# --- what is in Redis -----------------------------------------------------------------------------


async def test_every_redis_key_expires_is_short_and_in_one_slot(url: str) -> None:
    prefix = "p" * 64
    limiter = RedisLimits(url, prefix, "0" * 32, lambda: 0.0, deadline=PATIENT)
    await limiter.open(lambda *_: None)
    redis = limiter.link.redis
    allowance = limiter.rate_limiter(("q" * 500, "m" * 500), Limits(rpm=9, tpm=9, rpd=9, tpd=9, concurrency=9), 1.0)
    reservation = allowance.reserve(1, 0.0)
    assert isinstance(reservation, RedisReservation)
    assert await limiter.confirm(reservation, "k" * 300, "m" * 500)
    reservation.settle(2)
    limiter.publish_key_state("k" * 300, "m" * 500, {"cools " + "m" * 500: ("cooling", 30.0, "x")})
    limiter.reset()
    async with asyncio.timeout(PATIENT):
        while await redis.pttl(limiter._key("x")) < 0:  # noqa: ASYNC110 - the last of what a reset does
            await asyncio.sleep(0.01)
    await limiter.confirm(allowance.reserve(1, 0.0))  # type: ignore[arg-type]
    keys = [key async for key in redis.scan_iter(match=f"*{prefix}*")]
    assert len(keys) >= 5
    for key in keys:
        assert key.startswith(b"{" + prefix.encode() + b"}:l1:")
        assert len(key) <= 160
        assert await redis.pttl(key) > 0, key
    await redis.delete(*keys)
    await limiter.close()


async def test_a_reset_applies_to_all_proxies(url: str) -> None:
    async with proxies(url, Limits(rpm=2), 2) as group:
        for n in range(2):
            assert isinstance(await group.ask(n, 1), RedisReservation)
        assert isinstance(await group.ask(0, 1), Wait)
        group.limiters[0].reset()
        await asyncio.gather(*(task for task in asyncio.all_tasks() if task.get_name() == "redis limits reset"))
        await group.beat()
        group.now += 1
        for n in range(2):
            assert isinstance(await group.ask(n, 1), RedisReservation)
        assert isinstance(await group.ask(1, 1), Wait)


# --- when things break ----------------------------------------------------------------------------


@contextmanager
def own_server() -> Iterator[Valkey]:
    with valkey() as server:
        yield server


def test_the_shares_add_up_to_the_limit() -> None:
    for amount in range(30):
        for count in range(1, 9):
            assert sum(part(amount, count, rank) for rank in range(count)) == amount


async def drained(group: Proxies, who: range, tokens: int = 1) -> int:
    """How many each and everyone can get in now."""
    admitted = 0
    for n in who:
        while isinstance(await group.ask(n, tokens), RedisReservation):
            admitted += 1
    return admitted


async def test_without_redis_each_proxy_keeps_its_share_and_returns_without_a_burst(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    with own_server() as server:
        async with proxies(server.url, Limits(rpm=100), 4) as group:
            await group.beat()  # all know of all
            for _ in range(30):
                assert isinstance(await group.ask(0, 1), RedisReservation)
            for n in range(1, 4):
                assert isinstance(await group.ask(n, 1), RedisReservation)
            assert isinstance(await group.ask(0, 1), RedisReservation)
            assert all(limiter.sound for limiter in group.limiters)
            server.kill()
            group.now += 1
            with caplog.at_level(logging.WARNING):
                admitted = await drained(group, range(4))
            assert not any(limiter.sound for limiter in group.limiters)
            assert "this proxy holds 1 of 4 shares by itself" in caplog.text
            # What the others admitted after one's own last answer (three here) is not known to it.
            assert 34 + admitted <= 100 + 3
            assert 34 + admitted >= 60, "most of what was free is still used"
            group.now += 61.0  # a window later everybody has a whole share
            later = await drained(group, range(4))
            assert later == 100
            server.start()
            for limiter in group.limiters:
                await eventually_up(limiter)
            group.now += 5.0
            await group.beat()  # they tell what they have admitted: Redis has lost its memory, too
            assert await drained(group, range(4)) == 0
            await group.settled()
            group.now += module.GRACE + 0.1
            await group.beat()
            assert all(limiter.sound for limiter in group.limiters)
            assert await drained(group, range(4)) == 0, "no burst: Redis knows of all 100"
            group.now += 55.0
            assert await drained(group, range(4)) == 100


@pytest.mark.parametrize("beat", [True, False])
@pytest.mark.parametrize("first", [0, 1])
async def test_losing_redis_admits_no_more_than_was_free(beat: bool, first: int) -> None:
    with own_server() as server:
        async with proxies(server.url, Limits(rpm=60)) as group:
            await group.beat()
            for n in (first, 1 - first):  # so the first one's last answer is about itself alone
                for _ in range(20):
                    assert isinstance(await group.ask(n, 1), RedisReservation)
            if beat:
                group.now += 1
                await group.beat()
                assert [each._known["rpm"] for each in group.allowances] == [40, 40]
            server.kill()
            group.now += 1
            admitted = await drained(group, range(2))
            group.now += 10
            admitted += await drained(group, range(2))
            assert admitted == 20


async def test_a_proxy_started_without_redis_joins_when_redis_returns() -> None:
    with own_server() as server:
        server.kill()
        async with proxies(server.url, Limits(rpm=100)) as group:
            for n in range(2):
                for _ in range(30):
                    assert isinstance(await group.ask(n, 1), RedisReservation)
            server.start()
            for limiter in group.limiters:
                await eventually_up(limiter)
            for _ in range(2):
                await group.beat()
                await group.settled()
            group.now += module.GRACE + 0.1
            await group.beat()
            assert all(limiter.sound for limiter in group.limiters)
            assert await drained(group, range(2)) == 40, "what each admitted by itself is counted"


async def test_after_redis_lost_its_data_limits_are_shared_once_all_have_reported() -> None:
    with own_server() as server:
        async with proxies(server.url, Limits(rpm=60)) as group:
            await group.beat()
            for n in range(2):
                for _ in range(30):
                    assert isinstance(await group.ask(n, 1), RedisReservation)
            server.kill()
            group.now += 1
            assert await drained(group, range(2)) == 0
            assert not any(limiter.sound for limiter in group.limiters)
            server.start()
            for limiter in group.limiters:
                await eventually_up(limiter)
            first = group.limiters[0]
            for _ in range(3):  # within seconds of the loss
                group.now += 0.2
                await first._beat()
                await group.settled()
            assert not first.sound
            assert await drained(group, range(2)) == 0
            group.now += module.GRACE
            for _ in range(2):
                await group.beat()
                await group.settled()
            assert first.sound
            assert await drained(group, range(2)) == 0


async def test_a_proxy_started_while_redis_is_slow_waits_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    with own_server() as server:
        one = Alone(server, monkeypatch)
        server.signal(signal.SIGSTOP)
        await one.limiter.open(lambda *_: None)
        assert one.limiter.sound
        answer = asyncio.create_task(one.ask(key=""))
        await asyncio.sleep(0.3)
        assert not answer.done()
        server.signal(signal.SIGCONT)
        assert await answer is False, "now it knows which Redis it is"
        assert await one.ask(key="") is True
        assert one.limiter.sound
        await one.limiter.close()


async def eventually_up(limiter: RedisLimits) -> None:
    await until(lambda: limiter.link.up)


class Alone:
    """One limiter with a server of its own. Its clock, and that of silence, is turned by hand."""

    def __init__(self, server: Valkey, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        self.server = server
        self._patch = monkeypatch
        self.limiter = RedisLimits(server.url, "t", "p0", lambda: self.now)
        self.allowance = cast(RedisRateLimiter, self.limiter.rate_limiter(WHERE, Limits(rpm=1000), 1.0))
        monkeypatch.setattr(redis_silence, "loop_time", lambda: self.now)
        self.waits(PATIENT)

    def waits(self, seconds: float) -> None:
        """For each answer, from now on."""
        self._patch.setattr(module, "DEADLINE", seconds)
        self._patch.setattr(module, "KEY_STATE_WAIT", seconds)
        self.limiter._deadline = self.limiter.link._deadline = seconds

    def freeze(self) -> None:
        self.server.signal(signal.SIGSTOP)
        self.waits(HASTY)

    def thaw(self) -> None:
        self.waits(PATIENT)
        self.server.signal(signal.SIGCONT)

    async def ask(self, key: str = "k1") -> bool | None:
        """None where the allowance already says wait."""
        reservation = self.allowance.reserve(1, self.now)
        if not isinstance(reservation, Reservation):
            return None
        return await self.limiter.confirm(reservation, key, "m")

    async def admitted(self) -> None:
        """Asks until it is."""
        async with asyncio.timeout(PATIENT):
            while not await self.ask():
                self.now += RECHECK
                await asyncio.sleep(0.01)


@asynccontextmanager
async def alone(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Alone]:
    monkeypatch.setattr(redis_silence, "SILENT_FOR", 1e6)
    with own_server() as server:
        one = Alone(server, monkeypatch)
        await one.limiter.open(lambda *_: None)
        await until(lambda: one.limiter.link.up)
        one.now += redis_silence.SETTLING + 1.0  # long enough there to lose it
        try:
            yield one
        finally:
            one.thaw()
            await one.limiter.close()


async def test_a_late_reply_is_waited_for_and_a_lasting_outage_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with alone(monkeypatch) as one:
        limiter = one.limiter
        assert await one.ask() is True
        one.freeze()
        assert await one.ask() is False, "it waits in the gate"
        assert limiter.sound
        assert await one.ask() is None
        assert await limiter.confirm(None, "k1", "m"), "without a limit there is nothing to wait for"
        one.thaw()
        await one.admitted()
        assert limiter.sound
        one.freeze()
        assert await one.ask() is False
        one.now += redis_silence.SILENT_FOR - 1.0
        assert await one.ask() is False
        assert limiter.sound
        one.now += 1.0
        await one.admitted()
        assert not limiter.sound
        failures = limiter.link.failures
        assert await one.ask() is True
        assert limiter.link.failures == failures, "nobody is asked any more"


async def test_a_reservation_outside_the_queue_waits_for_the_reply(monkeypatch: pytest.MonkeyPatch) -> None:
    async with alone(monkeypatch) as one:
        one.freeze()
        answer = asyncio.create_task(one.ask(key=""))
        await asyncio.sleep(5 * HASTY)
        assert not answer.done()
        one.thaw()
        assert await answer is True
        assert one.limiter.sound


async def test_a_late_settlement_releases_nothing_twice(url: str) -> None:
    async with proxies(url, Limits(tpm=1000), 2) as group:
        first, second = await group.ask(0, 400), await group.ask(0, 600)
        assert isinstance(first, RedisReservation)
        assert isinstance(second, RedisReservation)
        limiter, send = group.limiters[0], group.limiters[0]._send

        async def late(batch: Any) -> None:
            await send(batch)
            raise TimeoutError

        limiter._send = late  # type: ignore[method-assign]
        first.settle(100)
        assert limiter._flushing is not None
        await asyncio.wait({limiter._flushing})
        limiter._send = send  # type: ignore[method-assign]
        await group.settled()
        group.now += RECHECK
        assert isinstance(await group.ask(1, 301), Wait)
        group.now += RECHECK
        assert isinstance(await group.ask(1, 300), RedisReservation)


async def test_a_cancelled_reservation_is_released(url: str) -> None:
    async with proxies(url, Limits(rpm=5, concurrency=5), 2) as group:
        for _ in range(20):
            task = asyncio.create_task(group.ask(0, 1))
            await asyncio.sleep(random.random() * 0.001)
            task.cancel()
            try:
                answer = await task
            except asyncio.CancelledError:
                # The exchange gives back what it holds itself; what it does not is the limiter's.
                for reservation in list(Held.of(group.allowances[0])):
                    reservation.cancel()
            else:
                if isinstance(answer, RedisReservation):
                    answer.cancel()
            await asyncio.sleep(0.005)
            await group.settled()
            group.now += RECHECK
        await group.beat()
        answers = [await group.ask(1, 1) for _ in range(5)]
        assert sum(isinstance(answer, RedisReservation) for answer in answers) >= 4


class Held:
    """The reservations of an allowance that are still open, by the garbage collector's books."""

    @staticmethod
    def of(allowance: RedisRateLimiter) -> Iterator[RedisReservation]:
        import gc

        for thing in gc.get_objects():
            if isinstance(thing, RedisReservation) and thing.limiter is allowance and thing._open:
                yield thing


async def test_a_proxy_that_loses_redis_briefly_takes_nothing_from_others(url: str) -> None:
    async with proxies(url, Limits(rpm=100, concurrency=100), 4) as group:
        await group.beat()
        for n in range(80):
            answer = await group.ask(n % 4, 1)
            assert isinstance(answer, RedisReservation)
            answer.settle(1)
        await group.settled()
        one = group.limiters[0]
        one._lose()
        assert await drained(group, range(1)) <= 6, "a quarter of the 20 that were free"
        group.now += 2.0
        assert await drained(group, range(1)) == 0
        await group.beat()
        await group.settled()
        assert one._phase == "back"
        await group.beat()
        await group.beat()
        assert one.sound, "all the others have been heard of since: nobody else was alone"
