"""The windows against a reference that adds up every admitted request, with a turned clock."""

from __future__ import annotations

import copy
import math
import random
from dataclasses import dataclass, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proxy.config.limits import Limits, limits_for
from proxy.upstream.limits.rate_limiter import BUCKETS, MARGIN, ExceedsLimit, RateLimiter, Reservation, Wait

MINUTE, DAY = 60.0, 86_400.0
OF_TOKENS = {"rpm": False, "tpm": True, "rpd": False, "tpd": True}
SECONDS = {"rpm": MINUTE, "tpm": MINUTE, "rpd": DAY, "tpd": DAY}


def taken(rate_limiter: RateLimiter, tokens: int, now: float) -> Reservation:
    answer = rate_limiter.reserve(tokens, now)
    assert isinstance(answer, Reservation), answer
    return answer


def wait(rate_limiter: RateLimiter, tokens: int, now: float) -> float:
    answer = rate_limiter.reserve(tokens, now)
    assert isinstance(answer, Wait), answer
    return answer.seconds


def used(rate_limiter: RateLimiter, name: str, now: float) -> int:
    return rate_limiter.usage(now)[name]["used"]


# --- the reference --------------------------------------------------------------------------------


@dataclass
class Admitted:
    stamp: float
    tokens: int
    reservation: Reservation
    up: bool = True  # False once cancelled
    running: bool = True


class Reference:
    """Every request ever admitted, summed up by brute force."""

    def __init__(self, limits: Limits) -> None:
        self.caps = {name: cap for name in OF_TOKENS if (cap := getattr(limits, name)) is not None}
        self.concurrency = limits.concurrency
        self.admitted: list[Admitted] = []

    def held(self, name: str, now: float, margin: float) -> int:
        """What the half-open window that ends with `now`, `margin` times the usual one, contains."""
        span = SECONDS[name] * margin
        return sum(one.tokens if OF_TOKENS[name] else 1 for one in self.admitted if one.up and one.stamp + span > now)

    def running(self) -> int:
        return sum(one.running for one in self.admitted)

    def keeps_promise(self, now: float) -> bool:
        return all(self.held(name, now, MARGIN) <= cap for name, cap in self.caps.items()) and (
            self.concurrency is None or self.running() <= self.concurrency
        )

    def must_admit(self, tokens: int, now: float) -> bool:
        """Whether there is room even if every amount is held for the margin and a slot longer."""
        return (self.concurrency is None or self.running() < self.concurrency) and all(
            self.held(name, now, MARGIN * (1 + 1.01 / BUCKETS)) + (tokens if OF_TOKENS[name] else 1) <= cap
            for name, cap in self.caps.items()
        )


limit_values = st.builds(
    Limits,
    rpm=st.none() | st.integers(1, 8),
    tpm=st.none() | st.integers(1, 300),
    rpd=st.none() | st.integers(1, 15),
    tpd=st.none() | st.integers(1, 600),
    concurrency=st.none() | st.integers(1, 5),
)
# Gaps around the slot's width, around a minute, around a day.
gaps = st.one_of(
    st.just(0.0),
    st.floats(0, 0.2),
    st.floats(0, 20),
    st.sampled_from([0.0505, 59.9, 60.0, 60.6, 60.7]),
    st.floats(0, 200),
    st.floats(3_000, 90_000),
)
steps = st.one_of(
    st.tuples(st.just("arrive"), gaps, st.integers(0, 120)),
    st.tuples(st.just("burst"), st.integers(1, 10), st.integers(0, 60)),
    st.tuples(st.just("settle"), st.integers(0, 50), st.none() | st.integers(-5, 250)),
    st.tuples(st.just("cancel"), st.integers(0, 50), st.none()),
)


@given(limits=limit_values, script=st.lists(steps, max_size=60), start=st.floats(0, 1e7))
@settings(max_examples=300, deadline=None)
def test_no_window_ever_admits_more_than_the_limit_and_nothing_leaks(
    limits: Limits, script: list[tuple[str, float, int | None]], start: float
) -> None:
    rate_limiter, reference, now = RateLimiter(limits), Reference(limits), start
    for what, number, tokens in script:
        if what in ("arrive", "burst"):
            assert tokens is not None
            now += number if what == "arrive" else 0
            for _ in range(1 if what == "arrive" else int(number)):
                check_arrival(rate_limiter, reference, tokens, now)
        elif reference.admitted:
            one = reference.admitted[int(number) % len(reference.admitted)]
            finish(one, what, tokens)
            finish(one, "cancel", None)  # a second end changes nothing
            finish(one, "settle", 10_000)
        assert 0.0 <= rate_limiter.headroom(now) <= 1.0
    for one in reference.admitted:
        finish(one, "settle", None)
    longest = max([0.0, *(SECONDS[name] for name in reference.caps)])
    now += longest * MARGIN + 1e-6
    assert rate_limiter.idle(now)
    assert rate_limiter.headroom(now) == 1.0
    assert all(level["used"] == 0 for level in rate_limiter.usage(now).values())


def finish(one: Admitted, how: str, tokens: int | None) -> None:
    if how == "settle":
        one.reservation.settle(tokens)
        if one.running and tokens is not None:
            one.tokens = max(tokens, 0)
    else:
        one.reservation.cancel()
        one.up = one.up and not one.running
    one.running = False


def check_arrival(rate_limiter: RateLimiter, reference: Reference, tokens: int, now: float) -> None:
    before = rate_limiter.usage(now)
    too_large = any((tokens if OF_TOKENS[name] else 1) > cap for name, cap in reference.caps.items())
    must = reference.must_admit(tokens, now)
    answer = rate_limiter.reserve(tokens, now)
    assert isinstance(answer, ExceedsLimit) == too_large
    if isinstance(answer, Reservation):
        reference.admitted.append(Admitted(now, tokens, answer))
        assert reference.keeps_promise(now)
        return
    assert rate_limiter.usage(now) == before, "all dimensions or none"
    if isinstance(answer, Wait):
        assert not must
        assert answer.seconds > 0
        if answer.seconds == math.inf:
            assert reference.running() == reference.concurrency
            return
        sooner, later = copy.deepcopy(rate_limiter), copy.deepcopy(rate_limiter)
        assert isinstance(sooner.reserve(tokens, now + answer.seconds * 0.999 - 1e-6), Wait)
        assert isinstance(later.reserve(tokens, now + answer.seconds), Reservation)


# --- how much is usable ---------------------------------------------------------------------------


def flood(limits: Limits, minutes: float, every: float, cost: int, actual: int, latency: float) -> tuple[int, int]:
    """Requests and actual tokens admitted while more is always asked for; each settles after `latency` s."""
    rate_limiter = RateLimiter(limits)
    open_ones: list[tuple[float, Reservation]] = []
    requests, now = 0, 0.0
    while now < minutes * MINUTE:
        while open_ones and open_ones[0][0] <= now:
            open_ones.pop(0)[1].settle(actual)
        answer = rate_limiter.reserve(cost, now)
        if isinstance(answer, Reservation):
            requests += 1
            open_ones.append((now + latency, answer))
        now += every
    return requests, requests * actual


@pytest.mark.parametrize(
    ("limits", "minutes", "every", "cost"),
    [
        (Limits(rpm=100), 10, 0.02, 1),
        (Limits(tpm=20_000), 10, 0.02, 137),
        (Limits(rpm=200, tpm=20_000), 10, 0.02, 100),
        (Limits(rpm=200, tpm=20_000), 10, 0.27, 100),  # arrivals barely above the limit: no bursts
        (Limits(rpd=500), 10 * 1440, 60.0, 1),
        (Limits(rpd=500, tpd=50_000, rpm=10, tpm=50_000), 10 * 1440, 60.0, 100),
    ],
)
def test_nearly_all_of_each_limit_is_usable(limits: Limits, minutes: float, every: float, cost: int) -> None:
    requests, tokens = flood(limits, minutes, every, cost, cost, latency=1.0)
    days = minutes / 1440
    for name, amount, periods in (
        ("rpm", requests, minutes),
        ("tpm", tokens, minutes),
        ("rpd", requests, days),
        ("tpd", tokens, days),
    ):
        limit = getattr(limits, name)
        if limit is not None and not (name.endswith("m") and limits.rpd):
            assert 0.95 * limit * periods <= amount <= limit * periods


@pytest.mark.parametrize("estimate", [10, 100, 1000])
def test_an_estimate_wrong_by_ten_either_way_keeps_the_long_run_rate(estimate: int) -> None:
    # Only what is in flight is counted wrongly, so the answers here are quick against the minute.
    _, tokens = flood(Limits(tpm=60_000), 10, 0.05, estimate, actual=100, latency=0.2)
    assert tokens == pytest.approx(600_000, rel=0.05)


def test_asking_again_when_told_is_never_too_early() -> None:
    rng = random.Random(3)
    for _ in range(3000):
        rate_limiter, now = RateLimiter(Limits(rpm=1)), rng.uniform(0, 1e6)
        taken(rate_limiter, 0, now)
        now += rng.uniform(0, 60)
        taken(rate_limiter, 0, now + wait(rate_limiter, 0, now))


def test_a_shared_bucket_expires_by_its_latest_stamp() -> None:
    rate_limiter = RateLimiter(Limits(rpm=2))
    taken(rate_limiter, 0, 0.0)
    taken(rate_limiter, 0, 0.05)
    assert wait(rate_limiter, 0, 0.05) == pytest.approx(60.6)
    assert wait(rate_limiter, 0, 60.6) == pytest.approx(0.05)


def test_a_burst_of_the_whole_limit_goes_at_once() -> None:
    rate_limiter = RateLimiter(Limits(rpm=500, tpm=50_000))
    for _ in range(500):
        taken(rate_limiter, 100, 7.0)
    assert wait(rate_limiter, 100, 7.0) == pytest.approx(60.6)
    assert rate_limiter.headroom(7.0) == 0.0


def test_a_random_long_run_with_both_limits_fills_the_one_that_binds() -> None:
    rng = random.Random(5)
    rate_limiter, now, requests, tokens = RateLimiter(Limits(rpm=300, tpm=60_000)), 0.0, 0, 0
    cost = 200
    while now < 600:
        answer = rate_limiter.reserve(cost, now)
        if isinstance(answer, Reservation):
            requests, tokens = requests + 1, tokens + cost
            cost = rng.randint(20, 380)
        else:
            assert isinstance(answer, Wait)
            now += answer.seconds
    assert max(requests / 3_000, tokens / 600_000) >= 0.95


# --- single decisions -----------------------------------------------------------------------------


def test_without_limits_everything_goes() -> None:
    rate_limiter = RateLimiter(Limits())
    reservation = taken(rate_limiter, 10**12, 0.0)
    assert reservation.tokens == 10**12
    assert rate_limiter.headroom(0.0) == 1.0
    assert rate_limiter.usage(0.0) == {}
    reservation.settle(5)
    assert rate_limiter.idle(0.0)


def test_a_request_larger_than_a_window_is_told_so_even_while_others_wait() -> None:
    rate_limiter = RateLimiter(Limits(rpm=1, tpm=1000))
    taken(rate_limiter, 10, 0.0)
    answer = rate_limiter.reserve(1001, 0.0)
    assert answer == ExceedsLimit("the request counts as 1001 tokens and tpm allows 1000")
    assert isinstance(rate_limiter.reserve(1000, 0.0), Wait)


@pytest.mark.parametrize("name", ["rpm", "tpm", "rpd", "tpd", "concurrency"])
def test_a_limit_of_zero_admits_nothing(name: str) -> None:
    rate_limiter = RateLimiter(replace(Limits(), **{name: 0}))
    answer = rate_limiter.reserve(1, 0.0)
    assert isinstance(answer, ExceedsLimit)
    assert name in answer.reason
    assert rate_limiter.headroom(0.0) == 0.0


def test_a_negative_estimate_is_none() -> None:
    rate_limiter = RateLimiter(Limits(tpm=10))
    taken(rate_limiter, -50, 0.0)
    assert used(rate_limiter, "tpm", 0.0) == 0


def test_a_refusal_by_one_limit_takes_nothing_of_the_others() -> None:
    rate_limiter = RateLimiter(Limits(rpm=10, tpm=100, concurrency=3))
    taken(rate_limiter, 90, 0.0)
    for _ in range(1000):
        wait(rate_limiter, 20, 1.0)
    assert rate_limiter.usage(1.0) == {
        "rpm": {"limit": 10, "used": 1},
        "tpm": {"limit": 100, "used": 90},
        "concurrency": {"limit": 3, "used": 1},
    }


def test_concurrency_returns_on_either_end_and_only_once() -> None:
    rate_limiter = RateLimiter(Limits(concurrency=2))
    one, two = taken(rate_limiter, 0, 0.0), taken(rate_limiter, 0, 0.0)
    assert wait(rate_limiter, 0, 0.0) == math.inf
    for _ in range(3):
        one.settle(5)
        one.cancel()
    third = taken(rate_limiter, 0, 0.0)
    assert wait(rate_limiter, 0, 1e6) == math.inf
    assert not rate_limiter.idle(1e6)
    two.cancel()
    third.settle(None)
    assert rate_limiter.idle(0.0)


def test_a_sent_request_stays_counted_and_settles_its_tokens() -> None:
    rate_limiter = RateLimiter(Limits(rpm=10, tpm=1000))
    taken(rate_limiter, 400, 0.0).settle(50)
    taken(rate_limiter, 400, 0.0).settle(None)
    taken(rate_limiter, 400, 0.0).settle(0)  # an error answer
    assert rate_limiter.usage(0.0)["rpm"]["used"] == 3
    assert used(rate_limiter, "tpm", 0.0) == 450


def test_an_unsent_request_releases_everything() -> None:
    rate_limiter = RateLimiter(Limits(rpm=1, tpm=1000, rpd=1, tpd=1000, concurrency=1))
    for _ in range(1000):
        taken(rate_limiter, 1000, 0.0).cancel()
    assert all(level["used"] == 0 for level in rate_limiter.usage(0.0).values())


def test_an_overdrawn_window_admits_nothing_until_it_fits() -> None:
    rate_limiter = RateLimiter(Limits(tpm=1000))
    early = taken(rate_limiter, 100, 0.0)
    late = taken(rate_limiter, 100, 30.0)
    early.settle(600)
    late.settle(900)
    assert used(rate_limiter, "tpm", 30.0) == 1500
    assert rate_limiter.headroom(30.0) == 0.0
    assert wait(rate_limiter, 0, 31.0) == pytest.approx(60.6 - 31)  # 900 are left then
    assert wait(rate_limiter, 100, 31.0) == pytest.approx(60.6 - 31)
    assert wait(rate_limiter, 101, 31.0) == pytest.approx(90.6 - 31)


def test_a_settlement_counts_at_the_time_of_its_reservation() -> None:
    rate_limiter = RateLimiter(Limits(tpm=1000))
    first = taken(rate_limiter, 100, 0.0)
    first.settle(1000)
    assert wait(rate_limiter, 1, 59.0) == pytest.approx(1.6)
    second = taken(rate_limiter, 1000, 61.0)
    assert used(rate_limiter, "tpm", 61.0) == 1000
    assert used(rate_limiter, "tpm", 130.0) == 0
    second.settle(5000)  # its window has passed
    assert used(rate_limiter, "tpm", 130.0) == 0
    assert rate_limiter.idle(130.0)


def test_a_share_of_a_limit_rounds_down_but_not_to_nothing() -> None:
    limits = Limits(rpm=100, tpm=1, rpd=7, tpd=1000, concurrency=10)
    shares = {name: level["limit"] for name, level in RateLimiter(limits, use=0.29).usage(0.0).items()}
    assert shares == {"rpm": 29, "tpm": 1, "rpd": 2, "tpd": 290, "concurrency": 2}


def test_memory_is_bounded_and_a_clock_that_steps_back_gives_nothing_away() -> None:
    rate_limiter = RateLimiter(Limits(rpm=10**6))
    now = 0.0
    for _ in range(20_000):
        taken(rate_limiter, 1, now)
        now += 0.006
    (window,) = rate_limiter._windows
    assert len(window.buckets) <= BUCKETS + 1
    before = used(rate_limiter, "rpm", now)
    taken(rate_limiter, 1, now - 30)
    assert used(rate_limiter, "rpm", now + 30) >= 1
    assert used(rate_limiter, "rpm", now - 30) <= before + 1


# --- which limits ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "rpm"),
    [
        ("gpt-4o", 1),
        ("gpt-4o-mini", 2),
        ("gpt-4o-2024-08-06", 3),
        ("gpt-4.1", 4),
        ("GPT-4o", 5),
        ("o3", 5),
        ("gpt-4o-mini-x", 2),
        ("[odd]", 6),
    ],
)
def test_the_exact_name_or_else_the_longest_glob(model: str, rpm: int) -> None:
    table = {
        "*": Limits(rpm=5),
        "gpt-4*": Limits(rpm=4),
        "gpt-4o-mini*": Limits(rpm=2),
        "gpt-4o*": Limits(rpm=3),
        "gpt-?o*": Limits(rpm=99),
        "gpt-4o": Limits(rpm=1),
        "[odd]": Limits(rpm=6),
    }
    assert limits_for(table, model) == Limits(rpm=rpm)


def test_no_match_means_no_limits() -> None:
    assert limits_for({}, "gpt-4o") == Limits()
    assert limits_for({"o*": Limits(rpm=1)}, "gpt-4o") == Limits()
