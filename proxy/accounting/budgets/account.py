"""What may be spent in a day and a month, by the whole proxy and by each client: reserved by estimate, settled by cost.

Days and months are those of the calendar in UTC. A request holds its estimate until its cost is known, across midnight,
too; its cost counts in the day it is settled in. A budget is never exceeded but by what estimates were short of: a
request is let through only where all that is spent and held, and its own estimate, stay within the limit. What went up
and whose cost nobody knows counts with its estimate (`assumed`), which is 0 for a model without a price.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from decimal import Context, Decimal
from typing import Any, Final, Literal

from ...cost.pricing import usd
from ...protocol.errors import ProxyError

Kind = Literal["day", "month"]

EXACT: Final = Context(prec=60)  # as in pricing: nothing is ever rounded
ZERO: Final = Decimal(0)

IN_FLIGHT: Final = 1.0
"""Seconds to come back after where only what is under way leaves no room: it is over soon."""

_DAY: Final = 86400.0


def span(kind: Kind, wall: float) -> tuple[float, float]:
    """Begin and end of the UTC day or month that `wall` is in; all Unix seconds."""
    if kind == "day":
        begin = wall // _DAY * _DAY
        return begin, begin + _DAY
    now = datetime.fromtimestamp(wall, UTC)
    begin_, year = datetime(now.year, now.month, 1, tzinfo=UTC), now.year + now.month // 12
    return begin_.timestamp(), datetime(year, now.month % 12 + 1, 1, tzinfo=UTC).timestamp()


def _sum(*amounts: Decimal) -> Decimal:
    total = ZERO
    for amount in amounts:
        total = EXACT.add(total, amount)
    return total


class BudgetPeriod:
    """One budget in one period. Money is in USD.

    settled, assumed: of this process; recorded: what its receipts say, which is in the ledger, too; others: what other
    processes, and this one before it was started, have spent, as far as known; before: the same as the ledger said it
    last; unknown: answers without a known cost.
    """

    def __init__(self, kind: Kind, limit: Decimal, wall: float) -> None:
        self.kind: Kind = kind
        self.limit = limit
        self._begin(wall, ZERO)

    def _begin(self, wall: float, held: Decimal) -> None:
        self.start, self.end = span(self.kind, wall)
        self.settled = self.assumed = self.recorded = self.others = self.before = ZERO
        self.unknown = 0
        self.warned = False
        self.base = held
        """What was spent and held here when the others were last heard of."""

    def start_period(self, wall: float, held: Decimal) -> None:
        """Starts anew where another period has begun. A clock that is set back changes nothing."""
        if wall >= self.end:
            self._begin(wall, held)

    @property
    def own(self) -> Decimal:
        """What this process has spent."""
        return EXACT.add(self.settled, self.assumed)

    @property
    def spent(self) -> Decimal:
        return EXACT.add(self.own, self.others)


class Account:
    """The budgets of one client, or of the whole proxy (name: ''). For one event loop: it takes no lock."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.pots: dict[Kind, BudgetPeriod] = {}
        self.held = ZERO
        self.others_held = ZERO
        """What other processes hold, as they last said; `peers`: how many spend from here, this one too."""
        self.peers = 1

    def change(self, limits: Mapping[Kind, Decimal], wall: float) -> None:
        """Other limits; what was spent stays."""
        for kind in [kind for kind in self.pots if kind not in limits]:
            del self.pots[kind]
        for kind, limit in limits.items():
            if kind not in self.pots:
                self.pots[kind] = BudgetPeriod(kind, limit, wall)
            elif self.pots[kind].limit != limit:
                self.pots[kind].limit, self.pots[kind].warned = limit, False

    def at(self, wall: float) -> Sequence[BudgetPeriod]:
        """Its pots as they are now."""
        for pot in self.pots.values():
            pot.start_period(wall, self.held)
        return tuple(self.pots.values())

    def short(self, amount: Decimal, wall: float, alone: bool = False) -> BudgetPeriod | None:
        """The pot that has no room for another `amount`; of several the one that is full for longest; None: it fits.

        alone: the others cannot be heard, so each keeps to an equal share of what was left when they last were.
        """
        full = [pot for pot in self.at(wall) if not self._fits(pot, amount, alone)]
        return max(full, key=lambda pot: pot.end, default=None)

    def _fits(self, pot: BudgetPeriod, amount: Decimal, alone: bool) -> bool:
        mine = _sum(pot.own, self.held)
        if alone and self.peers > 1:
            left = EXACT.subtract(pot.limit, _sum(pot.base, pot.others, self.others_held))
            grown = EXACT.multiply(EXACT.subtract(mine, pot.base), Decimal(self.peers))
            return grown < left and _sum(grown, EXACT.multiply(amount, Decimal(self.peers))) <= left
        taken = _sum(mine, pot.others, self.others_held)
        return taken < pot.limit and _sum(taken, amount) <= pot.limit

    def reserve(self, amount: Decimal) -> None:
        self.held = EXACT.add(self.held, amount)

    def release(self, amount: Decimal) -> None:
        self.held = EXACT.subtract(self.held, amount)

    def spend(self, cost: Decimal | None, estimate: Decimal, wall: float) -> None:
        """A request has cost this; None: nobody knows, and the estimate counts."""
        for pot in self.at(wall):
            if cost is None:
                pot.unknown += 1
                pot.assumed = EXACT.add(pot.assumed, estimate)
            else:
                pot.settled = EXACT.add(pot.settled, cost)

    def record(self, cost: Decimal, at: float, wall: float) -> None:
        """A receipt of a request that ended `at` (Unix seconds)."""
        for pot in self.at(wall):
            if at >= pot.start:
                pot.recorded = EXACT.add(pot.recorded, cost)

    def read(self, kind: Kind, start: float, total: Decimal, wall: float) -> None:
        """What the ledger says of all processes since `start`. It may lag behind us, so others' part only grows."""
        for pot in self.at(wall):
            if pot.kind == kind and pot.start == start:
                pot.before = EXACT.subtract(total, pot.recorded)
                pot.others = max(pot.others, pot.before)

    def apply_shared(
        self, others: Mapping[tuple[Kind, float], Decimal], held: Decimal, peers: int, wall: float
    ) -> None:
        """What other processes have spent, by period (kind, begin), and hold; peers: how many there are with us."""
        self.others_held, self.peers = held, max(peers, 1)
        for pot in self.at(wall):
            pot.others = max(pot.others, others.get((pot.kind, pot.start), ZERO))
            pot.base = EXACT.add(pot.own, self.held)

    def crossed(self, share: Decimal, wall: float) -> Sequence[BudgetPeriod]:
        """Pots of which at least this share has been spent, each once a period."""
        new = [p for p in self.at(wall) if not p.warned and p.limit and p.spent >= EXACT.multiply(p.limit, share)]
        for pot in new:
            pot.warned = True
        return new

    def report(self, wall: float) -> dict[str, dict[str, Any]]:
        """For `GET /_proxy/status`: by period."""
        return {
            pot.kind: {
                "limit_usd": usd(pot.limit),
                "spent_usd": usd(pot.spent),
                "held_usd": usd(EXACT.add(self.held, self.others_held)),
                "assumed_usd": usd(pot.assumed),
                "unknown": pot.unknown,
                "warned": pot.warned,
                "resets_at": stamp(pot.end),
            }
            for pot in self.at(wall)
        }


class BudgetReservation:
    """What one request holds of the budgets that it counts in; ended once, later calls do nothing.

    estimate: USD, 0 where the model has no price; changed: called after every change, must not raise; held: whether the
    accounts hold it already.
    """

    __slots__ = ("_accounts", "_changed", "_estimate", "_open")

    def __init__(
        self, accounts: Sequence[Account], estimate: Decimal, changed: Callable[[], None], held: bool = False
    ) -> None:
        self._accounts = accounts
        self._estimate = estimate
        self._changed = changed
        self._open = True
        for account in () if held else accounts:
            account.reserve(estimate)

    def settle(self, cost: Decimal | None, wall: float) -> None:
        """An answer came. cost: None where it is not known: then the estimate counts."""
        if self._open:
            for account in self._accounts:
                account.spend(cost, self._estimate, wall)
            self.cancel()

    def assume(self, wall: float) -> None:
        """An attempt may be charged for, though no answer came of it: it counts, and the request may go on."""
        if self._open:
            for account in self._accounts:
                account.spend(None, self._estimate, wall)
            self._changed()

    def cancel(self) -> None:
        """Nothing more of it will be charged."""
        if self._open:
            self._open = False
            for account in self._accounts:
                account.release(self._estimate)
            self._changed()


def budget_exceeded(account: Account, pot: BudgetPeriod, amount: Decimal, wall: float, cache_only: bool) -> ProxyError:
    """What is told to a request that the pot has no room for."""
    whose = f"client {account.name}" if account.name else "this proxy"
    begun = EXACT.add(pot.spent, amount) <= pot.limit and pot.spent < pot.limit  # only what is under way is in the way
    seconds = IN_FLIGHT if begun else max(pot.end - wall, 1.0)
    might = f" and this request might cost {usd(amount)}" if amount else ""
    held = EXACT.add(account.held, account.others_held)
    message = (
        f"the budget of {whose} for this {pot.kind} (UTC) leaves no room: {usd(pot.spent)} of {usd(pot.limit)} USD are "
        f"spent, {usd(held)} held by requests under way{might}; it resets at {stamp(pot.end)}"
    )
    if amount > pot.limit:
        message += ", but this request alone might cost more than the whole budget"
    message += (
        "; only stored answers are given until then (cost.budget.on_exceeded: cache_only), and there is none for this"
        if cache_only
        else "; stored answers are still given"
    )
    return ProxyError("budget_exceeded", message, retry_after=seconds)


def stamp(wall: float) -> str:
    """Unix seconds as people read them."""
    return datetime.fromtimestamp(wall, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
