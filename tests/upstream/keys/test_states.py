"""What answers do to keys: the table whole, and its memory with a turned clock (contract 7, Keys)."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.upstream.keys.states import (
    ANY_MODEL,
    PROBE_COOL,
    PROBE_REST,
    STALE,
    TRANSITIONS,
    UNUSABLE_FOR,
    KeyStates,
    Status,
    Transition,
)
from proxy.upstream.retry.outcome import KEY_TROUBLE, OutcomeKind

M = "gpt-4o"


def held(states: KeyStates, now: float, model: str = M) -> str:
    """What keeps key `a` from use."""
    resting, cooling = states.of("a", model, now)
    told = [f"{state.status.value} {state.until - now:.1f}" for state in (resting, cooling) if state is not None]
    return ", ".join(told) or "ready"


def learn(states: KeyStates, outcome: OutcomeKind, now: float, wait: float = 0.0, floor: int = 0) -> None:
    states.record("a", M, outcome, now, wait, "why", floor)


def test_every_outcome_has_its_line() -> None:
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
    learn(states, outcome, 0.0, wait=7.0)
    assert (held(states, 0.0), held(states, 0.0, "other")) == TABLE.get(outcome, ("ready", "ready"))


@pytest.mark.parametrize("outcome", OutcomeKind)
def test_from_rejected_only_an_answer_leads_back(outcome: OutcomeKind) -> None:
    states = KeyStates()
    learn(states, OutcomeKind.UNAUTHORIZED, 0.0)
    learn(states, outcome, 1.0, wait=0.0)
    assert held(states, 1.0).startswith("ready" if TRANSITIONS[outcome] == "proves" else ("rejected", "exhausted"))


@pytest.mark.parametrize("outcome", OutcomeKind)
def test_from_cooling_nothing_leads_back_but_time(outcome: OutcomeKind) -> None:
    states = KeyStates()
    learn(states, OutcomeKind.RATE_LIMITED, 0.0, wait=30.0)
    learn(states, outcome, 1.0, wait=0.0)
    assert "cooling 29.0" in held(states, 1.0)
    assert "cooling" not in held(states, 30.0)


def test_whatever_is_the_keys_trouble_is_known_to_the_table() -> None:
    spared = {OutcomeKind.ORGANIZATION, OutcomeKind.TOO_LARGE}
    assert {o for o, effect in TRANSITIONS.items() if isinstance(effect, Transition)} == (KEY_TROUBLE - spared) | {
        OutcomeKind.RATE_LIMITED
    }


STORY = st.lists(st.tuples(st.sampled_from(list(OutcomeKind)), st.floats(0, 300), st.floats(0, 900)), max_size=20)


@given(STORY)
def test_no_deadline_is_ever_shortened_but_by_proof(story: list[tuple[OutcomeKind, float, float]]) -> None:
    states = KeyStates()
    now = 0.0
    for outcome, step, wait in story:
        now += step
        before = states.of("a", M, now)
        learn(states, outcome, now, wait)
        after = states.of("a", M, now)
        for old, new, lost in zip(before, after, (TRANSITIONS[outcome] == "proves", False), strict=True):
            if old is not None and not lost:
                assert new is not None
                assert new.until >= old.until or new.status is not old.status


# --- one probe --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "outcome", [OutcomeKind.QUOTA, OutcomeKind.UNAUTHORIZED, OutcomeKind.FORBIDDEN, OutcomeKind.MODEL_MISSING]
)
def test_after_its_rest_one_request_tries_a_key(outcome: OutcomeKind) -> None:
    states = KeyStates()
    learn(states, outcome, 0.0)
    assert held(states, UNUSABLE_FOR) == "ready"
    states.leased("a", M, UNUSABLE_FOR)
    assert held(states, UNUSABLE_FOR).endswith(f" {PROBE_REST}")  # the others go elsewhere
    learn(states, OutcomeKind.OK, UNUSABLE_FOR + 1)
    assert held(states, UNUSABLE_FOR + 1) == "ready"


def test_a_probe_that_fails_rests_it_again() -> None:
    states = KeyStates()
    learn(states, OutcomeKind.QUOTA, 0.0)
    states.leased("a", M, UNUSABLE_FOR)
    learn(states, OutcomeKind.QUOTA, UNUSABLE_FOR + 1)
    assert held(states, UNUSABLE_FOR + 1) == f"exhausted {UNUSABLE_FOR}"
    [(_, model, state)] = states.current(UNUSABLE_FOR + 1)
    assert (model, state.since) == (ANY_MODEL, 0.0)  # it never worked in between


@pytest.mark.parametrize("outcome", [OutcomeKind.RETRY, OutcomeKind.UNREACHED, OutcomeKind.TIMEOUT])
def test_a_probe_that_tells_nothing_is_followed_by_another(outcome: OutcomeKind) -> None:
    states = KeyStates()
    learn(states, OutcomeKind.UNAUTHORIZED, 0.0)
    states.leased("a", M, UNUSABLE_FOR)
    learn(states, outcome, UNUSABLE_FOR + 1)
    assert held(states, UNUSABLE_FOR + 1) == f"rejected {PROBE_REST - 1}"
    assert held(states, UNUSABLE_FOR + PROBE_REST) == "ready"


def test_waiters_do_not_stampede_a_key_that_has_cooled() -> None:
    states = KeyStates()
    learn(states, OutcomeKind.RATE_LIMITED, 0.0, wait=30.0)
    gone, now = 0, 30.0
    while now < 31.0:
        if held(states, now) == "ready":
            states.leased("a", M, now)
            gone += 1
        if now == 30.0 + PROBE_COOL:
            assert gone <= 2
        now = round(now + 0.01, 2)
    assert 10 < gone <= 100  # and nobody waits for ever for want of an answer


def test_the_first_answer_ends_the_caution() -> None:
    states = KeyStates()
    learn(states, OutcomeKind.RATE_LIMITED, 0.0, wait=30.0)
    states.leased("a", M, 30.0)
    assert held(states, 30.0) == f"cooling {PROBE_COOL}"
    learn(states, OutcomeKind.OK, 30.05)
    states.leased("a", M, 30.05)
    assert held(states, 30.05) == "ready"


def test_a_probe_that_is_limited_cools_anew() -> None:
    states = KeyStates()
    learn(states, OutcomeKind.RATE_LIMITED, 0.0, wait=30.0)
    states.leased("a", M, 30.0)
    learn(states, OutcomeKind.RATE_LIMITED, 30.05, wait=30.0)
    assert held(states, 30.05) == "cooling 30.0"


def test_a_cooling_long_past_is_forgotten() -> None:
    states = KeyStates()
    learn(states, OutcomeKind.RATE_LIMITED, 0.0, wait=1.0)
    states.leased("a", M, 2.0 + STALE)
    assert held(states, 2.0 + STALE) == "ready"


# --- token limits -----------------------------------------------------------------------------------------------------


def test_a_token_limit_holds_back_what_does_not_fit() -> None:
    states = KeyStates()
    learn(states, OutcomeKind.RATE_LIMITED, 0.0, wait=30.0, floor=500)
    [(_, _, state)] = states.current(0.0)
    assert state.floor == 500
    learn(states, OutcomeKind.RATE_LIMITED, 1.0, wait=5.0, floor=200)
    [(_, _, state)] = states.current(1.0)
    assert (state.floor, state.until) == (200, 30.0)
    learn(states, OutcomeKind.RATE_LIMITED, 2.0, wait=60.0)
    [(_, _, state)] = states.current(2.0)
    assert (state.floor, state.until, state.status) == (0, 62.0, Status.COOLING)
