"""Budgets as the journey sees them: a stake for each request that is about to go upstream, ended on every exit.

What is decided stands in `core/budgets.py`. What others spend is known from Redis, where limits are shared over one
(`limiters/redis_budgets.py`: asked for every request; while it is lost each proxy keeps to its share), else from the
ledger, read anew every few seconds: other processes that write to it, and this one before it was started.
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
from ...protocol.routes import CARRIES_NO_MODEL
from ...system.clock import Clock, spawn
from ..receipt import Receipt
from .account import ZERO, Account, BudgetPeriod, BudgetReservation, Kind, budget_exceeded

log = logging.getLogger("proxy")

READ_INTERVAL: Final = 3.0
"""Seconds between two looks into the ledger, at least; a look may take a twentieth of the time."""

PUBLISH_INTERVAL: Final = 1.0
"""Seconds between two words to the other proxies, at most."""

Spent = Callable[[float, str | None], Awaitable[Decimal]]
"""USD spent since then (Unix seconds) by the ledger, by one client (None: all)."""


class SharedBudgets(Protocol):
    """What proxies share. Nothing here raises."""

    async def open(self) -> None: ...

    async def close(self) -> None: ...

    async def publish(self, account: Account, wall: float, ask: Decimal | None = None) -> bool | None:
        """Tells what this process has spent and holds, and hears the others; with `ask`, which is part of what is
        held: only where there is room for all of it, False where not. None: it could not be asked.
        """


class Budgets:
    """All budgets of this process; they outlive a reload. '' is the whole proxy's name."""

    def __init__(self, settings: Settings, clock: Clock, shared: SharedBudgets | None = None) -> None:
        self._clock = clock
        self.wall = clock.wall
        self._shared = shared
        self._accounts: dict[str, Account] = {}
        self._spent: Spent | None = None
        self._known: set[str] = set()
        self._unsaid: set[str] = set()
        self._saying: asyncio.Task[None] | None = None
        self._running: asyncio.Task[None] | None = None
        self.apply_settings(settings)

    def apply_settings(self, settings: Settings) -> None:
        """Other settings are in force; what was spent stays."""
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
        """The client's own first."""
        names = (client.name, "") if client.name else ("",)
        return [self._accounts[name] for name in names if name in self._accounts]

    # -- one request ---------------------------------------------------------------------------------------------------

    async def reserve(self, client: Client, estimate: Decimal | None) -> BudgetReservation | None:
        """A stake for a request that may cost `estimate` USD, None where no price is known; no stake where nothing is
        to be counted. Raises ProxyError(budget_exceeded).
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
        """Holds `amount`, here and for all to know. Raises ProxyError, and then nothing is held.

        What does not fit by what is known here is not even held: else in a burst each would stand in the others' way.
        """
        if account.short(amount, wall) is not None:  # the others may have given back since they were heard last
            heard = await shared.publish(account, wall)
            self._check(account, amount, wall, alone=heard is None)
        account.reserve(amount)
        try:
            fits = await shared.publish(account, wall, amount)
        except BaseException:
            account.release(amount)
            raise
        if fits is not True:
            account.release(amount)  # it is not to stand in its own way
            self._check(account, amount, wall, alone=fits is None)
            if fits is False:
                raise budget_exceeded(account, _fullest(account, wall), amount, wall, self.cache_only)
            account.reserve(amount)

    def _check(self, account: Account, amount: Decimal, wall: float, alone: bool = False) -> None:
        pot = account.short(amount, wall, alone)
        if pot is not None:
            raise budget_exceeded(account, pot, amount, wall, self.cache_only)

    def check_passthrough(self, client: Client, method: str, segment: str) -> None:
        """For a route whose cost nobody knows: it is refused once a budget is used up, if it may cost anything. Raises
        Refusal(budget_exceeded).
        """
        if self._accounts and method not in ("GET", "HEAD", "DELETE") and segment not in CARRIES_NO_MODEL:
            for account in self._of(client):
                self._check(account, ZERO, self._clock.wall())

    def recorded(self, receipt: Receipt) -> None:
        """A receipt was written; the ledger will have it."""
        if self._accounts and receipt.cost_usd is not None and receipt.attempts:
            cost, wall = Decimal(receipt.cost_usd), self._clock.wall()
            for name in {receipt.client, ""} & self._accounts.keys():
                self._accounts[name].record(cost, receipt.finished_at, wall)

    def _changed(self) -> None:
        self._warn()
        if self._shared is not None:
            self._unsaid |= self._accounts.keys()
            if self._saying is None or self._saying.done():
                self._saying = spawn(self._say(), "budgets")

    def _warn(self) -> None:
        wall = self._clock.wall()
        for account in self._accounts.values():
            for pot in account.crossed(self._share, wall):
                whose = f"client {account.name}" if account.name else "this proxy"
                log.warning(
                    "the budget of %s for this %s (UTC): %s of %s USD are spent",
                    whose,
                    pot.kind,
                    usd(pot.spent),
                    usd(pot.limit),
                )

    # -- in the background ---------------------------------------------------------------------------------------------

    async def open(self, spent: Spent | None) -> None:
        """Learns what was spent before. spent: asks the ledger, None where there is none."""
        self._spent = spent
        await self._read()
        await self._publish_all()
        self._running = spawn(self._run(), "budgets")

    async def close(self) -> None:
        """Tells the others what is still to be told."""
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
        """What the ledger says of all who write to it; where Redis says that, only what was spent before."""
        if self._spent is None:
            return
        for account in self.accounts:
            if self._shared is not None and account.name in self._known:
                continue
            self._known.add(account.name)
            for pot in account.at(self._clock.wall()):
                kind, start = pot.kind, pot.start
                try:
                    total = await self._spent(start, account.name or None)
                except OSError as error:
                    log.warning("budgets: the ledger cannot be read: %s", error)
                    return
                account.read(kind, start, total, self._clock.wall())

    async def _say(self) -> None:
        assert self._shared is not None
        while self._unsaid:
            names, self._unsaid = self._unsaid, set()
            for account in [self._accounts[name] for name in names if name in self._accounts]:
                await self._shared.publish(account, self._clock.wall())

    async def _publish_all(self) -> None:
        if self._shared is None or not self._accounts:
            return
        await self._shared.open()
        self._unsaid |= self._accounts.keys()
        await self._say()

    # -- what is told --------------------------------------------------------------------------------------------------

    def client_usage(self, client: Client) -> str:
        """What a client has used of its own budget, for `X-Proxy-Client-Limit`; "" where it has none."""
        account = self._accounts.get(client.name) if client.name else None
        if account is None:
            return ""
        return ", ".join(f"usd_per_{p.kind}={usd(p.spent)}/{usd(p.limit)}" for p in account.at(self._clock.wall()))

    def report(self) -> Mapping[str, Any]:
        """For `GET /_proxy/status`."""
        wall = self._clock.wall()
        told = {name: account.report(wall) for name, account in self._accounts.items()}
        return {"proxy": told.pop("", {}), "clients": told}


def _fullest(account: Account, wall: float) -> BudgetPeriod:
    """The pot to name where another proxy's last word was that there is no room."""
    return max(account.at(wall), key=lambda pot: (pot.spent / pot.limit if pot.limit else ZERO, pot.end))
