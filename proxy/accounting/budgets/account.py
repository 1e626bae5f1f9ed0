"""Budgets for a day and a month, of the whole proxy and of each client: reserve an estimate, settle the cost.

Days and months are calendar days and months in UTC. A request reserves its estimate until its cost is known, also
across midnight; its cost counts in the day in which it is settled. A request is admitted only if what is spent, what is
reserved and its own estimate stay within the limit, so a budget can be exceeded only by as much as requests in flight
were underestimated. A request that was sent and whose cost stays unknown counts with its estimate (`assumed`), which is
0 for a model without a price.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from decimal import Context, Decimal
from typing import Any, Final, Literal

from ...cost.pricing import usd
from ...protocol.errors import ProxyError

Kind = Literal["day", "month"]

EXACT: Final = Context(prec=60)  # as in `cost/pricing.py`: nothing is ever rounded
ZERO: Final = Decimal(0)

IN_FLIGHT: Final = 1.0
"""`Retry-After`, in seconds, if only requests in flight leave no room: they end soon."""

_DAY: Final = 86400.0


def span(kind: Kind, wall: float) -> tuple[float, float]:
    """Return begin and end of the UTC day or month that contains `wall`. All are Unix seconds."""
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
    """One budget in one day or month. Amounts are in USD.

    settled: known costs of this process's requests.
    assumed: estimates of this process's requests whose cost is unknown.
    recorded: what this process's receipts add up to; the ledger contains it too.
    others: what other processes, and this one before its start, have spent, as far as known.
    before: the same, as the ledger said it last.
    unknown: the number of responses without a known cost.
    """

    def __init__(self, kind: Kind, limit: Decimal, wall: float) -> None:
        self.kind: Kind = kind
        self.limit = limit
        self._begin(wall, ZERO)

    def _begin(self, wall: float, held: Decimal) -> None:
        self.start, self.end = span(self.kind, wall)
        self.settled = self.assumed = self.recorded = self.others = self.before = ZERO
        self.unknown = 0
        self.warned = self.reached = False
        self.base = held
        """What was spent and reserved here when the other processes were last heard of."""

    def start_period(self, wall: float, held: Decimal) -> None:
        """Begin the next period if it has come. A clock that is set back changes nothing."""
        if wall >= self.end:
            self._begin(wall, held)

    @property
    def own(self) -> Decimal:
        """Return what this process has spent."""
        return EXACT.add(self.settled, self.assumed)

    @property
    def spent(self) -> Decimal:
        return EXACT.add(self.own, self.others)


class Account:
    """The budgets of one client, or of the whole proxy (name: ''). It takes no lock: use it on one event loop."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.periods: dict[Kind, BudgetPeriod] = {}
        self.held = ZERO
        self.others_held = ZERO
        """What other processes have reserved, as they last said."""
        self.peers = 1
        """How many processes share the budgets, this one included."""

    def change(self, limits: Mapping[Kind, Decimal], wall: float) -> None:
        """Set other limits; what was spent stays."""
        for kind in [kind for kind in self.periods if kind not in limits]:
            del self.periods[kind]
        for kind, limit in limits.items():
            if kind not in self.periods:
                self.periods[kind] = BudgetPeriod(kind, limit, wall)
            elif self.periods[kind].limit != limit:
                self.periods[kind].limit = limit
                self.periods[kind].warned = self.periods[kind].reached = False

    def at(self, wall: float) -> Sequence[BudgetPeriod]:
        """Return the budgets in their current periods. wall: Unix seconds, as in all methods."""
        for period in self.periods.values():
            period.start_period(wall, self.held)
        return tuple(self.periods.values())

    def short(self, amount: Decimal, wall: float, alone: bool = False) -> BudgetPeriod | None:
        """Return the budget that has no room for another `amount`: of several, the one that ends last. None: it fits.

        alone: other processes cannot be reached, so each keeps to an equal share of what was last known to be left.
        """
        full = [period for period in self.at(wall) if not self._fits(period, amount, alone)]
        return max(full, key=lambda period: period.end, default=None)

    def _fits(self, period: BudgetPeriod, amount: Decimal, alone: bool) -> bool:
        mine = _sum(period.own, self.held)
        if alone and self.peers > 1:
            left = EXACT.subtract(period.limit, _sum(period.base, period.others, self.others_held))
            grown = EXACT.multiply(EXACT.subtract(mine, period.base), Decimal(self.peers))
            return grown < left and _sum(grown, EXACT.multiply(amount, Decimal(self.peers))) <= left
        taken = _sum(mine, period.others, self.others_held)
        return taken < period.limit and _sum(taken, amount) <= period.limit

    def reserve(self, amount: Decimal) -> None:
        self.held = EXACT.add(self.held, amount)

    def release(self, amount: Decimal) -> None:
        self.held = EXACT.subtract(self.held, amount)

    def spend(self, cost: Decimal | None, estimate: Decimal, wall: float) -> None:
        """Add a request's cost; None: it is unknown, and the estimate counts."""
        for period in self.at(wall):
            if cost is None:
                period.unknown += 1
                period.assumed = EXACT.add(period.assumed, estimate)
            else:
                period.settled = EXACT.add(period.settled, cost)

    def record(self, cost: Decimal, at: float, wall: float) -> None:
        """Take note of the receipt of a request that ended `at` (Unix seconds)."""
        for period in self.at(wall):
            if at >= period.start:
                period.recorded = EXACT.add(period.recorded, cost)

    def read(self, kind: Kind, start: float, total: Decimal, wall: float) -> None:
        """Take over what the ledger says of all processes since `start`.

        The ledger may lag behind this process, so the others' part only grows.
        """
        for period in self.at(wall):
            if period.kind == kind and period.start == start:
                period.before = EXACT.subtract(total, period.recorded)
                period.others = max(period.others, period.before)

    def apply_shared(
        self, others: Mapping[tuple[Kind, float], Decimal], held: Decimal, peers: int, wall: float
    ) -> None:
        """Take over what other processes have spent, by period (kind, begin), and what they have reserved.

        peers: how many processes there are, this one included.
        """
        self.others_held, self.peers = held, max(peers, 1)
        for period in self.at(wall):
            period.others = max(period.others, others.get((period.kind, period.start), ZERO))
            period.base = EXACT.add(period.own, self.held)

    def crossed(self, share: Decimal, wall: float) -> Sequence[BudgetPeriod]:
        """Return the budgets of which at least this share has been spent, each of them once a period."""
        new = [p for p in self.at(wall) if not p.warned and p.limit and p.spent >= EXACT.multiply(p.limit, share)]
        for period in new:
            period.warned = True
        return new

    def used_up(self, wall: float) -> Sequence[BudgetPeriod]:
        """Return the budgets of which nothing is left, each of them once a period."""
        new = [period for period in self.at(wall) if not period.reached and period.spent >= period.limit]
        for period in new:
            period.reached = True
        return new

    def report(self, wall: float) -> dict[str, dict[str, Any]]:
        """Return the budgets by kind, for `GET /_proxy/status`."""
        return {
            period.kind: {
                "limit_usd": usd(period.limit),
                "spent_usd": usd(period.spent),
                "held_usd": usd(EXACT.add(self.held, self.others_held)),
                "assumed_usd": usd(period.assumed),
                "unknown": period.unknown,
                "warned": period.warned,
                "resets_at": stamp(period.end),
            }
            for period in self.at(wall)
        }


class BudgetReservation:
    """What one request has reserved in the budgets that count it. It ends once; later calls do nothing.

    estimate: USD; 0 if the model has no price.
    changed: called after every change; it must not raise.
    held: the accounts have reserved the estimate already.
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
        """End it after a response. cost: USD; None if unknown: then the estimate counts."""
        if self._open:
            for account in self._accounts:
                account.spend(cost, self._estimate, wall)
            self.cancel()

    def assume(self, wall: float) -> None:
        """Count an attempt that may be charged although it brought no response; the request may go on."""
        if self._open:
            for account in self._accounts:
                account.spend(None, self._estimate, wall)
            self._changed()

    def cancel(self) -> None:
        """End it: nothing more will be charged."""
        if self._open:
            self._open = False
            for account in self._accounts:
                account.release(self._estimate)
            self._changed()


def budget_exceeded(
    account: Account, period: BudgetPeriod, amount: Decimal, wall: float, cache_only: bool
) -> ProxyError:
    """Return the error for a request of `amount` that the budget has no room for."""
    whose = f"client {account.name}" if account.name else "this proxy"
    fits = EXACT.add(period.spent, amount) <= period.limit and period.spent < period.limit  # but for requests in flight
    seconds = IN_FLIGHT if fits else max(period.end - wall, 1.0)
    might = f" and this request might cost {usd(amount)}" if amount else ""
    held = EXACT.add(account.held, account.others_held)
    message = (
        f"the budget of {whose} for this {period.kind} (UTC) leaves no room: "
        f"{usd(period.spent)} of {usd(period.limit)} USD are spent, "
        f"{usd(held)} held by requests in flight{might}; it resets at {stamp(period.end)}"
    )
    if amount > period.limit:
        message += ", but this request alone might cost more than the whole budget"
    message += (
        "; only stored answers are given until then (cost.budget.on_exceeded: cache_only), and there is none for this"
        if cache_only
        else "; stored answers are still given"
    )
    return ProxyError("budget_exceeded", message, retry_after=seconds)


def stamp(wall: float) -> str:
    """Return Unix seconds as text for people."""
    return datetime.fromtimestamp(wall, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
