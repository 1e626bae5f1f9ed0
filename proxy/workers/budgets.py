"""Budgets shared by all workers: the supervisor adds up what they spend (docs/costs-and-budgets.md)."""

from __future__ import annotations

from dataclasses import dataclass, field
from decimal import Decimal
from typing import Final

from ..accounting.budgets.account import EXACT, ZERO, Account, Kind
from .ipc import Answer, ConnectionLost
from .shared_state import pack, unpack
from .worker import WorkerLink

_MAX_PERIODS: Final = 4
"""The current day and month, and the previous ones, of which a late report may still come."""

_Period = tuple[Kind, float]
_PeriodReports = list[tuple[Kind, float, Decimal, Decimal, Decimal]]
"""(kind, start, spent by this worker, limit, least that all workers have spent) of each period; money in USD."""


@dataclass(slots=True)
class _Total:
    """One period. total: USD spent by all workers; parts: by each worker, as it last reported."""

    total: Decimal = ZERO
    parts: dict[int, Decimal] = field(default_factory=dict)


@dataclass(slots=True)
class _SharedBudget:
    """One account. held: USD reserved by each worker."""

    held: dict[int, Decimal] = field(default_factory=dict)
    periods: dict[_Period, _Total] = field(default_factory=dict)


class SharedBudgetTable:
    """The supervisor's part. Workers report what they have spent in a period in all, never a difference."""

    def __init__(self) -> None:
        self._budgets: dict[str, _SharedBudget] = {}

    def publish(self, worker: int, body: bytes) -> Answer:
        """Record a worker's report; grant or refuse the amount that it asks for.

        The answer: whether there is room, USD held by others, the number of workers, USD spent by others by period.
        """
        name, held, amount, reports = unpack(body, str, Decimal, Decimal | None, _PeriodReports)
        budget = self._budgets.setdefault(name, _SharedBudget())
        others = sum((usd for other, usd in budget.held.items() if other != worker), ZERO)
        before = EXACT.add(others, held if amount is None else EXACT.subtract(held, amount))
        room, spent = True, []
        for kind, start, own, limit, least in reports:
            total = self._period(budget, (kind, start))
            change = EXACT.subtract(own, total.parts.get(worker, ZERO))
            total.total = max(EXACT.add(total.total, change), least)
            total.parts[worker] = own
            spent.append((kind, start, EXACT.subtract(total.total, own)))
            taken = EXACT.add(total.total, before)
            room = room and taken < limit and EXACT.add(taken, amount or ZERO) <= limit
        budget.held[worker] = held if room or amount is None else EXACT.subtract(held, amount)
        return pack(room, others, len(budget.held), spent)

    def worker_ended(self, worker: int) -> None:
        """Release what an ended worker held; what it spent stays."""
        for budget in self._budgets.values():
            budget.held.pop(worker, None)

    def _period(self, budget: _SharedBudget, period: _Period) -> _Total:
        if period not in budget.periods and len(budget.periods) >= _MAX_PERIODS:
            del budget.periods[min(budget.periods, key=lambda known: known[1])]
        return budget.periods.setdefault(period, _Total())


class WorkerBudgets:
    """A worker's part: the `SharedBudgets` of `accounting.budgets`."""

    def __init__(self, link: WorkerLink) -> None:
        self._channel = link.channel

    async def open(self) -> None:
        """Do nothing: the link is open."""

    async def close(self) -> None:
        await self._channel.flush()

    async def publish(self, account: Account, wall: float, ask: Decimal | None = None) -> bool | None:
        """Report the account. Return whether `ask` USD fit, or None if the supervisor cannot be reached."""
        reports = [
            (period.kind, period.start, period.own, period.limit, EXACT.add(period.before, period.own))
            for period in account.at(wall)
        ]
        try:
            answer = await self._channel.request("budget", pack(account.name, account.held, ask, reports))
        except ConnectionLost:
            return None
        room, held, peers, spent = unpack(answer, bool, Decimal, int, list[tuple[Kind, float, Decimal]])
        account.apply_shared({(kind, start): others for kind, start, others in spent}, held, peers, wall)
        return bool(room)
