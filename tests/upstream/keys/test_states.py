"""What outcomes do to the states of keys: the whole table, and what is remembered, in virtual time."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.upstream.keys.states import (
    ANY_MODEL,
    FORGET_COOLING_AFTER,
    PROBE_SPACING,
    PROBE_TIMEOUT,
    TRANSITIONS,
    UNUSABLE_FOR,
    KeyOutcome,
    KeyStates,
    Status,
    Transition,
)
from proxy.upstream.retry.outcome import KEY_TROUBLE, OutcomeKind

M = "gpt-4o"


def blocked_by(states: KeyStates, now: float, model: str = M) -> str:
    """What keeps key `a` from use."""
    unusable, cooling = states.blocking("a", model, now)
    result = [f"{state.status.value} {state.until - now:.1f}" for state in (unusable, cooling) if state is not None]
    return ", ".join(result) or "ready"


def record(states: KeyStates, outcome: OutcomeKind, now: float, wait: float = 0.0, floor: int = 0) -> None:
    states.record("a", M, KeyOutcome(outcome, now, wait, "why", floor))


def test_every_outcome_has_a_transition() -> None:
    assert set(TRANSITIONS) == set(OutcomeKind)


TABLE = {
    OutcomeKind.OK: ("ready", "ready"),
    OutcomeKind.FINAL: ("ready", "ready"),
    OutcomeKind.RATE_LIMITED: ("cooling 7.0", "ready"),
    OutcomeKind.QUOTA: ("exhausted 600.0", "exhausted 600.0"),
    OutcomeKind.UNAUTHORIZED: ("rejected 600.0", "rejected 600.0"),
    OutcomeKind.FORBIDDEN: ("rejected 600.0", "ready"),
    OutcomeKind.MODEL_MISSING: ("missing 600.0", "ready"),
}
"""Outcome -> (the key's state for this model, for another one). Whatever is not here changes nothing."""


@pytest.mark.parametrize("outcome", OutcomeKind)
def test_from_ready(outcome: OutcomeKind) -> None:
    states = KeyStates()
    record(states, outcome, 0.0, wait=7.0)
    assert (blocked_by(states, 0.0), blocked_by(states, 0.0, "other")) == TABLE.get(outcome, ("ready", "ready"))


@pytest.mark.parametrize("outcome", OutcomeKind)
def test_only_a_response_ends_a_rejection(outcome: OutcomeKind) -> None:
    states = KeyStates()
    record(states, OutcomeKind.UNAUTHORIZED, 0.0)
    record(states, outcome, 1.0, wait=0.0)
    assert blocked_by(states, 1.0).startswith(
        "ready" if TRANSITIONS[outcome] == "healthy" else ("rejected", "exhausted")
    )


@pytest.mark.parametrize("outcome", OutcomeKind)
def test_only_time_ends_a_cooldown(outcome: OutcomeKind) -> None:
    states = KeyStates()
    record(states, OutcomeKind.RATE_LIMITED, 0.0, wait=30.0)
    record(states, outcome, 1.0, wait=0.0)
    assert "cooling 29.0" in blocked_by(states, 1.0)
    assert "cooling" not in blocked_by(states, 30.0)


def test_every_failure_of_a_key_has_a_transition() -> None:
    spared = {OutcomeKind.ORGANIZATION, OutcomeKind.TOO_LARGE, OutcomeKind.REFUSED}
    assert {o for o, effect in TRANSITIONS.items() if isinstance(effect, Transition)} == (KEY_TROUBLE - spared) | {
        OutcomeKind.RATE_LIMITED
    }


def test_a_doubtful_refusal_counts_if_another_request_gets_it_too() -> None:
    def refuse(request: int, model: str = M) -> None:
        states.record("a", model, KeyOutcome(OutcomeKind.DOUBTFUL, 1.0, request=request))

    states = KeyStates()
    refuse(7)
    refuse(7)
    refuse(8, "other")
    assert blocked_by(states, 1.0) == blocked_by(states, 1.0, "other") == "ready"
    record(states, OutcomeKind.OK, 1.0)
    refuse(8)
    assert blocked_by(states, 1.0) == "ready"  # a success was in between
    refuse(9)
    assert (blocked_by(states, 1.0), blocked_by(states, 1.0, "other")) == ("rejected 600.0", "ready")


def test_a_missing_right_concerns_the_route_alone() -> None:
    def blocked(route: str, model: str = M) -> str:
        state, _ = states.blocking("a", model, 1.0, route)
        return state.status.value if state is not None else "ready"

    states = KeyStates()
    states.record("a", M, KeyOutcome(OutcomeKind.SCOPE, 1.0, route="GET models"))
    assert [blocked("GET models"), blocked("GET models", "other"), blocked("POST chat")] == [
        "missing",
        "missing",
        "ready",
    ]
    states.record("a", M, KeyOutcome(OutcomeKind.OK, 1.0, route="POST chat"))
    assert blocked("GET models") == "missing"
    states.record("a", M, KeyOutcome(OutcomeKind.OK, 1.0, route="GET models"))
    assert blocked("GET models") == "ready"


STORY = st.lists(st.tuples(st.sampled_from(list(OutcomeKind)), st.floats(0, 300), st.floats(0, 900)), max_size=20)


@given(STORY)
def test_only_a_response_shortens_a_deadline(story: list[tuple[OutcomeKind, float, float]]) -> None:
    states = KeyStates()
    now = 0.0
    for outcome, step, wait in story:
        now += step
        before = states.blocking("a", M, now)
        record(states, outcome, now, wait)
        after = states.blocking("a", M, now)
        for old, new, lost in zip(before, after, (TRANSITIONS[outcome] == "healthy", False), strict=True):
            if old is not None and not lost:
                assert new is not None
                assert new.until >= old.until or new.status is not old.status


# --- one probe --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "outcome", [OutcomeKind.QUOTA, OutcomeKind.UNAUTHORIZED, OutcomeKind.FORBIDDEN, OutcomeKind.MODEL_MISSING]
)
def test_one_request_probes_a_key_whose_time_is_over(outcome: OutcomeKind) -> None:
    states = KeyStates()
    record(states, outcome, 0.0)
    assert blocked_by(states, UNUSABLE_FOR) == "ready"
    states.record_lease("a", M, UNUSABLE_FOR)
    assert blocked_by(states, UNUSABLE_FOR).endswith(f" {PROBE_TIMEOUT}")  # the others go elsewhere
    record(states, OutcomeKind.OK, UNUSABLE_FOR + 1)
    assert blocked_by(states, UNUSABLE_FOR + 1) == "ready"


def test_a_failed_probe_makes_the_key_unusable_again() -> None:
    states = KeyStates()
    record(states, OutcomeKind.QUOTA, 0.0)
    states.record_lease("a", M, UNUSABLE_FOR)
    record(states, OutcomeKind.QUOTA, UNUSABLE_FOR + 1)
    assert blocked_by(states, UNUSABLE_FOR + 1) == f"exhausted {UNUSABLE_FOR}"
    [(_, model, state)] = states.current(UNUSABLE_FOR + 1)
    assert (model, state.since) == (ANY_MODEL, 0.0)  # it never worked in between


@pytest.mark.parametrize("outcome", [OutcomeKind.RETRY, OutcomeKind.UNREACHED, OutcomeKind.TIMEOUT])
def test_a_probe_without_result_is_followed_by_another(outcome: OutcomeKind) -> None:
    states = KeyStates()
    record(states, OutcomeKind.UNAUTHORIZED, 0.0)
    states.record_lease("a", M, UNUSABLE_FOR)
    record(states, outcome, UNUSABLE_FOR + 1)
    assert blocked_by(states, UNUSABLE_FOR + 1) == f"rejected {PROBE_TIMEOUT - 1}"
    assert blocked_by(states, UNUSABLE_FOR + PROBE_TIMEOUT) == "ready"


def test_probes_of_a_cooled_key_are_spaced() -> None:
    states = KeyStates()
    record(states, OutcomeKind.RATE_LIMITED, 0.0, wait=30.0)
    gone, now = 0, 30.0
    while now < 31.0:
        if blocked_by(states, now) == "ready":
            states.record_lease("a", M, now)
            gone += 1
        if now == 30.0 + PROBE_SPACING:
            assert gone <= 2
        now = round(now + 0.01, 2)
    assert 10 < gone <= 100  # and nobody waits for ever for want of an answer


def test_the_first_response_ends_the_probing() -> None:
    states = KeyStates()
    record(states, OutcomeKind.RATE_LIMITED, 0.0, wait=30.0)
    states.record_lease("a", M, 30.0)
    assert blocked_by(states, 30.0) == f"cooling {PROBE_SPACING}"
    record(states, OutcomeKind.OK, 30.05)
    states.record_lease("a", M, 30.05)
    assert blocked_by(states, 30.05) == "ready"


def test_a_probe_that_is_limited_cools_anew() -> None:
    states = KeyStates()
    record(states, OutcomeKind.RATE_LIMITED, 0.0, wait=30.0)
    states.record_lease("a", M, 30.0)
    record(states, OutcomeKind.RATE_LIMITED, 30.05, wait=30.0)
    assert blocked_by(states, 30.05) == "cooling 30.0"


def test_an_old_cooldown_is_forgotten() -> None:
    states = KeyStates()
    record(states, OutcomeKind.RATE_LIMITED, 0.0, wait=1.0)
    states.record_lease("a", M, 2.0 + FORGET_COOLING_AFTER)
    assert blocked_by(states, 2.0 + FORGET_COOLING_AFTER) == "ready"


# --- token limits -----------------------------------------------------------------------------------------------------


def test_a_token_limit_holds_back_what_does_not_fit() -> None:
    states = KeyStates()
    record(states, OutcomeKind.RATE_LIMITED, 0.0, wait=30.0, floor=500)
    [(_, _, state)] = states.current(0.0)
    assert state.floor == 500
    record(states, OutcomeKind.RATE_LIMITED, 1.0, wait=5.0, floor=200)
    [(_, _, state)] = states.current(1.0)
    assert (state.floor, state.until) == (200, 30.0)
    record(states, OutcomeKind.RATE_LIMITED, 2.0, wait=60.0)
    [(_, _, state)] = states.current(2.0)
    assert (state.floor, state.until, state.status) == (0, 62.0, Status.COOLING)


def changed(states: KeyStates, outcome: OutcomeKind, now: float, wait: float = 0.0, request: int = 0) -> str:
    change = states.record("a", M, KeyOutcome(outcome, now, wait, "why", request=request))
    return "" if change is None else f"{change.model} {change.status.value} {change.until:.0f}"


def test_a_change_is_told_once_until_the_state_ends() -> None:
    states = KeyStates()
    assert changed(states, OutcomeKind.OK, 0.0) == ""
    assert changed(states, OutcomeKind.UNAUTHORIZED, 0.0) == "* rejected 600"
    assert changed(states, OutcomeKind.UNAUTHORIZED, 1.0) == ""
    states.record_lease("a", M, 700.0)  # the probe
    assert changed(states, OutcomeKind.UNAUTHORIZED, 700.0) == ""
    states.record_lease("a", M, 1400.0)
    assert changed(states, OutcomeKind.OK, 1400.0) == "* ready 0"
    assert changed(states, OutcomeKind.OK, 1401.0) == ""
    assert changed(states, OutcomeKind.QUOTA, 1402.0) == "* exhausted 2002"


def test_a_cooldown_is_told_once_and_its_end_when_a_request_succeeds() -> None:
    states = KeyStates()
    assert changed(states, OutcomeKind.RATE_LIMITED, 0.0, 7.0) == f"{M} cooling 7"
    assert changed(states, OutcomeKind.RATE_LIMITED, 1.0, 7.0) == ""
    assert changed(states, OutcomeKind.OK, 2.0) == ""  # it still cools
    states.record_lease("a", M, 9.0)
    assert changed(states, OutcomeKind.OK, 9.0) == f"{M} ready 0"
