"""Budgets of several workers: together they exceed a limit by no more than their estimates were short."""

from __future__ import annotations

import random
from decimal import Decimal
from functools import partial

from proxy.accounting.budgets.account import Account
from proxy.workers.budgets import SharedBudgetTable, WorkerBudgets
from tests.workers.kit import Clock, channel_pair

NOON = 1_790_000_000.0


async def test_workers_together_stay_within_the_budget_and_an_ended_one_holds_nothing() -> None:
    budgets, clock, rng = SharedBudgetTable(), Clock(), random.Random(3)
    clock.now = NOON
    accounts = [Account("") for _ in range(2)]
    for account in accounts:
        account.change({"day": Decimal(1), "month": Decimal(5)}, clock())
    async with channel_pair() as (ours, theirs), channel_pair() as (mine, yours):
        shared = []
        for number, (end, other) in enumerate(((ours, theirs), (mine, yours))):
            end.handlers["budget"] = partial(budgets.publish, number)
            shared.append(WorkerBudgets(type("Link", (), {"channel": other})()))
        amount, held = Decimal("0.03"), []
        for _ in range(60):
            number = rng.randrange(2)
            account = accounts[number]
            account.reserve(amount)
            if await shared[number].publish(account, clock(), amount):
                held.append(account)
            else:
                account.release(amount)
            if held and rng.random() < 0.3:
                done = held.pop()
                done.release(amount)
                done.spend(amount, amount, clock())
                await shared[accounts.index(done)].publish(done, clock())
            periods = [account.at(clock())[0] for account in accounts]
            assert sum(period.own for period in periods) + sum(account.held for account in accounts) <= 1
        taken = sum(account.at(clock())[0].own + account.held for account in accounts)
        assert taken == Decimal("0.99")
        for number, account in enumerate(accounts):
            await shared[number].publish(account, clock())
        await shared[0].publish(accounts[0], clock())
        assert accounts[0].peers == 2
        assert accounts[0].at(clock())[0].spent == sum(account.at(clock())[0].own for account in accounts)
        budgets.worker_ended(1)
        await shared[0].publish(accounts[0], clock())
        assert accounts[0].others_held == 0
        assert accounts[0].peers == 1
        assert accounts[0].at(clock())[0].others == accounts[1].at(clock())[0].own
        clock.now += 86_400
        await shared[0].publish(accounts[0], clock())
        assert accounts[0].at(clock())[0].others == 0
        assert accounts[0].at(clock())[1].others == accounts[1].at(clock())[1].own
        theirs.close()
        assert await shared[0].publish(accounts[0], clock()) is None


async def test_cost_of_earlier_runs_counts_once() -> None:
    budgets, clock = SharedBudgetTable(), Clock()
    clock.now = NOON
    async with channel_pair() as (ours, theirs), channel_pair() as (mine, yours):
        workers = []
        for number, (end, other) in enumerate(((ours, theirs), (mine, yours))):
            end.handlers["budget"] = partial(budgets.publish, number)
            account = Account("anna")
            account.change({"day": Decimal(100)}, clock())
            account.read("day", account.at(clock())[0].start, Decimal(10), clock())
            workers.append((account, WorkerBudgets(type("Link", (), {"channel": other})())))
        for _ in range(2):
            for account, shared in workers:
                account.spend(Decimal(1), Decimal(1), clock())
                await shared.publish(account, clock())
        for account, shared in workers:
            await shared.publish(account, clock())
            assert account.at(clock())[0].spent == 14
