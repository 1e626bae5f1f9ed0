"""Limits over workers: never more than the limit in any window, whichever worker asks (docs/keys-and-limits.md)."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import pytest

from proxy.config.limits import Limits
from proxy.upstream.limits.rate_limiter import ExceedsLimit, RateLimiter, Reservation, Wait
from proxy.workers.limiter import WorkerLimits
from proxy.workers.worker import WorkerLink
from tests.workers.kit import Clock, seats

WHERE = ("quota", "gpt-4o")


async def ask(
    limiter: WorkerLimits, allowance: RateLimiter, tokens: int, clock: Clock
) -> Reservation | Wait | ExceedsLimit:
    """As the exchange asks."""
    while True:
        answer = allowance.reserve(tokens, clock())
        if not isinstance(answer, Reservation) or await limiter.confirm(answer):
            return answer


def several(found: list[WorkerLink], clock: Clock, limits: Limits) -> list[tuple[WorkerLimits, RateLimiter]]:
    limiters = [WorkerLimits(seat, clock) for seat in found]
    return [(limiter, limiter.rate_limiter(WHERE, limits, 1.0)) for limiter in limiters]


async def test_no_window_holds_more_than_the_limit() -> None:
    clock, dice = Clock(), random.Random(7)
    sent: list[tuple[float, int]] = []
    async with seats(3, clock) as (_, found):
        workers = several(found, clock, Limits(rpm=20, tpm=1000))
        for _ in range(400):
            clock.now += dice.choice([0.0, 0.1, 2.0, 7.0])
            tokens = dice.randrange(120)
            answer = await ask(*dice.choice(workers), tokens, clock)
            if isinstance(answer, Reservation):
                if dice.random() < 0.2:
                    answer.cancel()
                    continue
                used = dice.randrange(tokens + 1)
                answer.settle(used)
                sent.append((clock.now, used))
                await asyncio.sleep(0)
            else:
                assert isinstance(answer, Wait)
    for moment, _ in sent:
        window = [used for at, used in sent if moment - 60 < at <= moment]
        assert len(window) <= 20
        assert sum(window) <= 1000


async def test_a_burst_of_the_whole_limit_goes_at_once_from_whomever() -> None:
    clock = Clock()
    async with seats(3, clock) as (_, found):
        workers = several(found, clock, Limits(rpm=10))
        answers = await asyncio.gather(*(ask(*workers[0 if n < 9 else n % 3], 1, clock) for n in range(30)))
        assert sum(isinstance(answer, Reservation) for answer in answers) == 10
        waits = [answer for answer in answers if isinstance(answer, Wait)]
        assert all(60 <= wait.seconds < 61 for wait in waits)
        assert workers[2][1].usage(clock()) == {"rpm": {"limit": 10, "used": 10}}
        workers[0][0].reset()
        for _, allowance in workers:
            allowance.reset()
        assert isinstance(await ask(*workers[1], 1, clock), Reservation)


async def test_places_are_returned_by_settling_leaving_and_giving_up() -> None:
    clock = Clock()
    async with seats(2, clock) as (commons, found):
        (one, mine), (other, yours) = several(found, clock, Limits(concurrency=1))
        first = await ask(one, mine, 1, clock)
        assert isinstance(first, Reservation)
        assert isinstance(await ask(other, yours, 1, clock), Wait)
        first.settle(1)
        clock.now += 1
        await one._seat.channel.request("maker", b"\x91\x90")  # what was noted before is known now
        second = await ask(other, yours, 1, clock)
        assert isinstance(second, Reservation)
        commons.left(1)  # the other worker dies
        third = await ask(one, mine, 1, clock)
        assert isinstance(third, Reservation)
        third.cancel()
        given_up = mine.reserve(1, clock())
        assert isinstance(given_up, Reservation)
        asking = asyncio.ensure_future(one.confirm(given_up))
        await asyncio.sleep(0)
        asking.cancel()
        given_up.cancel()  # as the exchange does
        assert isinstance(await ask(one, mine, 1, clock), Reservation)


async def test_without_the_parent_nothing_is_admitted() -> None:
    clock = Clock()
    async with seats(1, clock) as (_, found):
        ((limiter, allowance),) = several(found, clock, Limits(rpm=5))
        found[0].channel.close()
        await asyncio.sleep(0.01)
        answer = await ask(limiter, allowance, 1, clock)
        assert isinstance(answer, Wait)
        assert await limiter.confirm(None)


@pytest.mark.parametrize("limits", [Limits(rpm=2), Limits(rpm=2, tpm=10)])
async def test_other_limits_hold_from_then_on(limits: Limits) -> None:
    clock = Clock()
    async with seats(1, clock) as (_, found):
        ((limiter, allowance),) = several(found, clock, limits)
        for _ in range(2):
            assert isinstance(await ask(limiter, allowance, 1, clock), Reservation)
        assert isinstance(await ask(limiter, allowance, 1, clock), Wait)
        allowance.change(Limits(rpm=3), 1.0)
        clock.now += 1
        assert isinstance(await ask(limiter, allowance, 1, clock), Reservation)
        assert isinstance(await ask(limiter, allowance, 1, clock), Wait)
        assert isinstance(allowance.reserve(1, clock()), Wait)


async def test_what_was_learned_is_told_once() -> None:
    clock = Clock()
    told: list[tuple[str, bytes]] = []
    heard: list[Any] = []
    async with seats(2, clock) as (_, found):
        one, other = (WorkerLimits(seat, clock) for seat in found)
        found[0].tell = lambda kind, body: told.append((kind, body))  # type: ignore[method-assign]
        await other.open(lambda *state: heard.append(state))
        one.publish_key_state("k1", "gpt-4o", {"cools gpt-4o": ("cooling", 5.0, "429")})
        clock.now += 1
        one.publish_key_state("k1", "gpt-4o", {"cools gpt-4o": ("cooling", 4.0, "429")})
        assert len(told) == 1
        one.publish_key_state(
            "k1", "gpt-4o", {"cools gpt-4o": ("cooling", 9.0, "429"), "rests *": ("rejected", 600.0, "401")}
        )
        assert len(told) == 3
        for kind, body in told:
            found[1].channel.handlers[kind](body)
        assert heard == [
            ("k1", "gpt-4o", "cooling", 5.0, "429"),
            ("k1", "gpt-4o", "cooling", 9.0, "429"),
            ("k1", "*", "rejected", 600.0, "401"),
        ]
        other.publish_key_state(
            "k1", "gpt-4o", {"rests *": ("rejected", 600.0, "401")}
        )  # they know, as it came from them
