"""Runs, owners of stored objects and counters that the supervisor holds for all workers."""

from __future__ import annotations

import asyncio
from decimal import Decimal

from proxy.accounting.runs.run import Run, RunTotals
from proxy.observability.aggregate import Family
from proxy.workers.worker import WorkerOwners, WorkerRuns
from tests.workers.kit import Clock, worker_links

KEY = "ab" * 32


def run_of(worker: int, clock: Clock) -> Run:
    return Run(f"of {worker}", "owner", "anna", "eval-7", clock())


async def test_sample_numbers_are_unique() -> None:
    clock = Clock()
    async with worker_links(2, clock) as (_, links):
        shared = [WorkerRuns(link) for link in links]
        runs = [run_of(n, clock) for n in range(2)]
        assert [await shared[n % 2].number(runs[n % 2], KEY, False) for n in range(4)] == [0, 1, 2, 3]
        await shared[0].ended(runs[0], KEY, 2, False)
        await shared[0].ended(runs[0], KEY, 0, True)
        assert await shared[0].number(runs[0], KEY, True) == 2  # not delivered by the first, asked again at the other
        assert await shared[1].number(runs[1], KEY, False) == 4


async def test_totals_and_budget_of_a_run_are_shared() -> None:
    clock = Clock()
    async with worker_links(2, clock) as (_, links):
        shared = [WorkerRuns(link) for link in links]
        runs = [run_of(n, clock) for n in range(2)]
        for run in runs:
            run.add(RunTotals(requests=1, misses=1, cost=Decimal("0.4")), clock())
        assert await shared[0].share(runs[0], runs[0].share(clock() + 60))
        assert await shared[1].share(runs[1], runs[1].share(clock() + 60))
        assert runs[1].cost == Decimal("0.8")
        before = runs[1].committed
        runs[1].reserve(Decimal("0.3"))
        assert await shared[1].share(runs[1], runs[1].share(clock() + 60), before, Decimal(1)) is False
        assert await shared[1].share(runs[1], runs[1].share(clock() + 60), before, Decimal(2)) is True
        known = await shared[0].read("eval-7")
        assert known is not None
        (one,) = known.values()
        assert (one.client, sorted(one.shares)) == ("anna", ["of 0", "of 1"])
        assert await shared[0].read("another") == {}
        links[0].channel.close()
        await asyncio.sleep(0.01)
        assert await shared[0].read("eval-7") is None
        assert await shared[0].number(runs[0], KEY, False) is None
        assert await shared[0].share(runs[0], runs[0].share(clock() + 60)) is None


async def test_owner_of_an_object_is_shared() -> None:
    clock = Clock()
    async with worker_links(2, clock) as (_, links):
        one, other = (WorkerOwners(link) for link in links)
        await one.put(["1"], "m1\nanna\n", False)
        assert await one.get(["0", "1"]) == {"1": "m1\nanna\n"}
        await other.put(["1", "2"], "m2\n\n", True)  # the owner that is known stays
        assert await other.get(["1", "2", "3"]) == {"1": "m1\nanna\n", "2": "m2\n\n"}
        links[0].channel.close()
        await asyncio.sleep(0.01)
        assert await one.get(["1"]) == {}


async def test_counters_of_an_ended_worker_are_kept() -> None:
    clock = Clock()
    hits = Family("hits", "", "counter", [("hits_total", (), 3.0)])
    busy = Family("busy", "", "gauge", [("busy", (("worker", "1"),), 1.0)])
    async with worker_links(1, clock) as (shared_state, _):
        shared_state.record_metrics(1, [hits, busy])
        shared_state.record_metrics(2, [hits])
        shared_state.worker_ended(1)
        shared_state.worker_ended(7)
        assert [family for families in shared_state.metrics() for family in families] == [hits, hits]
        shared_state.record_metrics(3, [hits])
        shared_state.worker_ended(3)
        assert shared_state.metrics()[-1][0].samples == [("hits_total", (), 6.0)]
