"""proxy.accounting.runs.redis on a real server: shared numbers and sums, lifetimes, and trouble that is nobody's."""

from __future__ import annotations

import asyncio
import hashlib
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from decimal import Decimal

import pytest

from proxy.accounting.runs import redis as redis_runs
from proxy.accounting.runs.redis import RedisRuns
from proxy.accounting.runs.run import Run, RunTotals
from proxy.cache.stores.redis import MAX_PREFIX
from proxy.system import redis as redis_link
from proxy.system.redis import RedisConnection
from tests.cache.stores.kit import HASTY, NOW, PATIENT, Valkey, until, valkey

pytestmark = pytest.mark.slow

Open = Callable[..., Awaitable[RedisRuns]]
A = hashlib.sha256(b"a").hexdigest()
OWNER = "0" * 32


@pytest.fixture(scope="module")
def shared() -> Iterator[Valkey]:
    with valkey() as server:
        yield server


@pytest.fixture
def server(shared: Valkey) -> Iterator[Valkey]:
    shared.say("FLUSHALL")
    yield shared
    shared.signal(signal.SIGCONT)


@pytest.fixture
async def opened(server: Valkey, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Open]:
    monkeypatch.setattr(redis_link, "DEADLINE_MAX", PATIENT)
    opened = []

    async def open_runs(prefix: str = "p", url: str | None = None, deadline: float = PATIENT) -> RedisRuns:
        link = RedisConnection(url or server.url, PATIENT)
        runs = RedisRuns(link, prefix, lambda: NOW, deadline=deadline)
        await runs.open()
        opened.append(runs)
        await until(lambda: link.up or url)
        return runs

    yield open_runs
    server.signal(signal.SIGCONT)
    for runs in opened:
        await runs.close()


def run(process: str, name: str = "eval-7") -> Run:
    return Run(process, OWNER, "anna", name, NOW)


async def told(runs: RedisRuns, mine: Run, until: float = NOW + 60) -> bool | None:
    return await runs.share(mine, mine.share(until))


async def test_sample_numbers_are_unique_over_all_processes(opened: Open) -> None:
    one, two = await opened(), await opened()
    mine, theirs = run("p1"), run("p2")
    both = ((one, mine), (two, theirs))
    given = await asyncio.gather(*[runs.number(r, A, False) for _ in range(20) for runs, r in both])
    assert sorted(number for number in given if number is not None) == list(range(40))
    assert await one.number(run("p1", "eval-8"), A, False) == 0


async def test_a_retry_gets_the_number_that_ended_in_another_process(opened: Open) -> None:
    one, two = await opened(), await opened()
    mine, theirs = run("p1"), run("p2")
    for _ in range(3):
        await one.number(mine, A, False)
    await one.ended(mine, A, 0, delivered=True)
    await one.ended(mine, A, 2, delivered=False)
    assert [await two.number(theirs, A, True) for _ in range(2)] == [2, 1]
    for number in (1, 2):
        await two.ended(theirs, A, number, delivered=True)
    assert await two.number(theirs, A, True) == 3
    await one.ended(mine, A, 2, delivered=False)  # late: it was delivered
    await one.ended(mine, A, 3, delivered=True)
    assert await one.number(mine, A, True) == 4


async def test_numbers_continue_after_an_outage_of_redis(opened: Open) -> None:
    one = await opened()
    mine = run("p1")
    for _ in range(3):
        mine.number(A, False)
    assert [await one.number(mine, A, False) for _ in range(2)] == [3, 4]


async def test_a_run_beyond_its_bound_is_numbered_by_each_process(
    opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(redis_runs, "MAX_KEYS", 1)
    one = await opened()
    assert await one.number(run("p1"), A, False) == 0
    assert await one.number(run("p1"), A[::-1], False) is None
    assert await one.number(run("p1"), A, False) == 1


async def test_sums_of_all_processes_and_each_counts_once(opened: Open) -> None:
    one, two = await opened(), await opened()
    mine, theirs = run("p1"), run("p2")
    mine.add(RunTotals(2, 1, 1, cost=Decimal("0.002250000000000001"), saved=Decimal("0.5")), NOW, "gpt-4o")
    for _ in range(3):  # said again: counted once
        assert await told(one, mine)
    theirs.add(RunTotals(1, 0, 1, cost=Decimal("1")), NOW + 5, "gpt-4.1")
    assert await told(two, theirs)
    assert (theirs.cost, theirs.saved) == (Decimal("1.002250000000000001"), Decimal("0.5"))
    assert await told(one, mine)
    assert mine.cost == theirs.cost
    known = await one.read("eval-7")
    assert known is not None
    assert list(known) == [OWNER]
    assert (known[OWNER].client, len(known[OWNER].shares), known[OWNER].keys) == ("anna", 2, 0)
    assert await one.read("another") == {}


async def test_an_older_share_does_not_undo_a_newer(opened: Open) -> None:
    one = await opened()
    mine = run("p1")
    old = mine.share(NOW)
    mine.add(RunTotals(1, cost=Decimal(1)), NOW)
    await one.share(mine, mine.share(NOW))
    await one.share(mine, old)
    theirs = run("p2")
    await told(one, theirs)
    assert theirs.cost == 1


async def test_two_processes_stay_within_max_cost(opened: Open) -> None:
    one, two = await opened(), await opened()
    limit, amount, bought = Decimal("1"), Decimal("0.15"), []
    mine, theirs = run("p1"), run("p2")

    async def ask(runs: RedisRuns, r: Run) -> None:
        before = r.committed
        r.reserve(amount)
        fits = await runs.share(r, r.share(NOW + 60), before, limit)
        assert fits is not None
        if fits:
            bought.append(amount)
        else:
            r.release(amount)

    await asyncio.gather(*[ask(runs, r) for _ in range(10) for runs, r in ((one, mine), (two, theirs))])
    assert 0 < len(bought) <= 6
    await asyncio.gather(*[ask(runs, r) for runs, r in ((one, mine), (two, theirs), (one, mine), (two, theirs))])
    for _ in range(6):  # one after the other, what is left is used
        await ask(one, mine)
    assert len(bought) == 6


async def test_reservations_of_a_dead_process_are_released(opened: Open) -> None:
    one = await opened()
    dead, mine = run("p1"), run("p2")
    dead.reserve(Decimal(5))
    await told(one, dead, until=NOW)
    await told(one, mine)
    assert mine.others == 0
    await told(one, dead, until=NOW + 1)
    await told(one, mine)
    assert mine.others == 5


async def test_every_redis_key_expires_and_is_short(opened: Open, server: Valkey) -> None:
    one = await opened("p" * MAX_PREFIX)
    mine = run("p1", "n" * 128)
    number = await one.number(mine, A, False)
    assert number == 0
    await told(one, mine)
    keys = [line for line in server.say("KEYS", "*").split(b"\r\n") if line.startswith(b"ppp")]
    assert len(keys) == 3
    assert all(len(key) <= 160 for key in keys)
    assert len({key[key.index(b"{") : key.index(b"}")] for key in keys}) == 1  # one slot of a cluster
    assert all(0 < int(server.say("TTL", key).strip().lstrip(b":")) <= redis_runs.LIFETIME for key in keys)
    await one.ended(mine, A, 0, delivered=True)
    await one.ended(mine, A[::-1], 7, delivered=False)  # no such number: nothing is made of it


async def test_foreign_values_are_ignored(opened: Open, server: Valkey) -> None:
    one = await opened()
    mine = run("p1")
    _, shares, _ = one.keys_of(mine.name, mine.owner)
    server.say("HSET", shares, "p9", "1 0 0 0 not json")
    assert await told(one, mine)
    assert mine.cost == 0


async def test_a_frozen_redis_delays_only_briefly(opened: Open, server: Valkey) -> None:
    one = await opened(deadline=HASTY)
    server.signal(signal.SIGSTOP)
    async with asyncio.timeout(PATIENT / 2):  # an answer is waited for twice as long
        assert await one.number(run("p1"), A, False) is None
        assert await told(one, run("p1")) is None


async def test_an_error_of_redis_is_logged_once(opened: Open, server: Valkey, caplog: pytest.LogCaptureFixture) -> None:
    one = await opened()
    mine = run("p1")
    numbers, _, _ = one.keys_of(mine.name, mine.owner)
    server.say("SET", numbers, "something else")
    for _ in range(3):
        assert await one.number(mine, A, False) is None
    assert len([record for record in caplog.records if "refuses to count a run" in record.getMessage()]) == 1


async def test_without_redis_each_process_counts_alone(opened: Open, tmp_path: object) -> None:
    one = await opened(url=f"unix://{tmp_path}/nothing")
    mine = run("p1")
    assert (await one.number(mine, A, False), await told(one, mine), await one.read("eval-7")) == (None, None, None)
    await one.ended(mine, A, 0, delivered=True)
