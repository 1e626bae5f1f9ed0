"""Budgets over a real Redis: one total for all, whatever is lost on the way; and what happens without it."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from decimal import Decimal

import pytest

from proxy.accounting.budgets import redis as module
from proxy.accounting.budgets.account import Account, BudgetPeriod, BudgetReservation
from proxy.accounting.budgets.budgets import Budgets
from proxy.accounting.budgets.redis import RedisBudgets
from proxy.config.settings import BudgetSettings, CostSettings, Settings
from proxy.protocol.errors import ProxyError
from proxy.protocol.request import Client
from proxy.system import redis as redis_link
from proxy.system.clock import Clock
from tests.cache.stores.kit import HASTY, NOW, PATIENT, Valkey, until, valkey

pytestmark = pytest.mark.slow

D = Decimal
NOBODY = Client()


@dataclass
class Proxy:
    """One process: what it has of budgets."""

    budgets: Budgets
    shared: RedisBudgets

    @property
    def account(self) -> Account:
        return self.budgets.accounts[0]

    def pot(self, kind: str = "day") -> BudgetPeriod:
        return next(pot for pot in self.account.at(self.budgets.wall()) if pot.kind == kind)

    async def hold(self, amount: str) -> BudgetReservation | None:
        """A stake, or None where there is no room."""
        try:
            return await self.budgets.reserve(NOBODY, D(amount))
        except ProxyError:
            return None

    async def spend(self, amount: str, cost: str | None = None) -> bool:
        stake = await self.hold(amount)
        if stake is not None:
            stake.settle(D(cost or amount), self.budgets.wall())
        return stake is not None

    def waits(self, seconds: float) -> None:
        """For each answer, from now on."""
        self.shared._deadline = self.shared._link._deadline = seconds

    async def told(self) -> None:
        """All is said, and the others are heard."""
        await self.budgets._publish_all()


Start = Callable[..., Awaitable[Proxy]]


@pytest.fixture(scope="module")
def shared() -> Iterator[Valkey]:
    with valkey() as server:
        yield server


@pytest.fixture
def server(shared: Valkey) -> Iterator[Valkey]:
    shared.say("FLUSHALL")
    yield shared
    shared.signal(signal.SIGCONT)


class Hands:
    wall = NOW


@pytest.fixture
async def start(server: Valkey, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Start]:
    monkeypatch.setattr(redis_link, "DEADLINE_MAX", PATIENT)
    monkeypatch.setattr(redis_link, "_PROBE_FIRST", 0.05)
    monkeypatch.setattr(redis_link, "_PROBE_LAST", 0.1)
    monkeypatch.setattr(module, "HELD_FOR", 10 * PATIENT)
    Hands.wall = NOW
    started: list[Proxy] = []

    async def one(day: str = "10", month: str = "100", before: str = "0", prefix: str = "p") -> Proxy:
        settings = Settings(cost=CostSettings(budget=BudgetSettings(D(day), D(month))))
        link = RedisBudgets(server.url, prefix, f"p{len(started)}", deadline=PATIENT)
        await link.open()
        await until(lambda: link._link.up)
        proxy = Proxy(Budgets(settings, Clock(wall=lambda: Hands.wall), link), link)

        async def spent(since: float, client: str | None) -> Decimal:
            return D(before)

        await proxy.budgets.open(spent)
        assert proxy.budgets._running is not None
        proxy.budgets._running.cancel()
        started.append(proxy)
        return proxy

    yield one
    server.signal(signal.SIGCONT)
    for proxy in started:
        await proxy.budgets.close()


async def test_a_budget_is_shared_by_all_proxies(start: Start) -> None:
    proxies = [await start("1") for _ in range(3)]
    spent = await asyncio.gather(*[proxies[n % 3].spend("0.03", "0.03") for n in range(60)])
    assert sum(spent) <= 33
    for proxy in proxies * 2:
        await proxy.told()
    total = sum((proxy.pot().own for proxy in proxies), D(0))
    assert {proxy.pot().spent for proxy in proxies} == {total}
    while await proxies[0].spend("0.03"):  # what was held in that crowd is free again
        await proxies[0].told()
    await proxies[1].told()
    assert proxies[1].pot().spent == D("0.99")
    assert {proxy.account.held for proxy in proxies} == {0}


async def test_a_burst_at_one_proxy_may_use_the_whole_budget(start: Start) -> None:
    one = await start("1")
    stakes = await asyncio.gather(*[one.hold("0.03") for _ in range(100)])
    assert len([stake for stake in stakes if stake is not None]) == 33
    assert one.account.held == D("0.99")


async def test_a_reservation_of_one_proxy_is_not_free_for_others(start: Start) -> None:
    one, other = await start("1"), await start("1")
    mine = await one.hold("0.7")
    assert mine is not None
    assert await other.hold("0.4") is None
    assert await other.hold("0.3") is not None
    assert await one.hold("0.000000000001") is None
    mine.cancel()
    await one.told()
    assert await other.hold("0.7") is not None


async def test_sums_are_exact(start: Start) -> None:
    """Beyond what a double can hold: 2^53 of 1e-12 USD are 9,007 USD."""
    one, other = await start("1000000", "1000000"), await start("1000000", "1000000")
    await one.spend("1", "123456.000000000001")
    await other.spend("1", "98765.000000000002")
    for proxy in (one, other) * 2:
        await proxy.told()
    assert one.pot().spent == other.pot().spent == D("222221.000000000003")


async def test_repeated_reports_count_once_and_outdated_ones_not(start: Start, server: Valkey) -> None:
    one, other = await start(), await start()
    await one.spend("2")
    for _ in range(3):
        await one.told()
    early = Account("")
    early.change({"day": D(10), "month": D(100)}, NOW)  # as it was before: a message that was under way for long
    one.shared._seq -= 3
    await one.shared.publish(early, NOW)
    one.shared._seq += 3
    await other.told()
    assert (other.pot().spent, other.pot("month").spent) == (D(2), D(2))


async def test_a_new_day_starts_at_zero(start: Start, server: Valkey) -> None:
    one, other = await start(), await start()
    await one.spend("9")
    await one.told()
    assert not await other.spend("2")
    Hands.wall += 86400.0
    assert await other.spend("2")
    for proxy in (other, one):
        await proxy.told()
    assert (one.pot().spent, one.pot("month").spent) == (D(2), D(11))
    keys = [key for key in server.say("KEYS", "*").split(b"\r\n") if key.startswith(b"p:")]
    assert len(keys) == 4  # what is held, two days, a month
    assert len({key.split(b"}")[0] for key in keys}) == 1
    for key in keys:
        assert 0 < int(server.say("TTL", key)[1:]) <= 33 * 86400


async def test_keys_are_short(start: Start) -> None:
    proxy = await start(prefix="p" * 64)
    assert len(proxy.shared.key(Account("c" * 200), "month", int(NOW)).encode()) <= 160


async def test_reservations_of_a_killed_proxy_are_released(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = await start("1"), await start("1")
    assert await one.hold("0.9") is not None
    assert not await other.spend("0.5")
    monkeypatch.setattr(module, "HELD_FOR", 0.1)
    await one.told()
    await asyncio.sleep(0.2)
    assert await other.spend("0.5")


async def test_spending_is_reported_again_after_redis_lost_its_data(start: Start, server: Valkey) -> None:
    one, other = await start(before="3"), await start(before="3")
    await one.spend("1")
    await other.spend("2")
    for proxy in (one, other) * 2:
        await proxy.told()
    assert {one.pot().spent, other.pot().spent} == {D(6)}
    server.say("FLUSHALL")
    for proxy in (one, other) * 2:
        await proxy.told()
    third = await start()
    assert third.pot().spent >= 5  # all but perhaps what was before the smaller of two


async def test_a_restart_knows_what_was_spent_from_redis_and_the_ledger(start: Start) -> None:
    one = await start()
    await one.spend("4")
    await one.told()
    same = await start(before="4")
    assert same.pot().spent == 4
    assert (await start(before="5")).pot().spent == 5  # the ledger knows more: Redis was not there before


async def test_without_redis_each_proxy_keeps_to_its_share(
    start: Start, server: Valkey, caplog: pytest.LogCaptureFixture
) -> None:
    one, other = await start("10"), await start("10")
    await one.spend("4")
    for proxy in (one, other) * 2:
        await proxy.told()
    server.signal(signal.SIGSTOP)
    for proxy in (one, other):
        proxy.waits(HASTY)
        for _ in range(3):  # then Redis is taken for lost
            await proxy.told()
            proxy.budgets._unpublished.clear()
        assert not await proxy.hold("3.01")
        assert await proxy.spend("2")
        assert await proxy.spend("1")
        assert not await proxy.spend("0.01")
    assert "each proxy holds its share of what was left of the budgets" in caplog.text
    server.signal(signal.SIGCONT)
    for proxy in (one, other):
        proxy.waits(PATIENT)
    await until(lambda: one.shared._link.up and other.shared._link.up)
    for proxy in (one, other) * 2:
        await proxy.told()
    assert one.pot().spent == other.pot().spent == 10


async def test_an_error_of_redis_fails_no_request(start: Start, server: Valkey) -> None:
    one = await start("10")
    server.say("SET", "x", "1")
    server.say("DEL", one.shared.key(one.account, "held"))
    server.say("SET", one.shared.key(one.account, "held"), "not a hash")
    assert await one.spend("4")
    assert not await one.spend("7")
