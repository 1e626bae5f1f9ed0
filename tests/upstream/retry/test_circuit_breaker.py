"""The circuit breaker, with a turned clock (docs/keys-and-limits.md)."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from proxy.config.settings import BreakerSettings
from proxy.upstream.retry.circuit_breaker import CircuitBreaker


def opened(at: float = 0.0) -> CircuitBreaker:
    breaker = CircuitBreaker(BreakerSettings(failures=3, window=30.0, open_for=15.0))
    for _ in range(3):
        breaker.record_failure(at)
    return breaker


def test_consecutive_failures_open_the_circuit() -> None:
    breaker = CircuitBreaker(BreakerSettings(failures=3))
    for now in (0.0, 1.0):
        breaker.record_failure(now)
        assert (breaker.state(now), breaker.wait(now)) == ("closed", 0.0)
    breaker.record_failure(2.0)
    assert (breaker.state(2.0), breaker.wait(2.0)) == ("open", 15.0)


def test_a_response_in_between_resets_the_count() -> None:
    breaker = CircuitBreaker(BreakerSettings(failures=3))
    for now in range(30):
        breaker.record_failure(float(now))
        breaker.record_failure(float(now))
        breaker.record_success()
        assert breaker.state(float(now)) == "closed"


def test_different_failures_do_not_add_up() -> None:
    breaker = CircuitBreaker(BreakerSettings(failures=3))
    for now, kind in enumerate([500, 502, 503, 504, 529, 0, 500, 502]):
        breaker.record_failure(float(now), kind)
        assert breaker.state(float(now)) == "closed"
    breaker.record_failure(9.0, 500)
    assert breaker.state(9.0) == "open"


def test_failures_far_apart_do_not_add_up() -> None:
    breaker = CircuitBreaker(BreakerSettings(failures=3, window=30.0))
    for now in range(0, 600, 15):
        breaker.record_failure(float(now))
        assert breaker.state(float(now)) == "closed"


def test_one_request_probes_and_others_are_refused() -> None:
    breaker = opened()
    assert breaker.wait(14.9) > 0
    assert (breaker.wait(15.0), breaker.state(15.0)) == (0.0, "half_open")
    breaker.sends(15.0)
    assert (breaker.wait(15.0), breaker.state(15.0)) == (15.0, "half_open")
    breaker.record_success()
    assert (breaker.wait(15.1), breaker.state(15.1)) == (0.0, "closed")


def test_a_failed_probe_opens_the_circuit_again() -> None:
    breaker = opened()
    breaker.sends(15.0)
    breaker.record_failure(16.0)
    assert (breaker.wait(16.0), breaker.state(16.0)) == (15.0, "open")


def test_a_probe_without_result_is_followed_by_another() -> None:
    breaker = opened()
    breaker.sends(15.0)
    assert breaker.wait(30.0) == 0.0


def test_requests_in_flight_when_the_circuit_opens_do_not_change_it() -> None:
    breaker = opened()
    breaker.record_failure(10.0)
    assert breaker.wait(10.0) == 5.0
    breaker.record_success()  # but an answer is an answer
    assert breaker.wait(10.0) == 0.0


@given(
    st.lists(st.tuples(st.sampled_from(["sends", "record_failure", "record_success"]), st.floats(0, 40)), max_size=60)
)
def test_retry_after_is_at_most_the_open_time(story: list[tuple[str, float]]) -> None:
    breaker = CircuitBreaker(BreakerSettings(failures=2))
    now = 0.0
    for what, step in story:
        now += step
        if what == "record_success":
            breaker.record_success()
        else:
            getattr(breaker, what)(now)
        assert 0.0 <= breaker.wait(now) <= 15.001
        assert (breaker.wait(now) > 0) <= (breaker.state(now) != "closed")


def test_each_change_is_told_once_with_its_reason() -> None:
    told: list[tuple[str, float, str]] = []
    breaker = CircuitBreaker(BreakerSettings(failures=2, window=30.0, open_for=15.0))
    breaker.on_change = lambda *change: told.append(change)
    breaker.record_success()
    for _ in range(4):
        breaker.record_failure(0.0, 503)
    breaker.sends(15.0)
    breaker.sends(15.0)
    breaker.record_failure(16.0)
    breaker.sends(31.0)
    breaker.record_success()
    breaker.record_success()
    assert told == [
        ("open", 15.0, "2 times in a row status 503"),
        ("half_open", 0.0, "one request tries the upstream"),
        ("open", 15.0, "still no answer"),
        ("half_open", 0.0, "one request tries the upstream"),
        ("closed", 0.0, "it answers again"),
    ]
