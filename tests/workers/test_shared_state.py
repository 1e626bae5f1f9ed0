"""Runs, stored objects and counts, as the parent keeps them for all."""

from __future__ import annotations

import asyncio
from decimal import Decimal

from proxy.accounting.runs.run import Run, RunTotals
from proxy.observability.aggregate import Family
from proxy.workers.worker import WorkerOwners, WorkerRuns
from tests.workers.kit import Clock, seats

KEY = "ab" * 32


def run_of(seat: int, clock: Clock) -> Run:
    return Run(f"of {seat}", "owner", "anna", "eval-7", clock())


async def test_numbers_are_given_once() -> None:
    clock = Clock()
    async with seats(2, clock) as (_, found):
        books = [WorkerRuns(seat) for seat in found]
        runs = [run_of(n, clock) for n in range(2)]
        assert [await books[n % 2].number(runs[n % 2], KEY, False) for n in range(4)] == [0, 1, 2, 3]
        await books[0].ended(runs[0], KEY, 2, False)
        await books[0].ended(runs[0], KEY, 0, True)
        assert await books[0].number(runs[0], KEY, True) == 2  # not delivered by the first, asked again at the other
        assert await books[1].number(runs[1], KEY, False) == 4


async def test_sums_are_everybodys_and_a_limit_holds_for_all() -> None:
    clock = Clock()
    async with seats(2, clock) as (_, found):
        books = [WorkerRuns(seat) for seat in found]
        runs = [run_of(n, clock) for n in range(2)]
        for run in runs:
            run.add(RunTotals(requests=1, misses=1, cost=Decimal("0.4")), clock())
        assert await books[0].share(runs[0], runs[0].share(clock() + 60))
        assert await books[1].share(runs[1], runs[1].share(clock() + 60))
        assert runs[1].cost == Decimal("0.8")
        before = runs[1].committed
        runs[1].reserve(Decimal("0.3"))
        assert await books[1].share(runs[1], runs[1].share(clock() + 60), before, Decimal(1)) is False
        assert await books[1].share(runs[1], runs[1].share(clock() + 60), before, Decimal(2)) is True
        known = await books[0].read("eval-7")
        assert known is not None
        (one,) = known.values()
        assert (one.client, sorted(one.shares)) == ("anna", ["of 0", "of 1"])
        assert await books[0].read("another") == {}
        found[0].channel.close()
        await asyncio.sleep(0.01)
        assert await books[0].read("eval-7") is None
        assert await books[0].number(runs[0], KEY, False) is None
        assert await books[0].share(runs[0], runs[0].share(clock() + 60)) is None


async def test_who_made_an_object() -> None:
    clock = Clock()
    async with seats(2, clock) as (_, found):
        one, other = (WorkerOwners(seat) for seat in found)
        await one.put(["resp_1"], "k2")
        assert await one.get(["resp_0", "resp_1"]) == "k2"
        assert await other.get(["resp_1"]) == "k2"
        assert await other.get(["resp_2"]) is None


async def test_no_count_goes_down_when_a_worker_leaves() -> None:
    clock = Clock()
    hits = Family("hits", "", "counter", [("hits_total", (), 3.0)])
    busy = Family("busy", "", "gauge", [("busy", (("worker", "1"),), 1.0)])
    async with seats(1, clock) as (commons, _):
        commons.counted(1, [hits, busy])
        commons.counted(2, [hits])
        commons.left(1)
        commons.left(7)
        assert [family for families in commons.metrics() for family in families] == [hits, hits]
        commons.counted(3, [hits])
        commons.left(3)
        assert commons.metrics()[-1][0].samples == [("hits_total", (), 6.0)]
