"""The retry policy: every outcome in every situation, the pauses, the budget over time (docs/keys-and-limits.md)."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.config.settings import RetrySettings
from proxy.upstream.retry.outcome import KEY_TROUBLE, OutcomeKind
from proxy.upstream.retry.policy import (
    RetryAfter,
    RetryBudget,
    RetryOnNewConnection,
    RetryState,
    ReturnToClient,
    Step,
    TryNextKey,
    retry_delay,
)

AT_ONCE = [OutcomeKind.OK, OutcomeKind.FINAL, OutcomeKind.INVALID]
PAUSED = [OutcomeKind.RETRY, OutcomeKind.UNREACHED, OutcomeKind.AMBIGUOUS, OutcomeKind.TIMEOUT]


def after(
    attempts: RetryState,
    outcome: OutcomeKind,
    *,
    asked: float | None = None,
    left: float = 600.0,
    other: bool = False,
    granted: Callable[[], bool] = lambda: True,
) -> Step:
    return attempts.next(outcome, asked_wait=asked, left=left, other_key=other, granted=granted)


def machine(random: float = 0.5, **policy: float) -> RetryState:
    return RetryState(RetrySettings(**policy), lambda: random)  # type: ignore[arg-type]


# --- pauses -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("attempt", "random", "delay"),
    [
        (0, 0.0, 1.0),
        (1, 0.0, 2.0),
        (2, 0.0, 4.0),
        (3, 0.0, 8.0),
        (4, 0.0, 10.0),
        (0, 0.5, 1.5),
        (2, 0.25, 4.25),
        (3, 0.999, 8.999),
        (1000, 0.9, 10.0),
    ],
)
def test_the_default_delays(attempt: int, random: float, delay: float) -> None:
    assert retry_delay(RetrySettings(), attempt, lambda: random) == pytest.approx(delay)


SECONDS = st.floats(0, 1e4)


@given(st.integers(0, 10**6), SECONDS, SECONDS, SECONDS, st.floats(0, 1, exclude_max=True))
def test_the_delay_is_within_its_bounds(attempt: int, base: float, most: float, jitter: float, random: float) -> None:
    delay = retry_delay(RetrySettings(base_delay=base, max_delay=most, jitter=jitter), attempt, lambda: random)
    assert 0 <= delay <= most
    exact = base * 2.0**attempt if attempt < 30 else math.inf if base else 0.0
    if exact + jitter <= most:
        assert exact <= delay <= exact + jitter


def test_jitter_spreads_a_crowd() -> None:
    delays = {retry_delay(RetrySettings(), 0, lambda n=n: n / 100) for n in range(100)}  # type: ignore[misc]
    assert len(delays) == 100
    assert max(delays) - min(delays) > 0.9


@given(st.floats(0, 1e4), st.floats(0, 1, exclude_max=True))
def test_never_before_retry_after(asked: float, random: float) -> None:
    step = after(machine(random), OutcomeKind.RATE_LIMITED, asked=asked, left=math.inf)
    assert isinstance(step, RetryAfter)
    assert step.seconds >= asked
    assert step.seconds >= 1.0  # nor sooner than the policy's own delay


def test_without_a_hint_the_policy_alone_decides() -> None:
    assert after(machine(base_delay=0.25, jitter=0.5), OutcomeKind.RETRY, asked=None) == RetryAfter(0.5)
    assert after(machine(base_delay=0.0, jitter=0.0), OutcomeKind.RETRY, asked=0.0) == RetryAfter(0.0)


def test_a_longer_retry_after_may_exceed_max_delay() -> None:
    assert after(machine(), OutcomeKind.RATE_LIMITED, asked=60.0) == RetryAfter(60.0)


# --- what follows an outcome ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("outcome", AT_ONCE)
def test_outcomes_that_are_never_retried(outcome: OutcomeKind) -> None:
    for asked, other in product((None, 0.0, 5.0), (False, True)):
        attempts = machine()
        assert after(attempts, outcome, asked=asked, other=other) == ReturnToClient(spent=False)
        assert attempts.retries == 0


@pytest.mark.parametrize("outcome", sorted(KEY_TROUBLE, key=str))
def test_a_failure_of_the_key_changes_the_key_without_using_a_retry(outcome: OutcomeKind) -> None:
    """No retry, no wait, no deadline: also with no retries at all, and for as many keys as there are."""
    attempts = machine(max_retries=0)
    for other in [True] * 50 + [False]:
        assert after(attempts, outcome, asked=3600.0, left=0.001, other=other, granted=lambda: False) == TryNextKey()
    assert attempts.retries == 0


def test_a_rate_limited_key_is_replaced_at_once() -> None:
    attempts = machine(max_retries=0)
    for _ in range(9):
        assert after(attempts, OutcomeKind.RATE_LIMITED, asked=30.0, other=True, granted=lambda: False) == TryNextKey()
    assert attempts.retries == 0
    assert after(attempts, OutcomeKind.RATE_LIMITED, other=False) == ReturnToClient()


@pytest.mark.parametrize("outcome", [*PAUSED, OutcomeKind.RATE_LIMITED])
@pytest.mark.parametrize("most", [0, 1, 3, 10])
def test_retries_are_limited_to_max_retries(outcome: OutcomeKind, most: int) -> None:
    attempts = machine(0.0, max_retries=most)
    for number in range(most):
        assert after(attempts, outcome, left=math.inf) == RetryAfter(min(2.0**number, 10.0))
        assert attempts.retries == number + 1
    assert after(attempts, outcome, left=math.inf) == ReturnToClient(spent=most > 0)


@pytest.mark.parametrize("outcome", PAUSED)
def test_an_upstream_failure_does_not_change_the_key(outcome: OutcomeKind) -> None:
    assert isinstance(after(machine(), outcome, other=True), RetryAfter)


def test_a_delay_beyond_the_deadline_returns_the_response() -> None:
    attempts = machine()
    assert after(attempts, OutcomeKind.RATE_LIMITED, asked=3600.0, left=600.0) == ReturnToClient(spent=False)
    assert after(attempts, OutcomeKind.RATE_LIMITED, asked=600.0, left=600.0) == ReturnToClient(spent=False)
    assert after(attempts, OutcomeKind.RETRY, left=1.0) == ReturnToClient(spent=False)
    assert isinstance(after(attempts, OutcomeKind.RETRY, left=10.0), RetryAfter)
    assert after(attempts, OutcomeKind.RETRY, left=1.0) == ReturnToClient(spent=True)
    assert attempts.retries == 1


def test_one_stale_connection_uses_no_retry() -> None:
    attempts = machine(max_retries=1)
    assert after(attempts, OutcomeKind.STALE, left=0.5, granted=lambda: False) == RetryOnNewConnection()
    assert attempts.retries == 0
    assert isinstance(after(attempts, OutcomeKind.STALE), RetryAfter)
    assert after(attempts, OutcomeKind.STALE) == ReturnToClient(spent=True)


@pytest.mark.parametrize("outcome", [OutcomeKind.AMBIGUOUS, OutcomeKind.STALE])
def test_ambiguous_failures_are_retried_only_if_allowed(outcome: OutcomeKind) -> None:
    attempts = machine(ambiguous=False)
    attempts.stale_used = True
    assert after(attempts, outcome) == ReturnToClient(spent=False)
    attempts = machine(ambiguous=True)
    attempts.stale_used = True
    assert isinstance(after(attempts, outcome), RetryAfter)


@pytest.mark.parametrize("outcome", [OutcomeKind.RETRY, OutcomeKind.UNREACHED, OutcomeKind.RATE_LIMITED])
def test_unbilled_failures_are_always_retried(outcome: OutcomeKind) -> None:
    assert isinstance(after(machine(ambiguous=False), outcome), RetryAfter)


@pytest.mark.parametrize("outcome", OutcomeKind)
@pytest.mark.parametrize("ambiguous", [True, False])
def test_outcomes_that_may_fail_over(outcome: OutcomeKind, ambiguous: bool) -> None:
    """Another upstream or model may take what may be sent again; what may have been billed only where allowed."""
    attempts = RetryState(RetrySettings(ambiguous=ambiguous), lambda: 0.0)
    never = {OutcomeKind.OK, OutcomeKind.FINAL, OutcomeKind.INVALID}
    if not ambiguous:
        never |= {OutcomeKind.AMBIGUOUS, OutcomeKind.STALE, OutcomeKind.TIMEOUT}
    assert attempts.can_fail_over(outcome) is (outcome not in never)


def test_without_retry_budget_x_should_retry_is_false() -> None:
    attempts = machine()
    assert after(attempts, OutcomeKind.RETRY, granted=lambda: False) == ReturnToClient(spent=True)
    assert attempts.retries == 0


def test_the_retry_budget_is_used_only_by_retries_that_are_made() -> None:
    asked: list[bool] = []

    def granted() -> bool:
        asked.append(True)
        return True

    for outcome in [*AT_ONCE, *KEY_TROUBLE, OutcomeKind.STALE]:
        after(machine(), outcome, granted=granted)
    after(machine(), OutcomeKind.RATE_LIMITED, other=True, granted=granted)
    after(machine(), OutcomeKind.RETRY, left=0.1, granted=granted)
    after(machine(max_retries=0), OutcomeKind.RETRY, granted=granted)
    assert asked == []
    after(machine(), OutcomeKind.RETRY, granted=granted)
    assert asked == [True]


@given(
    st.lists(st.tuples(st.sampled_from(list(OutcomeKind)), st.booleans(), st.none() | st.floats(0, 100)), max_size=60)
)
def test_any_sequence_of_outcomes_has_bounded_retries(story: list[tuple[OutcomeKind, bool, float | None]]) -> None:
    attempts = machine()
    fresh = 0
    for outcome, other, asked in story:
        step = after(attempts, outcome, other=other, asked=asked)
        fresh += isinstance(step, RetryOnNewConnection)
        if isinstance(step, ReturnToClient):
            break
    assert attempts.retries <= 3
    assert fresh <= 1


# --- the budget -------------------------------------------------------------------------------------------------------


def taken(budget: RetryBudget, now: float, tries: int = 1000) -> int:
    return sum(budget.take(now) for _ in range(tries))


@pytest.mark.parametrize(
    ("share", "requests", "retries"),
    [(0.2, 0, 10), (0.2, 1, 11), (0.2, 100, 30), (0.2, 1000, 210), (0.0, 1000, 10), (1.0, 50, 60)],
)
def test_the_budget_is_a_share_of_the_requests_above_a_minimum(share: float, requests: int, retries: int) -> None:
    budget = RetryBudget(share)
    for _ in range(requests):
        budget.request(5.0)
    assert taken(budget, 5.0) == retries


def test_the_budget_recovers_after_ten_seconds() -> None:
    budget = RetryBudget(0.2)
    assert taken(budget, 0.0) == 10
    assert taken(budget, 9.9) == 0
    assert taken(budget, 10.0) == 10


def test_the_budget_shrinks_with_the_requests() -> None:
    budget = RetryBudget(0.5)
    for _ in range(100):
        budget.request(0.0)
    assert taken(budget, 9.0, 5) == 5
    assert taken(budget, 10.0) == 5  # the requests have left the window, the five retries not yet


def test_requests_outside_the_window_are_forgotten() -> None:
    budget = RetryBudget(1.0)
    for number in range(50):
        budget.request(number * 0.03)
    for _ in range(100):
        budget.request(20.0)
    assert taken(budget, 20.0) == 110


def test_the_budgets_memory_is_bounded() -> None:
    budget = RetryBudget(0.2)
    for number in range(100_000):
        budget.request(number / 1000)
    assert len(budget._requests) <= 102


STEPS = st.lists(st.tuples(st.sampled_from([0.0, 0.01, 0.1, 0.5, 3.0, 11.0]), st.booleans()), max_size=200)


@given(STEPS, st.sampled_from([0.0, 0.2, 1.0]))
def test_the_budget_agrees_with_a_simple_count(steps: list[tuple[float, bool]], share: float) -> None:
    """Granted only where the last 10 s allow it, refused only where they do not (a request may count 0.1 s less)."""
    budget = RetryBudget(share)
    now = 0.0
    requests: list[float] = []
    retries: list[float] = []
    for step, is_request in steps:
        now += step
        if is_request:
            budget.request(now)
            requests.append(now)
            continue
        lately = sum(now - at < 10.0 for at in retries)
        if budget.take(now):
            assert lately < 10 + share * sum(now - at < 10.0 for at in requests)
            retries.append(now)
        else:
            assert lately >= 10 + share * sum(now - at < 9.9 - 1e-9 for at in requests)
