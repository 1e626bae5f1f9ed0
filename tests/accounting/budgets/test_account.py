"""Budgets: days and months in UTC, what has room, and the promise that only wrong estimates overspend."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.accounting.budgets.account import Account, BudgetReservation, Kind, budget_exceeded, span, stamp

D = Decimal


def at(year: int, month: int, day: int, hour: int = 0, minute: int = 0, second: int = 0) -> float:
    return datetime(year, month, day, hour, minute, second, tzinfo=UTC).timestamp()


NOON = at(2026, 11, 21, 12)
MIDNIGHT = at(2026, 11, 22)


def account(day: str | None = "1", month: str | None = None, name: str = "") -> Account:
    made = Account(name)
    limits: dict[Kind, Decimal] = {}
    if day is not None:
        limits["day"] = D(day)
    if month is not None:
        limits["month"] = D(month)
    made.change(limits, NOON)
    return made


def stake(amount: str, *accounts: Account) -> BudgetReservation:
    return BudgetReservation(accounts, D(amount), lambda: None)


def spent(one: Account, wall: float = NOON) -> Mapping[str, str]:
    return {pot.kind: str(pot.spent) for pot in one.at(wall)}


@pytest.mark.parametrize(
    ("kind", "wall", "begin", "end"),
    [
        ("day", NOON, at(2026, 11, 21), MIDNIGHT),
        ("day", MIDNIGHT - 0.001, at(2026, 11, 21), MIDNIGHT),
        ("day", MIDNIGHT, MIDNIGHT, at(2026, 11, 23)),
        ("month", NOON, at(2026, 11, 1), at(2026, 12, 1)),
        ("month", at(2026, 12, 1) - 0.001, at(2026, 11, 1), at(2026, 12, 1)),
        ("month", at(2026, 12, 31, 23), at(2026, 12, 1), at(2027, 1, 1)),
        ("month", at(2028, 2, 29), at(2028, 2, 1), at(2028, 3, 1)),
    ],
)
def test_days_and_months_are_those_of_utc(kind: Kind, wall: float, begin: float, end: float) -> None:
    assert span(kind, wall) == (begin, end)


@pytest.mark.parametrize(
    ("settled", "held", "others", "amount", "fits"),
    [
        ("0", "0", "0", "1", True),
        ("0", "0", "0", "1.000000000001", False),
        ("0.5", "0.2", "0.2", "0.1", True),
        ("0.5", "0.2", "0.2", "0.100000000000000001", False),
        ("0.999999999999999999999999", "0", "0", "0.000000000000000000000001", True),
        ("1", "0", "0", "0", False),
        ("0", "1", "0", "0", False),
        ("0", "0", "1", "0", False),
        ("0.9", "0", "0", "0", True),
        ("2", "0", "0", "0", False),
    ],
)
def test_amounts_that_fit(settled: str, held: str, others: str, amount: str, fits: bool) -> None:
    one = account()
    stake("0", one).settle(D(settled), NOON)
    one.read("day", at(2026, 11, 21), D(others), NOON)
    stake(held, one)
    assert (one.short(D(amount), NOON) is None) is fits


def test_nothing_fits_into_a_budget_of_0() -> None:
    assert account("0").short(D(0), NOON) is not None


def test_of_two_exceeded_periods_the_longer_one_is_named() -> None:
    one = account("1", "1")
    stake("1", one).settle(D(1), NOON)
    pot = one.short(D("0.1"), NOON)
    assert pot is not None
    refusal = budget_exceeded(one, pot, D("0.1"), NOON, cache_only=False)
    assert (refusal.status, refusal.code, refusal.should_retry) == (429, "budget_exceeded", False)
    assert refusal.retry_after == at(2026, 12, 1) - NOON
    assert "2026-12-01T00:00:00Z" in refusal.message
    assert "1.000000 of 1.000000 USD" in refusal.message
    assert "stored answers are still given" in refusal.message


def test_the_exceeded_budget_is_named() -> None:
    one = account("1", name="anna")
    held = stake("0.8", one)
    pot = one.short(D("0.5"), NOON)
    assert pot is not None
    refusal = budget_exceeded(one, pot, D("0.5"), NOON, cache_only=True)
    assert refusal.retry_after == 1.0  # only what is under way is in the way
    assert "client anna" in refusal.message
    assert "0.800000 held" in refusal.message
    assert "cache_only" in refusal.message
    held.cancel()
    assert "this request alone" in budget_exceeded(one, pot, D("1.5"), NOON, cache_only=False).message


def test_a_reservation_ends_once() -> None:
    one, other = account(), account("5", "9", "anna")
    result: list[None] = []
    mine = BudgetReservation((one, other), D("0.3"), lambda: result.append(None))
    assert (one.held, other.held) == (D("0.3"), D("0.3"))
    mine.settle(D("0.25"), NOON)
    mine.settle(D(7), NOON)
    mine.assume(NOON)
    mine.cancel()
    assert (one.held, spent(one), spent(other)) == (D(0), {"day": "0.25"}, {"day": "0.25", "month": "0.25"})
    assert len(result) == 1


def test_an_unknown_cost_counts_with_its_estimate() -> None:
    one = account()
    mine = stake("0.3", one)
    mine.assume(NOON)  # an attempt that timed out, and the request goes on
    assert (spent(one), one.held) == ({"day": "0.3"}, D("0.3"))
    mine.settle(None, NOON)
    (pot,) = one.at(NOON)
    assert (str(pot.assumed), str(pot.settled), pot.unknown, one.held) == ("0.6", "0", 2, D(0))


def test_at_midnight_spending_resets_and_reservations_stay() -> None:
    one = account("1", "10")
    stake("0", one).settle(D("0.9"), NOON)
    late = stake("0.1", one)
    assert one.short(D("0.1"), MIDNIGHT - 1) is not None
    assert one.short(D("0.9"), MIDNIGHT) is None
    assert one.short(D("0.95"), MIDNIGHT) is not None  # the late one will count in the new day
    late.settle(D("0.2"), MIDNIGHT + 1)
    assert spent(one, MIDNIGHT + 1) == {"day": "0.2", "month": "1.1"}
    assert spent(one, NOON) == {"day": "0.2", "month": "1.1"}  # a clock that is set back changes nothing


def test_spending_of_other_processes_comes_from_the_ledger() -> None:
    one, today = account(), at(2026, 11, 21)
    one.read("day", today, D("0.4"), NOON)
    assert spent(one) == {"day": "0.4"}
    stake("0", one).settle(D("0.1"), NOON)
    one.record(D("0.1"), NOON, NOON)
    one.read("day", today, D("0.4"), NOON)  # ours is not in it yet
    assert spent(one) == {"day": "0.5"}
    one.read("day", today, D("0.7"), NOON)  # now it is, and another's 0.2
    assert spent(one) == {"day": "0.7"}
    one.read("day", at(2026, 11, 20), D(99), NOON)  # asked before midnight, told after
    assert spent(one) == {"day": "0.7"}
    one.record(D("0.1"), today - 1, NOON)
    assert one.at(NOON)[0].recorded == D("0.1")


def test_without_redis_each_process_keeps_an_equal_share() -> None:
    one, today = account("10"), at(2026, 11, 21)
    stake("0", one).settle(D(1), NOON)
    one.apply_shared({("day", today): D(2)}, D(1), 3, NOON)  # 6 are left, for three
    assert one.short(D(2), NOON, alone=True) is None
    assert one.short(D("2.01"), NOON, alone=True) is not None
    assert one.short(D(6), NOON) is None
    mine = stake("1.5", one)
    assert one.short(D("0.5"), NOON, alone=True) is None
    mine.settle(D(2), NOON)
    assert one.short(D(0), NOON, alone=True) is not None
    assert one.short(D(3), MIDNIGHT, alone=True) is None  # a third of the new day's, less what others hold
    assert one.short(D("3.01"), MIDNIGHT, alone=True) is not None
    one.apply_shared({("day", at(2026, 11, 22)): D(1)}, D(0), 1, MIDNIGHT)
    assert one.short(D(9), MIDNIGHT, alone=True) is None


def test_an_exceeded_budget_is_logged_once_a_period() -> None:
    one = account("1", "3")
    share = D("0.8")
    stake("0", one).settle(D("0.79"), NOON)
    assert one.crossed(share, NOON) == []
    stake("0", one).settle(D("0.01"), NOON)
    assert [pot.kind for pot in one.crossed(share, NOON)] == ["day"]
    assert one.crossed(share, NOON) == []
    stake("0", one).settle(D("1.6"), MIDNIGHT)
    assert [pot.kind for pot in one.crossed(share, MIDNIGHT)] == ["day", "month"]
    one.change({"month": D(100)}, MIDNIGHT)
    assert one.crossed(share, MIDNIGHT) == []
    stake("0", one).settle(D(90), MIDNIGHT)
    assert [pot.kind for pot in one.crossed(share, MIDNIGHT)] == ["month"]


def test_changed_limits_keep_the_spending() -> None:
    one = account("1")
    stake("0", one).settle(D("0.5"), NOON)
    one.change({"day": D("0.4"), "month": D(5)}, NOON)
    assert spent(one) == {"day": "0.5", "month": "0"}
    assert one.short(D(0), NOON) is not None


def test_the_report() -> None:
    one = account("1")
    stake("0.25", one)
    stake("0", one).settle(None, NOON)
    assert one.report(NOON) == {
        "day": {
            "limit_usd": "1.000000",
            "spent_usd": "0.000000",
            "held_usd": "0.250000",
            "assumed_usd": "0.000000",
            "unknown": 1,
            "warned": False,
            "resets_at": stamp(MIDNIGHT),
        }
    }


AMOUNTS = st.integers(0, 10**12).map(lambda pico: D(pico).scaleb(-12))


@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("ask"), AMOUNTS, AMOUNTS),
            st.tuples(st.just("settle"), st.integers(0, 9), st.just(0)),
            st.tuples(st.just("fail"), st.integers(0, 9), st.just(0)),
            st.tuples(st.just("cancel"), st.integers(0, 9), st.just(0)),
            st.tuples(st.just("wait"), st.floats(1, 90_000), st.just(0)),
        ),
        max_size=60,
    )
)
def test_a_budget_is_exceeded_only_by_underestimates(moves: list[tuple[str, object, object]]) -> None:
    """A turned clock, costs that have nothing to do with their estimates: no period ever holds more than its limit and
    what estimates of requests that ended in it were short of; and in the end nothing is held.
    """
    limits: dict[Kind, Decimal] = {"day": D(2), "month": D(5)}
    one, wall = Account(""), at(2026, 12, 28)
    one.change(limits, wall)
    flying: list[tuple[BudgetReservation, Decimal, Decimal]] = []
    reference: dict[tuple[Kind, float], list[Decimal]] = {}
    for move, first, second in moves:
        if move == "ask":
            assert isinstance(first, Decimal)
            assert isinstance(second, Decimal)
            if one.short(first, wall) is None:
                flying.append((stake(str(first), one), first, second))
        elif move == "wait":
            assert isinstance(first, float)
            wall += first
        elif flying:
            assert isinstance(first, int)
            mine, estimate, cost = flying.pop(first % len(flying))
            if move == "cancel":
                mine.cancel()
                continue
            mine.settle(cost if move == "settle" else None, wall)
            counts = cost if move == "settle" else estimate
            for kind in limits:
                sums = reference.setdefault((kind, span(kind, wall)[0]), [D(0), D(0)])
                sums[0] += counts
                sums[1] += max(counts - estimate, D(0))
        for pot in one.at(wall):
            total, short_by = reference.get((pot.kind, pot.start), [D(0), D(0)])
            assert pot.spent == total
            assert total <= pot.limit + short_by
            assert total + one.held <= pot.limit + short_by
    for mine, _, _ in flying:
        mine.cancel()
    assert one.held == 0
