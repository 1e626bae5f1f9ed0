"""Budgets over workers: all together never spend more than the limit but for what estimates were short of."""

from __future__ import annotations

import random
from decimal import Decimal
from functools import partial

from proxy.accounting.budgets.account import Account
from proxy.workers.budgets import SharedBudgetTable, WorkerBudgets
from tests.workers.kit import Clock, wire

NOON = 1_790_000_000.0


async def test_all_together_stay_within_the_limit_and_a_dead_worker_holds_nothing() -> None:
    purses, clock, dice = SharedBudgetTable(), Clock(), random.Random(3)
    clock.now = NOON
    accounts = [Account("") for _ in range(2)]
    for account in accounts:
        account.change({"day": Decimal(1), "month": Decimal(5)}, clock())
    async with wire() as (ours, theirs), wire() as (mine, yours):
        shared = []
        for number, (end, other) in enumerate(((ours, theirs), (mine, yours))):
            end.handlers["budget"] = partial(purses.publish, number)
            shared.append(WorkerBudgets(type("Seat", (), {"channel": other})()))
        amount, held = Decimal("0.03"), []
        for _ in range(60):
            number = dice.randrange(2)
            account = accounts[number]
            account.reserve(amount)
            if await shared[number].publish(account, clock(), amount):
                held.append(account)
            else:
                account.release(amount)
            if held and dice.random() < 0.3:
                done = held.pop()
                done.release(amount)
                done.spend(amount, amount, clock())
                await shared[accounts.index(done)].publish(done, clock())
            pots = [account.at(clock())[0] for account in accounts]
            assert sum(pot.own for pot in pots) + sum(account.held for account in accounts) <= 1
        taken = sum(account.at(clock())[0].own + account.held for account in accounts)
        assert taken == Decimal("0.99")
        for number, account in enumerate(accounts):
            await shared[number].publish(account, clock())
        await shared[0].publish(accounts[0], clock())
        assert accounts[0].peers == 2
        assert accounts[0].at(clock())[0].spent == sum(account.at(clock())[0].own for account in accounts)
        purses.left(1)
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


async def test_what_was_spent_before_the_start_counts_once() -> None:
    purses, clock = SharedBudgetTable(), Clock()
    clock.now = NOON
    async with wire() as (ours, theirs), wire() as (mine, yours):
        found = []
        for number, (end, other) in enumerate(((ours, theirs), (mine, yours))):
            end.handlers["budget"] = partial(purses.publish, number)
            account = Account("anna")
            account.change({"day": Decimal(100)}, clock())
            account.read("day", account.at(clock())[0].start, Decimal(10), clock())
            found.append((account, WorkerBudgets(type("Seat", (), {"channel": other})())))
        for _ in range(2):
            for account, shared in found:
                account.spend(Decimal(1), Decimal(1), clock())
                await shared.publish(account, clock())
        for account, shared in found:
            await shared.publish(account, clock())
            assert account.at(clock())[0].spent == 14
