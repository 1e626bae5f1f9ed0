"""Numbers, costs and bounds of named runs (docs/runs.md)."""

from __future__ import annotations

import hashlib
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.accounting.runs import run as runs
from proxy.accounting.runs.run import NOTHING, Run, Runs, RunShare, RunTotals, as_json, joined, rounded_up

WALL = 1_800_000_000.0


def run(name: str = "r", owner: str = "o", id_: str = "p1") -> Run:
    return Run(id_, owner, "anna", name, WALL)


def key(text: object = "k") -> str:
    return hashlib.sha256(str(text).encode()).hexdigest()


A, B = key("a"), key("b")


# Numbers.


def test_identical_requests_are_numbered_as_they_arrive() -> None:
    one = run()
    assert [one.number(A, False) for _ in range(3)] == [0, 1, 2]
    assert [one.number(B, False), one.number(A, False), one.number(B, False)] == [0, 3, 1]
    assert one.keys == 2
    assert run().number(A, False) == 0


def test_a_retry_keeps_its_number() -> None:
    one = run()
    assert one.number(A, False) == 0
    one.ended(A, 0, delivered=False)
    assert one.number(A, True) == 0
    one.ended(A, 0, delivered=True)
    assert one.number(A, False) == 1


def test_a_retry_leaves_numbers_under_way_to_their_callers() -> None:
    one = run()
    for _ in range(4):
        one.number(A, False)
    one.ended(A, 1, delivered=True)
    one.ended(A, 3, delivered=False)
    one.ended(A, 2, delivered=False)
    assert [one.number(A, True) for _ in range(3)] == [2, 3, 0]  # the last: we have not seen its client leave yet
    for number in range(4):
        one.ended(A, number, delivered=True)
    assert one.number(A, True) == 4  # nothing is undelivered: the lowest number not delivered is a new one


def test_a_number_ended_late_stays_delivered() -> None:
    one = run()
    one.number(A, False)
    one.number(A, True)
    one.ended(A, 0, delivered=True)
    one.ended(A, 0, delivered=False)
    assert one.number(A, True) == 1


def test_numbers_given_elsewhere_are_not_given_again() -> None:
    one = run()
    assert one.took(A, 6) == 6
    assert one.count(A) == 7
    assert one.took(A, 2) == 2
    assert one.number(A, False) == 7


@given(st.lists(st.tuples(st.sampled_from("ab"), st.sampled_from(["ask", "retry", "good", "bad"]), st.integers(0, 5))))
def test_no_two_open_fresh_requests_share_a_number_and_none_is_skipped(
    steps: list[tuple[str, str, int]],
) -> None:
    one = run()
    given_: dict[str, int] = {"a": 0, "b": 0}
    open_: dict[str, dict[int, bool]] = {"a": {}, "b": {}}
    for text, what, number in steps:
        mine = open_[text]
        if what == "ask":
            got = one.number(key(text), False)
            assert got == given_[text]
            given_[text] += 1
            mine[got] = False
        elif what == "retry":
            got = one.number(key(text), True)
            ended = [n for n, over in mine.items() if over]
            assert got == min(ended or mine or [given_[text]])
            given_[text] = max(given_[text], got + 1)
            mine[got] = False
        else:
            one.ended(key(text), number, what == "good")
            if what == "good":
                mine.pop(number, None)
            elif number in mine:
                mine[number] = True


# Bounds.


def test_the_least_recently_used_request_is_forgotten_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "MAX_KEYS", 2)
    one = run()
    for text in ("a", "b", "a", "c"):
        one.number(key(text), False)
    assert (one.keys, one.forgotten) == (2, 1)
    assert [one.number(key(text), False) for text in ("a", "b")] == [2, 0]


def test_undelivered_numbers_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "MAX_OPEN", 2)
    one = run()
    for _ in range(3):
        one.number(A, False)
    assert one.number(A, True) == 1


def test_the_least_recently_used_run_is_forgotten_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "MAX_RUNS", 2)
    book = Runs()
    for name in ("one", "two"):
        book.begin("o", run(name))
    assert book.get("o", "one") is not None
    book.begin("o", run("three"))
    assert [book.get("o", name) is not None for name in ("one", "two", "three")] == [True, False, True]
    assert book.get("somebody else", "one") is None
    assert len(book) == 2


def test_all_runs_together_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "MAX_KEYS_IN_ALL", 3)
    monkeypatch.setattr(runs, "_TRIM_EVERY", 1)
    book = Runs()
    for name in ("one", "two"):
        mine = run(name)
        book.begin("o", mine)
        for text in "ab":
            mine.number(key(text), False)
            book.numbered()
    assert [bool(book.named(name)) for name in ("one", "two")] == [False, True]
    for text in "cdef":  # the last one stays, whatever it holds
        mine.number(key(text), False)
        book.numbered()
    assert len(book) == 1


# Money.


AMOUNTS = st.decimals(0, 1000, places=18)


@given(st.lists(AMOUNTS, max_size=30))
def test_sums_are_exact(amounts: list[Decimal]) -> None:
    one = run()
    for amount in amounts:
        one.add(RunTotals(requests=1, cost=amount, saved=amount), WALL)
    nano = sum(int(amount.scaleb(18)) for amount in amounts)
    assert int(one.cost.scaleb(18)) == int(one.saved.scaleb(18)) == nano
    assert one.sums.requests == len(amounts)


@given(st.lists(st.tuples(AMOUNTS, st.booleans()), max_size=40), st.decimals(0, 3000, places=6))
def test_costs_within_their_estimates_never_exceed_max_cost(steps: list[tuple[Decimal, bool]], limit: Decimal) -> None:
    """Requests under way count with their estimates, so that no order of arrivals and ends takes a run beyond."""
    one = run()
    under_way: list[Decimal] = []
    for amount, ends in steps:
        amount = min(amount, limit)  # the first may try whatever it may cost
        if one.room_for(amount, limit):
            one.reserve(amount)
            under_way.append(amount)
        if ends and under_way:
            estimate = under_way.pop(0)
            one.release(estimate)
            one.add(RunTotals(requests=1, cost=estimate), WALL)
        assert one.committed <= limit
    for estimate in under_way:
        one.release(estimate)
    assert not one.held


@pytest.mark.parametrize(
    ("spent", "held", "others", "amount", "limit", "fits"),
    [
        ("0", "0", "0", "1", "1", True),
        ("0", "0", "0", "1.000001", "1", True),  # the first may try
        ("0", "0", "0.000001", "1", "1", False),
        ("0", "0", "0", "0", "0", False),  # nothing may be bought, not even what seems to be free
        ("0.9", "0", "0", "0", "1", True),
        ("1", "0", "0", "0", "1", False),
        ("0.5", "0.3", "0.1", "0.1", "1", True),
        ("0.5", "0.3", "0.2", "0.1", "1", False),
    ],
)
def test_the_remaining_amount(spent: str, held: str, others: str, amount: str, limit: str, fits: bool) -> None:
    one = run()
    one.add(RunTotals(cost=Decimal(spent)), WALL)
    one.reserve(Decimal(held))
    one.apply_shared([RunShare(1, RunTotals(cost=Decimal(others)))], WALL)
    assert one.room_for(Decimal(amount), Decimal(limit)) is fits


def test_reservations_of_live_processes_count() -> None:
    one = run()
    share = RunShare(1, RunTotals(cost=Decimal(1), assumed=Decimal(2), saved=Decimal(7)), Decimal(3), until=WALL + 10)
    one.apply_shared([share], WALL)
    assert (one.others, one.cost, one.saved) == (Decimal(6), Decimal(1), Decimal(7))
    one.apply_shared([share], WALL + 10)
    assert one.others == 3


def test_assumed_costs_count_only_against_the_limit() -> None:
    one = run()
    one.add(RunTotals(assumed=Decimal(2)), WALL)
    assert (one.cost, one.committed) == (Decimal(0), Decimal(2))


@pytest.mark.parametrize(
    ("amount", "units"), [("0", 0), ("0.000000001", 1), ("0.0000000001", 1), ("1.5", 1_500_000_000)]
)
def test_amounts_are_rounded_up(amount: str, units: int) -> None:
    assert rounded_up(Decimal(amount), 9) == units


# What is told.


def test_a_run_as_json() -> None:
    one = run()
    one.max_cost = Decimal("2.5")
    one.add(RunTotals(1, 0, 1, 0, 0, 100, 200, Decimal("0.00225")), WALL, "gpt-4o")
    one.add(RunTotals(1, 1, saved=Decimal("0.00225")), WALL + 1, "gpt-4o")
    assert as_json(one.share(WALL), 1) == {
        "requests": 2,
        "hits": 1,
        "misses": 1,
        "errors": 0,
        "unpriced": 0,
        "distinct_keys": 1,
        "cost_usd": "0.002250",
        "saved_usd": "0.002250",
        "max_cost": "2.500000",
        "prompt_tokens": 100,
        "completion_tokens": 200,
        "total_tokens": 300,
        "first_at": WALL,
        "last_at": WALL + 1,
        "models": ["gpt-4o"],
    }
    assert one.completion_mean == 200


def test_model_names_are_bounded() -> None:
    one = run()
    for number in range(100):
        one.add(NOTHING, WALL, f"m{number}")
    assert len(one.share(WALL).models) == runs.MAX_MODELS


def test_shares_are_joined() -> None:
    one = RunShare(1, RunTotals(requests=2, cost=Decimal(1)), first=5, last=9, max_cost=Decimal(3), models=("a", "b"))
    two = RunShare(4, RunTotals(requests=1, cost=Decimal(2)), first=4, last=8, max_cost=Decimal(4), models=("b", "c"))
    both = joined([one, two])
    assert (both.sums.requests, both.sums.cost, both.first, both.last) == (3, Decimal(3), 4.0, 9.0)
    assert (both.max_cost, both.models) == (Decimal(3), ("a", "b", "c"))
    assert joined([one]) is one


def test_each_share_is_newer_than_the_one_before() -> None:
    one = run()
    assert [one.share(WALL).seq for _ in range(3)] == [1, 2, 3]
