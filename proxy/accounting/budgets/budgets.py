"""Budgets: reserve the estimated cost of a request before it is sent, and settle its cost after it.

The rules are in `account.py`. What other processes spend is known from Redis if limits are shared over it: it is asked
for every request, and while it is out of reach each proxy keeps to its share. Otherwise it is known from the ledger,
which is read every few seconds: it holds what other processes, and this one before its start, have spent.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from decimal import Decimal
from typing import Any, Final, Protocol

from ...config.settings import Settings
from ...cost.pricing import usd
from ...protocol.request import Client
from ...system.clock import Clock, spawn
from ...system.state_changes import Change, state_changed
from ...system.tasks import spawn_forever
from ..receipt import Receipt
from .account import ZERO, Account, BudgetPeriod, BudgetReservation, Kind, budget_exceeded

log = logging.getLogger("proxy")

READ_INTERVAL: Final = 3.0
"""Seconds between two reads of the ledger, at least; reading takes at most a twentieth of the time."""

PUBLISH_INTERVAL: Final = 1.0
"""Seconds between two messages to the other proxies, at most."""

Spent = Callable[[float, str | None], Awaitable[Decimal]]
"""Returns the USD spent since a time (Unix seconds) by one client (None: by all), according to the ledger."""


class SharedBudgets(Protocol):
    """Budgets shared by several processes. No method raises."""

    async def open(self) -> None: ...

    async def close(self) -> None: ...

    async def publish(self, account: Account, wall: float, ask: Decimal | None = None) -> bool | None:
        """Publish what this process has spent and reserved, and take over what the others have.

        ask: USD of what is reserved that is new: published only if there is room for it.
        Returns False if there is no room, None if the others cannot be reached.
        """


class Budgets:
    """All budgets of this process; they survive a reload. The account of the whole proxy is named ''."""

    def __init__(self, settings: Settings, clock: Clock, shared: SharedBudgets | None = None) -> None:
        self._clock = clock
        self.wall = clock.wall
        self._shared = shared
        self._accounts: dict[str, Account] = {}
        self._spent: Spent | None = None
        self._known: set[str] = set()
        self._unpublished: set[str] = set()
        self._publishing: asyncio.Task[None] | None = None
        self._running: asyncio.Task[None] | None = None
        self.apply_settings(settings)

    def apply_settings(self, settings: Settings) -> None:
        """Put other settings in force; what was spent stays."""
        budget, wall = settings.cost.budget, self._clock.wall()
        self._share = Decimal(str(budget.warn_at))
        self.cache_only = budget.on_exceeded == "cache_only"
        limits: dict[str, dict[Kind, Decimal]] = {"": {}}
        if budget.usd_per_day is not None:
            limits[""]["day"] = budget.usd_per_day
        if budget.usd_per_month is not None:
            limits[""]["month"] = budget.usd_per_month
        for key in settings.server.client_keys:
            if key.usd_per_day is not None:
                limits[key.name] = {"day": key.usd_per_day}
        before, self._accounts = self._accounts, {}
        self._known &= before.keys()
        for name, each in limits.items():
            if each:
                account = self._accounts[name] = before.get(name) or Account(name)
                account.change(each, wall)

    @property
    def active(self) -> bool:
        return bool(self._accounts)

    @property
    def accounts(self) -> Sequence[Account]:
        return tuple(self._accounts.values())

    def _of(self, client: Client) -> list[Account]:
        """Return the accounts that count a client's requests, its own first."""
        names = (client.name, "") if client.name else ("",)
        return [self._accounts[name] for name in names if name in self._accounts]

    # -- one request ---------------------------------------------------------------------------------------------------

    async def reserve(self, client: Client, estimate: Decimal | None) -> BudgetReservation | None:
        """Reserve `estimate` USD (None: no price is known) for a request. Raises ProxyError(budget_exceeded).

        Returns None if no budget counts the request.
        """
        accounts = self._of(client)
        if not accounts or (estimate == 0 and not self.cache_only):
            return None
        amount, wall = estimate or ZERO, self._clock.wall()
        if self._shared is None:
            for account in accounts:
                self._check(account, amount, wall)
            return BudgetReservation(accounts, amount, self._changed)
        held: list[Account] = []
        try:
            for account in accounts:
                await self._reserve(self._shared, account, amount, wall)
                held.append(account)
        except BaseException:
            for account in held:
                account.release(amount)
            self._changed()
            raise
        return BudgetReservation(accounts, amount, self._changed, held=True)

    async def _reserve(self, shared: SharedBudgets, account: Account, amount: Decimal, wall: float) -> None:
        """Reserve `amount` in this process and tell the others. Raises ProxyError, and then nothing is reserved.

        What does not fit by what is known here is not reserved at all: in a burst the requests would block each other.
        """
        if account.short(amount, wall) is not None:  # the others may have released some since they were last heard
            heard = await shared.publish(account, wall)
            self._check(account, amount, wall, alone=heard is None)
        account.reserve(amount)
        try:
            fits = await shared.publish(account, wall, amount)
        except BaseException:
            account.release(amount)
            raise
        if fits is not True:
            account.release(amount)  # otherwise it would count against itself
            self._check(account, amount, wall, alone=fits is None)
            if fits is False:
                raise budget_exceeded(account, _fullest(account, wall), amount, wall, self.cache_only)
            account.reserve(amount)

    def _check(self, account: Account, amount: Decimal, wall: float, alone: bool = False) -> None:
        period = account.short(amount, wall, alone)
        if period is not None:
            raise budget_exceeded(account, period, amount, wall, self.cache_only)

    def check(self, client: Client) -> None:
        """Check a request whose cost stays unknown, but may be anything. Raises ProxyError(budget_exceeded)."""
        for account in self._of(client):
            self._check(account, ZERO, self._clock.wall())

    def recorded(self, receipt: Receipt) -> None:
        """Take note of a receipt, which the ledger will contain."""
        if self._accounts and receipt.cost_usd is not None and receipt.attempts:
            cost, wall = Decimal(receipt.cost_usd), self._clock.wall()
            for name in {receipt.client, ""} & self._accounts.keys():
                self._accounts[name].record(cost, receipt.finished_at, wall)

    def _changed(self) -> None:
        self._warn()
        if self._shared is not None:
            self._unpublished |= self._accounts.keys()
            if self._publishing is None or self._publishing.done():
                self._publishing = spawn(self._publish_changed(), "budgets")

    def _warn(self) -> None:
        wall = self._clock.wall()
        for account in self._accounts.values():
            crossed, used_up = account.crossed(self._share, wall), account.used_up(wall)
            for period in [*crossed, *(period for period in used_up if period not in crossed)]:
                whose = f"client {account.name}" if account.name else "this proxy"
                text = f"the budget of {whose} for this {period.kind} (UTC): {usd(period.spent)} of "
                text += f"{usd(period.limit)} USD are spent"
                state = "used_up" if period in used_up else "warned"
                name = f"{account.name or 'proxy'} {period.kind}"
                state_changed(Change("budget", name, state, text, until=period.end))

    # -- in the background ---------------------------------------------------------------------------------------------

    async def open(self, spent: Spent | None) -> None:
        """Find out what was spent before, and start the background task. spent: asks the ledger; None: no ledger."""
        self._spent = spent
        await self._read()
        await self._publish_all()
        self._running = spawn_forever(self._run, "budgets", self._clock)

    async def close(self) -> None:
        """Stop the background task and publish what the others do not know yet."""
        if self._running is not None:
            self._running.cancel()
        if self._shared is not None:
            await self._publish_all()
            await self._shared.close()

    async def _run(self) -> None:
        while True:
            if self._shared is not None:
                await self._clock.sleep(PUBLISH_INTERVAL)
                await self._read()
                await self._publish_all()
            else:
                began = self._clock.monotonic()
                await self._read()
                await self._clock.sleep(max(READ_INTERVAL, 20 * (self._clock.monotonic() - began)))
            self._warn()

    async def _read(self) -> None:
        """Read the ledger; once only if the others' spending is known from Redis."""
        if self._spent is None:
            return
        for account in self.accounts:
            if self._shared is not None and account.name in self._known:
                continue
            self._known.add(account.name)
            for period in account.at(self._clock.wall()):
                kind, start = period.kind, period.start
                try:
                    total = await self._spent(start, account.name or None)
                except OSError as error:
                    log.warning("budgets: the ledger cannot be read: %s", error)
                    return
                account.read(kind, start, total, self._clock.wall())

    async def _publish_changed(self) -> None:
        assert self._shared is not None
        while self._unpublished:
            names, self._unpublished = self._unpublished, set()
            for account in [self._accounts[name] for name in names if name in self._accounts]:
                await self._shared.publish(account, self._clock.wall())

    async def _publish_all(self) -> None:
        if self._shared is None or not self._accounts:
            return
        await self._shared.open()
        self._unpublished |= self._accounts.keys()
        await self._publish_changed()

    # -- reports -------------------------------------------------------------------------------------------------------

    def client_usage(self, client: Client) -> str:
        """Return what a client has used of its own budget, for `X-Proxy-Client-Limit`; "" if it has none."""
        account = self._accounts.get(client.name) if client.name else None
        if account is None:
            return ""
        return ", ".join(f"usd_per_{p.kind}={usd(p.spent)}/{usd(p.limit)}" for p in account.at(self._clock.wall()))

    def report(self) -> Mapping[str, Any]:
        """Return all budgets, for `GET /_proxy/status`."""
        wall = self._clock.wall()
        reports = {name: account.report(wall) for name, account in self._accounts.items()}
        return {"proxy": reports.pop("", {}), "clients": reports}


def _fullest(account: Account, wall: float) -> BudgetPeriod:
    """Return the budget to name in the error if another process said that there is no room."""
    return max(account.at(wall), key=lambda period: (period.spent / period.limit if period.limit else ZERO, period.end))
