"""Budgets that hold over all workers: the parent adds up. The rule is `core.budgets.Account`'s."""

from __future__ import annotations

from dataclasses import dataclass, field
from decimal import Decimal
from typing import Final

from ..accounting.budgets.account import EXACT, ZERO, Account, Kind
from .ipc import Answer, ConnectionLost
from .shared_state import pack, unpack
from .worker import WorkerLink

_PERIODS: Final = 4
"""A day, a month, and those before, of which a late word may still come."""

_Period = tuple[Kind, float]
_Pots = list[tuple[Kind, float, Decimal, Decimal, Decimal]]
"""(kind, begin, spent by this worker, limit, the least that all have spent) of each."""


@dataclass(slots=True)
class _Total:
    """One period: what all have spent in it, and each worker's part, as last told."""

    total: Decimal = ZERO
    parts: dict[int, Decimal] = field(default_factory=dict)


@dataclass(slots=True)
class _SharedBudget:
    """One account. held: USD by worker."""

    held: dict[int, Decimal] = field(default_factory=dict)
    periods: dict[_Period, _Total] = field(default_factory=dict)


class SharedBudgetTable:
    """The parent's part. A worker tells all it has spent in a period, never a difference."""

    def __init__(self) -> None:
        self._purses: dict[str, _SharedBudget] = {}

    def publish(self, worker: int, body: bytes) -> Answer:
        """Whether there is room for what is asked for, what others hold, how many spend, and what others spent."""
        name, held, ask, pots = unpack(body, str, Decimal, Decimal | None, _Pots)
        purse = self._purses.setdefault(name, _SharedBudget())
        others = sum((one for other, one in purse.held.items() if other != worker), ZERO)
        before = EXACT.add(others, held if ask is None else EXACT.subtract(held, ask))
        room, spent = True, []
        for kind, start, own, limit, least in pots:
            total = self._period(purse, (kind, start))
            change = EXACT.subtract(own, total.parts.get(worker, ZERO))
            total.total = max(EXACT.add(total.total, change), least)
            total.parts[worker] = own
            spent.append((kind, start, EXACT.subtract(total.total, own)))
            taken = EXACT.add(total.total, before)
            room = room and taken < limit and EXACT.add(taken, ask or ZERO) <= limit
        purse.held[worker] = held if room or ask is None else EXACT.subtract(held, ask)
        return pack(room, others, len(purse.held), spent)

    def left(self, worker: int) -> None:
        """It holds nothing any more; what it spent is spent."""
        for purse in self._purses.values():
            purse.held.pop(worker, None)

    def _period(self, purse: _SharedBudget, period: _Period) -> _Total:
        if period not in purse.periods and len(purse.periods) >= _PERIODS:
            del purse.periods[min(purse.periods, key=lambda one: one[1])]
        return purse.periods.setdefault(period, _Total())


class WorkerBudgets:
    """`budgets.Shared`: the worker's part."""

    def __init__(self, seat: WorkerLink) -> None:
        self._channel = seat.channel

    async def open(self) -> None:
        """There already."""

    async def close(self) -> None:
        await self._channel.flush()

    async def publish(self, account: Account, wall: float, ask: Decimal | None = None) -> bool | None:
        pots = [(pot.kind, pot.start, pot.own, pot.limit, EXACT.add(pot.before, pot.own)) for pot in account.at(wall)]
        try:
            answer = await self._channel.request("budget", pack(account.name, account.held, ask, pots))
        except ConnectionLost:
            return None
        room, held, peers, spent = unpack(answer, bool, Decimal, int, list[tuple[Kind, float, Decimal]])
        account.apply_shared({(kind, start): others for kind, start, others in spent}, held, peers, wall)
        return bool(room)
