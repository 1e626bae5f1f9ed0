"""Limits of several workers: no window holds more than the limit (docs/keys-and-limits.md)."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import pytest

from proxy.config.limits import Limits
from proxy.upstream.limits.rate_limiter import ExceedsLimit, RateLimiter, Reservation, Wait
from proxy.workers.limiter import WorkerLimits
from proxy.workers.worker import WorkerLink
from tests.workers.kit import Clock, worker_links

LIMIT_ID = ("quota", "gpt-4o")


async def ask(
    limiter: WorkerLimits, rate_limiter: RateLimiter, tokens: int, clock: Clock
) -> Reservation | Wait | ExceedsLimit:
    """Reserve as the sender of a request does."""
    while True:
        answer = rate_limiter.reserve(tokens, clock())
        if not isinstance(answer, Reservation) or await limiter.confirm(answer):
            return answer


def limiters_of(links: list[WorkerLink], clock: Clock, limits: Limits) -> list[tuple[WorkerLimits, RateLimiter]]:
    limiters = [WorkerLimits(link, clock) for link in links]
    return [(limiter, limiter.rate_limiter(LIMIT_ID, limits, 1.0)) for limiter in limiters]


async def test_no_window_holds_more_than_the_limit() -> None:
    clock, rng = Clock(), random.Random(7)
    sent: list[tuple[float, int]] = []
    async with worker_links(3, clock) as (_, links):
        workers = limiters_of(links, clock, Limits(rpm=20, tpm=1000))
        for _ in range(400):
            clock.now += rng.choice([0.0, 0.1, 2.0, 7.0])
            tokens = rng.randrange(120)
            answer = await ask(*rng.choice(workers), tokens, clock)
            if isinstance(answer, Reservation):
                if rng.random() < 0.2:
                    answer.cancel()
                    continue
                used = rng.randrange(tokens + 1)
                answer.settle(used)
                sent.append((clock.now, used))
                await asyncio.sleep(0)
            else:
                assert isinstance(answer, Wait)
    for moment, _ in sent:
        window = [used for at, used in sent if moment - 60 < at <= moment]
        assert len(window) <= 20
        assert sum(window) <= 1000


async def test_burst_of_the_whole_limit_is_admitted_at_once() -> None:
    clock = Clock()
    async with worker_links(3, clock) as (_, links):
        workers = limiters_of(links, clock, Limits(rpm=10))
        answers = await asyncio.gather(*(ask(*workers[0 if n < 9 else n % 3], 1, clock) for n in range(30)))
        assert sum(isinstance(answer, Reservation) for answer in answers) == 10
        waits = [answer for answer in answers if isinstance(answer, Wait)]
        assert all(60 <= wait.seconds < 61 for wait in waits)
        assert workers[2][1].usage(clock()) == {"rpm": {"limit": 10, "used": 10}}
        workers[0][0].reset()
        for _, rate_limiter in workers:
            rate_limiter.reset()
        assert isinstance(await ask(*workers[1], 1, clock), Reservation)


async def test_capacity_returns_when_settled_cancelled_or_worker_ends() -> None:
    clock = Clock()
    async with worker_links(2, clock) as (shared_state, links):
        (one, mine), (other, yours) = limiters_of(links, clock, Limits(concurrency=1))
        first = await ask(one, mine, 1, clock)
        assert isinstance(first, Reservation)
        assert isinstance(await ask(other, yours, 1, clock), Wait)
        first.settle(1)
        clock.now += 1
        await one._link.channel.request("owner.get", b"\x91\x90")  # notifications sent before have arrived now
        second = await ask(other, yours, 1, clock)
        assert isinstance(second, Reservation)
        shared_state.worker_ended(1)  # the other worker dies
        third = await ask(one, mine, 1, clock)
        assert isinstance(third, Reservation)
        third.cancel()
        given_up = mine.reserve(1, clock())
        assert isinstance(given_up, Reservation)
        asking = asyncio.ensure_future(one.confirm(given_up))
        await asyncio.sleep(0)
        asking.cancel()
        given_up.cancel()  # as a request does that its client cancels
        assert isinstance(await ask(one, mine, 1, clock), Reservation)


async def test_nothing_is_admitted_without_the_supervisor() -> None:
    clock = Clock()
    async with worker_links(1, clock) as (_, links):
        ((limiter, rate_limiter),) = limiters_of(links, clock, Limits(rpm=5))
        links[0].channel.close()
        await asyncio.sleep(0.01)
        answer = await ask(limiter, rate_limiter, 1, clock)
        assert isinstance(answer, Wait)
        assert await limiter.confirm(None)


@pytest.mark.parametrize("limits", [Limits(rpm=2), Limits(rpm=2, tpm=10)])
async def test_changed_limits_apply_at_once(limits: Limits) -> None:
    clock = Clock()
    async with worker_links(1, clock) as (_, links):
        ((limiter, rate_limiter),) = limiters_of(links, clock, limits)
        for _ in range(2):
            assert isinstance(await ask(limiter, rate_limiter, 1, clock), Reservation)
        assert isinstance(await ask(limiter, rate_limiter, 1, clock), Wait)
        rate_limiter.change(Limits(rpm=3), 1.0)
        clock.now += 1
        assert isinstance(await ask(limiter, rate_limiter, 1, clock), Reservation)
        assert isinstance(await ask(limiter, rate_limiter, 1, clock), Wait)
        assert isinstance(rate_limiter.reserve(1, clock()), Wait)


async def test_key_state_is_published_once() -> None:
    clock = Clock()
    published: list[tuple[str, bytes]] = []
    applied: list[Any] = []
    async with worker_links(2, clock) as (_, links):
        one, other = (WorkerLimits(link, clock) for link in links)
        links[0].notify_peers = lambda kind, body: published.append((kind, body))  # type: ignore[method-assign]
        await other.open(lambda *state: applied.append(state))
        one.publish_key_state("k1", "gpt-4o", {"cools gpt-4o": ("cooling", 5.0, "429")})
        clock.now += 1
        one.publish_key_state("k1", "gpt-4o", {"cools gpt-4o": ("cooling", 4.0, "429")})
        assert len(published) == 1
        one.publish_key_state(
            "k1", "gpt-4o", {"cools gpt-4o": ("cooling", 9.0, "429"), "rests *": ("rejected", 600.0, "401")}
        )
        assert len(published) == 3
        for kind, body in published:
            links[1].channel.handlers[kind](body)
        assert applied == [
            ("k1", "gpt-4o", "cooling", 5.0, "429"),
            ("k1", "gpt-4o", "cooling", 9.0, "429"),
            ("k1", "*", "rejected", 600.0, "401"),
        ]
        other.publish_key_state(
            "k1", "gpt-4o", {"rests *": ("rejected", 600.0, "401")}
        )  # it came from them, so it is not sent back
