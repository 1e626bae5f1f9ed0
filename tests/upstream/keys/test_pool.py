"""The pool of keys in virtual time: states, priorities, quotas, fairness."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.config.limits import Limits
from proxy.upstream.keys.lease import Lease, NoKey, NotReady, UpstreamKey
from proxy.upstream.keys.pool import KeyPool
from proxy.upstream.keys.states import ANY_MODEL, UNUSABLE_FOR, KeyOutcome, Status
from proxy.upstream.limits.rate_limiter import MARGIN
from proxy.upstream.retry.outcome import OutcomeKind

M = "gpt-4o"
NOBODY: frozenset[str] = frozenset()
MINUTE = 60 * MARGIN


def in_order(keys: Sequence[UpstreamKey], pool: KeyPool, model: str, now: float, prefix: bytes) -> list[UpstreamKey]:
    return list(keys)


def pool_named(*names: str, limits: Mapping[str, Limits] | None = None, **fields: Any) -> KeyPool:
    return KeyPool([UpstreamKey(name, 0, ("*",), **fields) for name in names], in_order, limits or {})


def pool_of(*keys: UpstreamKey, limits: Mapping[str, Limits] | None = None, use: float = 1.0) -> KeyPool:
    return KeyPool(keys, in_order, limits or {}, use)


def leased(pool: KeyPool, now: float, model: str = M, tokens: int = 1, excluded: frozenset[str] = NOBODY) -> str:
    """The label of the leased key, or what there was instead."""
    answer = pool.lease(model, tokens, excluded, now)
    match answer:
        case Lease(key):
            return key.label
        case NotReady(wait, why):
            return f"{why} {wait.seconds:.3f}"
        case NoKey(why):
            return why


def record(pool: KeyPool, name: str, outcome: OutcomeKind, now: float, wait: float = 0.0, model: str = M) -> None:
    key = next(key for key in pool.keys if key.label == name)
    pool.record_outcome(key, model, KeyOutcome(outcome, now, wait, "why"))


def status(pool: KeyPool, name: str, now: float, model: str = M) -> str:
    state = pool.state(name, model, now)
    return "ready" if state is None else f"{state.status.value} {state.until - now:.0f}"


# --- cooling ----------------------------------------------------------------------------------------------------------


def test_a_limited_key_cools_and_the_other_serves() -> None:
    pool = pool_named("a", "b")
    record(pool, "a", OutcomeKind.RATE_LIMITED, 0.0, wait=30.0)
    assert leased(pool, 1.0) == "b"
    assert status(pool, "a", 1.0) == "cooling 29"
    assert leased(pool, 29.99) == "b"
    assert status(pool, "a", 30.0) == "ready"
    assert leased(pool, 30.0) == "a"


def test_cooling_concerns_one_model_only() -> None:
    pool = pool_named("a")
    record(pool, "a", OutcomeKind.RATE_LIMITED, 0.0, wait=30.0)
    assert leased(pool, 1.0, "gpt-4o-mini") == "a"


def test_if_all_keys_cool_the_wait_is_the_shortest_one() -> None:
    pool = pool_named("a", "b")
    record(pool, "a", OutcomeKind.RATE_LIMITED, 0.0, wait=30.0)
    record(pool, "b", OutcomeKind.RATE_LIMITED, 0.0, wait=12.0)
    assert leased(pool, 2.0) == "keys_cooling 10.000"


def test_a_single_key_cools_too() -> None:
    pool = pool_named("a")
    record(pool, "a", OutcomeKind.RATE_LIMITED, 0.0, wait=30.0)
    assert leased(pool, 0.0) == "keys_cooling 30.000"
    assert leased(pool, 30.0) == "a"


COOLERS = st.lists(st.tuples(st.floats(0, 50), st.floats(0, 200)), min_size=1, max_size=10)


@given(COOLERS)
def test_a_cooldown_is_extended_never_shortened(story: list[tuple[float, float]]) -> None:
    pool = pool_named("a", "b")
    now, until = 0.0, 0.0
    for step, wait in story:
        now += step
        record(pool, "a", OutcomeKind.RATE_LIMITED, now, wait)
        until = max(until, now + wait)
        state = pool.state("a", M, now)
        assert (state.until if state is not None else now) == max(until, now)
    assert status(pool, "a", until) == "ready"


def test_success_and_other_answers_do_not_shorten_cooling() -> None:
    """A request that was under way when the limit was hit proves nothing about the limit."""
    pool = pool_named("a", "b")
    record(pool, "a", OutcomeKind.RATE_LIMITED, 0.0, wait=30.0)
    for outcome in (
        OutcomeKind.OK,
        OutcomeKind.FINAL,
        OutcomeKind.RETRY,
        OutcomeKind.TIMEOUT,
        OutcomeKind.INVALID,
        OutcomeKind.AMBIGUOUS,
        OutcomeKind.UNREACHED,
    ):
        record(pool, "a", outcome, 1.0)
        assert status(pool, "a", 1.0) == "cooling 29"


@pytest.mark.parametrize("first", ["limit", "refusal"])
@pytest.mark.parametrize(
    "trouble", [OutcomeKind.FORBIDDEN, OutcomeKind.MODEL_MISSING, OutcomeKind.UNAUTHORIZED, OutcomeKind.QUOTA]
)
def test_a_cooldown_and_a_rejection_are_kept_apart(trouble: OutcomeKind, first: str) -> None:
    """Two requests under way at once can end with both; neither deadline is lost to the other."""
    for wait in (30.0, 3600.0):
        pool = pool_named("a", "b")
        record(pool, "b", OutcomeKind.UNAUTHORIZED, 0.0)
        outcomes = [OutcomeKind.RATE_LIMITED, trouble]
        for outcome in outcomes if first == "limit" else reversed(outcomes):
            record(pool, "a", outcome, 0.0, wait if outcome is OutcomeKind.RATE_LIMITED else 0.0)
        assert status(pool, "a", 1.0).endswith(f" {max(wait, UNUSABLE_FOR) - 1:.0f}")
        assert leased(pool, min(wait, UNUSABLE_FOR) - 1.0) != "a"
        if wait > UNUSABLE_FOR:
            assert leased(pool, UNUSABLE_FOR, excluded=frozenset({"b"})) == f"keys_cooling {wait - UNUSABLE_FOR:.3f}"
        assert leased(pool, max(wait, UNUSABLE_FOR)) == "a"


def test_a_single_exhausted_key_still_cools() -> None:
    pool = pool_named("a")
    record(pool, "a", OutcomeKind.QUOTA, 0.0)
    assert leased(pool, 1.0) == "a"
    record(pool, "a", OutcomeKind.RATE_LIMITED, 1.0, wait=30.0)
    assert leased(pool, 2.0) == "keys_cooling 29.000"
    assert leased(pool, 31.0) == "a"


# --- exhausted, rejected, missing -------------------------------------------------------------------------------------

RESTS = {
    OutcomeKind.QUOTA: ("exhausted", True),
    OutcomeKind.UNAUTHORIZED: ("rejected", True),
    OutcomeKind.FORBIDDEN: ("rejected", False),
    OutcomeKind.MODEL_MISSING: ("missing", False),
}
"""Outcome -> (state, whether it is the whole key's)."""


@pytest.mark.parametrize("outcome", RESTS)
def test_an_unusable_key_is_tried_again_after_ten_minutes(outcome: OutcomeKind) -> None:
    name, whole = RESTS[outcome]
    pool = pool_named("a", "b")
    record(pool, "a", outcome, 100.0)
    assert status(pool, "a", 100.0) == f"{name} 600"
    assert [leased(pool, now) for now in (100.0, 400.0, 699.9, 700.0)] == ["b", "b", "b", "a"]
    record(pool, "a", outcome, 700.0)
    assert leased(pool, 1299.9) == "b"
    assert (leased(pool, 800.0, "other-model") == "b") is whole


@pytest.mark.parametrize("outcome", RESTS)
def test_a_response_makes_the_key_ready(outcome: OutcomeKind) -> None:
    pool = pool_named("a", "b")
    record(pool, "a", outcome, 0.0)
    record(pool, "a", OutcomeKind.OK, 1.0)
    assert status(pool, "a", 1.0) == "ready"


@pytest.mark.parametrize(
    "outcome", [OutcomeKind.RETRY, OutcomeKind.UNREACHED, OutcomeKind.STALE, OutcomeKind.AMBIGUOUS, OutcomeKind.TIMEOUT]
)
def test_upstream_failures_do_not_change_the_keys_state(outcome: OutcomeKind) -> None:
    pool = pool_named("a", "b")
    for _ in range(25):
        record(pool, "a", outcome, 0.0)
    assert status(pool, "a", 0.0) == "ready"
    record(pool, "a", OutcomeKind.UNAUTHORIZED, 0.0)
    record(pool, "a", outcome, 1.0)
    assert status(pool, "a", 1.0) == "rejected 599"  # nor does it prove anything


@pytest.mark.parametrize("outcome", RESTS)
def test_a_single_key_is_used_whatever_its_state(outcome: OutcomeKind) -> None:
    """Without another key the upstream's own answer helps the client more than ours."""
    pool = pool_named("a")
    record(pool, "a", outcome, 0.0)
    assert leased(pool, 1.0) == "a"
    assert leased(pool, 1.0, excluded=frozenset({"a"})) == "no_usable_key"


def rejected_and_exhausted() -> KeyPool:
    pool = pool_named("a", "b", "c")
    record(pool, "a", OutcomeKind.UNAUTHORIZED, 0.0)
    record(pool, "b", OutcomeKind.QUOTA, 0.0)
    record(pool, "c", OutcomeKind.FORBIDDEN, 0.0)
    return pool


def test_while_all_keys_are_rejected_one_request_in_a_second_is_tried_on_all_of_them() -> None:
    pool = rejected_and_exhausted()
    for now in (1.0, 2.0, 3.5):
        first = leased(pool, now)
        assert leased(pool, now) == "no_usable_key"  # another request
        second = leased(pool, now, excluded=frozenset({first}))
        assert {first, second} == {"a", "c"}
        assert leased(pool, now, excluded=frozenset({"a", "c"})) == "no_usable_key"
        assert leased(pool, now + 0.9) == "no_usable_key"
    record(pool, "c", OutcomeKind.OK, 4.0)
    assert [leased(pool, 4.0) for _ in range(3)] == ["c", "c", "c"]


def test_no_rejected_key_is_tried_while_another_cools() -> None:
    pool = pool_named("a", "b")
    record(pool, "a", OutcomeKind.UNAUTHORIZED, 0.0)
    record(pool, "b", OutcomeKind.RATE_LIMITED, 0.0, wait=5.0)
    assert leased(pool, 1.0) == "keys_cooling 4.000"


def test_if_all_keys_are_unusable_the_error_comes_at_once() -> None:
    pool = rejected_and_exhausted()
    assert leased(pool, 1.0) == "a"  # the one in a second
    answer = pool.lease(M, 1, NOBODY, 1.0)
    assert isinstance(answer, NoKey)
    assert answer.why == "no_usable_key"
    for words in ("a rejected", "b exhausted", "c rejected"):
        assert words in answer.detail


def test_a_model_missing_at_one_key_is_served_by_another_and_the_key_serves_others() -> None:
    pool = pool_named("a", "b")
    record(pool, "a", OutcomeKind.MODEL_MISSING, 0.0)
    assert leased(pool, 1.0) == "b"
    assert leased(pool, 1.0, "gpt-4o-mini") == "a"


def test_a_model_missing_everywhere_is_asked_for_again() -> None:
    """It may be a new model, or a slip of the client's: the upstream's 404 says it best."""
    pool = pool_named("a", "b")
    record(pool, "a", OutcomeKind.MODEL_MISSING, 0.0)
    record(pool, "b", OutcomeKind.MODEL_MISSING, 0.0)
    assert leased(pool, 1.0) == "a"
    assert leased(pool, 1.0, excluded=frozenset({"a"})) == "b"
    assert leased(pool, 1.0, excluded=frozenset({"a", "b"})) == "no_usable_key"
    record(pool, "a", OutcomeKind.RATE_LIMITED, 1.0, wait=5.0)
    assert leased(pool, 2.0, excluded=frozenset({"b"})) == "keys_cooling 4.000"


def test_a_key_without_the_model_still_obeys_the_limits() -> None:
    pool = pool_of(UpstreamKey("a", 0, ("*",)), UpstreamKey("b", 0, ("*",)), limits={"*": Limits(rpm=1, tpm=100)})
    assert [leased(pool, 0.0), leased(pool, 0.0)] == ["a", "b"]
    for name in ("a", "b"):
        record(pool, name, OutcomeKind.MODEL_MISSING, 0.0)
    assert leased(pool, 1.0) == f"throttled {MINUTE - 1:.3f}"
    assert leased(pool, 1.0, tokens=101) == "request_exceeds_limit"


def test_excluded_keys_are_not_used_for_this_request() -> None:
    pool = pool_named("a", "b", "c")
    assert leased(pool, 0.0, excluded=frozenset({"a", "b"})) == "c"
    assert leased(pool, 0.0, excluded=frozenset({"a", "b", "c"})) == "no_usable_key"


def test_ten_bad_keys_and_a_good_one() -> None:
    names = [f"k{number}" for number in range(11)]
    pool = pool_named(*names)
    for name in names[:10]:
        assert leased(pool, 0.0) == name
        record(pool, name, OutcomeKind.UNAUTHORIZED, 0.0)
    assert [leased(pool, 1.0 + number) for number in range(20)] == ["k10"] * 20


def test_the_memory_of_states_is_bounded() -> None:
    pool = pool_named("a", "b")
    for number in range(10_500):
        record(pool, "a", OutcomeKind.MODEL_MISSING, float(number) / 1000, model=f"m{number}")
        record(pool, "a", OutcomeKind.RATE_LIMITED, float(number) / 1000, 1e6, model=f"m{number}")
    assert len(pool.report(11.0)[0]["states"]) <= 20_000
    assert status(pool, "a", 11.0, "m10499").startswith("cooling")


# --- models and priorities --------------------------------------------------------------------------------------------


def test_only_keys_whose_upstream_serves_the_model() -> None:
    pool = pool_of(
        UpstreamKey("gpt", 0, ("gpt-*",)),
        UpstreamKey("mini", 1, ("gpt-4o-mini", "o1")),
        UpstreamKey("ft", 2, ("ft:*",)),
    )
    assert [key.label for group in pool.serving("gpt-4o-mini") for key in group] == ["gpt", "mini"]
    assert [leased(pool, 0.0, model) for model in ("gpt-4o", "o1", "ft:x")] == ["gpt", "mini", "ft"]
    answer = pool.lease("claude", 1, NOBODY, 0.0)
    assert isinstance(answer, NoKey)
    assert answer.why == "no_usable_key"
    assert "serves this model" in answer.detail


def test_the_memo_of_serving_keys_is_bounded() -> None:
    pool = pool_named("a")
    for number in range(5000):
        assert leased(pool, 0.0, f"m{number}") == "a"
    assert len(pool._serving) <= 4096


def tiers(**limits: Limits) -> KeyPool:
    keys = [UpstreamKey("low1", 0, ("*",), priority=0), UpstreamKey("high", 1, ("*",), priority=5)]
    keys += [UpstreamKey("low2", 0, ("*",), priority=0), UpstreamKey("higher", 2, ("*",), priority=9)]
    return pool_of(*keys, limits=limits)


def test_equal_numbers_form_one_pool_in_rising_order() -> None:
    groups = [[key.label for key in group] for group in tiers().serving(M)]
    assert groups == [["low1", "low2"], ["high"], ["higher"]]


def test_a_higher_number_serves_only_while_all_lower_ones_cool() -> None:
    pool = tiers()
    assert leased(pool, 0.0) == "low1"
    record(pool, "low1", OutcomeKind.RATE_LIMITED, 0.0, wait=10.0)
    assert leased(pool, 1.0) == "low2"
    record(pool, "low2", OutcomeKind.RATE_LIMITED, 1.0, wait=20.0)
    assert leased(pool, 2.0) == "high"
    record(pool, "high", OutcomeKind.RATE_LIMITED, 2.0, wait=5.0)
    assert leased(pool, 3.0) == "higher"
    assert leased(pool, 7.0) == "high"
    assert leased(pool, 10.0) == "low1"


def test_a_higher_number_serves_while_all_lower_ones_are_full() -> None:
    pool = tiers(**{"*": Limits(rpm=2)})
    names = [leased(pool, 0.0) for _ in range(8)]
    assert names == ["low1", "low1", "low2", "low2", "high", "high", "higher", "higher"]
    assert leased(pool, 1.0) == f"throttled {MINUTE - 1:.3f}"
    assert leased(pool, MINUTE) == "low1"


def test_a_higher_number_serves_where_the_lower_ones_were_refused() -> None:
    pool = tiers()
    assert leased(pool, 0.0, excluded=frozenset({"low1", "low2"})) == "high"
    record(pool, "low1", OutcomeKind.UNAUTHORIZED, 0.0)
    record(pool, "low2", OutcomeKind.MODEL_MISSING, 0.0)
    assert leased(pool, 1.0) == "high"
    assert leased(pool, 1.0, excluded=frozenset({"high", "higher"})) == "low2"  # the last resort


# --- limits -----------------------------------------------------------------------------------------------------------


def test_keys_of_one_quota_share_its_limits() -> None:
    keys = [
        UpstreamKey("a", 0, ("*",), quota="org"),
        UpstreamKey("b", 0, ("*",), quota="org"),
        UpstreamKey("c", 0, ("*",)),
    ]
    pool = pool_of(*keys, limits={"*": Limits(rpm=2)})
    assert [leased(pool, 0.0) for _ in range(3)] == ["a", "a", "c"]
    report = {row["name"]: row for row in pool.report(0.0)}
    assert report["c"]["limits"] == {M: {"rpm": {"limit": 2, "used": 1}}}
    assert [leased(pool, 0.0) for _ in range(2)] == ["c", f"throttled {MINUTE:.3f}"]
    assert report["a"]["limits"] == report["b"]["limits"] == {M: {"rpm": {"limit": 2, "used": 2}}}
    assert [report[name]["quota"] for name in "abc"] == ["org", "org", "c"]


def test_limits_are_per_model() -> None:
    pool = pool_named("a", limits={"gpt-4o": Limits(rpm=1), "gpt-*": Limits(rpm=2)})
    assert [leased(pool, 0.0), leased(pool, 0.0)] == ["a", f"throttled {MINUTE:.3f}"]
    assert [leased(pool, 0.0, "gpt-5") for _ in range(2)] == ["a", "a"]
    assert leased(pool, 0.0, "gpt-5").startswith("throttled")
    assert [leased(pool, 0.0, "o3") for _ in range(9)] == ["a"] * 9


def test_a_keys_own_limits_lie_over_the_common_ones() -> None:
    keys = [UpstreamKey("a", 0, ("*",), limits={"*": Limits(rpm=3)}), UpstreamKey("b", 0, ("*",))]
    pool = pool_of(*keys, limits={"*": Limits(rpm=1)})
    assert [leased(pool, 0.0) for _ in range(4)] == ["a", "a", "a", "b"]
    assert pool_of(keys[0]).limited
    assert not pool_of(keys[1]).limited


def test_only_the_share_in_use_of_a_limit_is_used() -> None:
    pool = pool_of(UpstreamKey("a", 0, ("*",)), limits={"*": Limits(rpm=10)}, use=0.5)
    assert [leased(pool, 0.0) for _ in range(6)][4:] == ["a", f"throttled {MINUTE:.3f}"]


def test_a_lease_returned_makes_room() -> None:
    pool = pool_named("a", limits={"*": Limits(concurrency=1)})
    lease = pool.lease(M, 1, NOBODY, 0.0)
    assert isinstance(lease, Lease)
    assert leased(pool, 0.0) == f"throttled {math.inf}"
    assert lease.reservation is not None
    lease.reservation.settle(1)
    assert leased(pool, 0.0) == "a"


def test_nothing_is_reserved_where_no_lease_is_given() -> None:
    pool = pool_named("a", "b", limits={"*": Limits(rpm=5, tpm=100)})
    assert leased(pool, 0.0, tokens=90) == "a"
    assert leased(pool, 0.0, tokens=90) == "b"
    before = pool.report(0.0)
    for _ in range(10):
        assert leased(pool, 0.0, tokens=90).startswith("throttled")
        assert leased(pool, 0.0, tokens=101) == "request_exceeds_limit"
    assert pool.report(0.0) == before


def test_larger_than_a_window_fails_at_once_unless_another_key_has_room() -> None:
    keys = [UpstreamKey("a", 0, ("*",)), UpstreamKey("b", 0, ("*",), limits={"*": Limits(tpm=1000)})]
    pool = pool_of(*keys, limits={"*": Limits(tpm=100)})
    assert leased(pool, 0.0, tokens=500) == "b"
    assert leased(pool, 0.0, tokens=600).startswith("throttled")  # b will have room
    assert leased(pool, 0.0, tokens=1001) == "request_exceeds_limit"
    record(pool, "b", OutcomeKind.RATE_LIMITED, 0.0, wait=7.0)
    assert leased(pool, 0.0, tokens=500) == "keys_cooling 7.000"


def test_the_reason_of_a_wait_is_the_one_that_ends_first() -> None:
    pool = pool_named("a", "b", limits={"*": Limits(rpm=1)})
    assert leased(pool, 0.0) == "a"
    record(pool, "b", OutcomeKind.RATE_LIMITED, 0.0, wait=90.0)
    assert leased(pool, 0.0) == f"throttled {MINUTE:.3f}"
    pool = pool_named("a", "b", limits={"*": Limits(rpm=1)})
    assert leased(pool, 0.0) == "a"
    record(pool, "b", OutcomeKind.RATE_LIMITED, 0.0, wait=9.0)
    assert leased(pool, 0.0) == "keys_cooling 9.000"


def test_each_pass_through_credential_has_its_own_limits() -> None:
    pool = pool_named("client", limits={"*": Limits(rpm=1)})
    for credential in ("one", "two"):
        assert isinstance(pool.lease(M, 1, NOBODY, 0.0, credential), Lease)
        assert isinstance(pool.lease(M, 1, NOBODY, 0.0, credential), NotReady)


def test_idle_rate_limiters_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("proxy.upstream.keys.pool._MAX_RATE_LIMITERS", 10)
    pool = pool_named("a", limits={"*": Limits(rpm=1)})
    for number in range(100):
        lease = pool.lease(f"m{number}", 1, NOBODY, number * 100.0)
        assert isinstance(lease, Lease)
        assert lease.reservation is not None
        lease.reservation.settle(1)
    assert len(pool._rate_limiters) <= 11


def test_headroom() -> None:
    pool = pool_named("a", "b", limits={"*": Limits(rpm=4)})
    assert [pool.headroom(key, M, 0.0) for key in pool.keys] == [1.0, 1.0]
    leased(pool, 0.0)
    assert [pool.headroom(key, M, 0.0) for key in pool.keys] == [0.75, 1.0]
    assert pool.headroom(pool.keys[0], "other", 0.0) == 1.0
    assert pool_named("a").headroom(UpstreamKey("a", 0, ("*",)), M, 0.0) == 1.0
    partly = pool_named("a", limits={"o1": Limits(rpm=1)})
    assert partly.headroom(partly.keys[0], M, 0.0) == 1.0


OUTCOMES = st.sampled_from(list(OutcomeKind))
STORY = st.lists(st.tuples(st.sampled_from("abc"), OUTCOMES, st.floats(0, 400), st.floats(0, 700)), max_size=30)


@given(STORY, st.sampled_from([{}, {"*": Limits(rpm=3)}]))
def test_a_bad_key_is_never_chosen_while_a_ready_one_has_room(
    story: list[tuple[str, OutcomeKind, float, float]], limits: dict[str, Limits]
) -> None:
    pool = pool_named("a", "b", "c", limits=limits)
    now = 0.0
    for name, outcome, step, wait in story:
        now += step
        record(pool, name, outcome, now, wait)
        ready = [key for key in pool.keys if pool.state(key.label, M, now) is None]
        room = [key for key in ready if pool.headroom(key, M, now) > 0]
        before = {key.label: pool.state(key.label, M, now) for key in pool.keys}
        answer = pool.lease(M, 1, NOBODY, now)
        if room:
            assert isinstance(answer, Lease)
            assert answer.key in room
        elif isinstance(answer, Lease):
            state = before[answer.key.label]
            assert state is not None
            assert state.status in (Status.MISSING, Status.REJECTED)
        elif isinstance(answer, NotReady):
            assert answer.wait.seconds > 0


# --- what operators see -----------------------------------------------------------------------------------------------


def test_the_report_names_labels_states_and_times() -> None:
    pool = pool_named("a", "b", priority=3)
    record(pool, "a", OutcomeKind.RATE_LIMITED, 10.0, wait=30.0)
    record(pool, "b", OutcomeKind.UNAUTHORIZED, 15.0)
    a, b = pool.report(20.0)
    assert (a["name"], a["state"], a["priority"], b["state"]) == ("a", "ready", 3, "rejected")
    assert a["states"] == [{"model": M, "state": "cooling", "since_s": 10.0, "until_s": 20.0, "reason": "why"}]
    assert [(s["model"], s["state"], s["until_s"]) for s in b["states"]] == [(ANY_MODEL, "rejected", 595.0)]
    assert pool.report(1000.0)[0]["states"] == []


def test_the_report_is_json_whatever_clients_call_a_model() -> None:
    pool = pool_named("a", limits={"*": Limits(rpm=5)})
    assert leased(pool, 0.0, "\ud800") == "a"
    record(pool, "a", OutcomeKind.MODEL_MISSING, 0.0, model="\ud800")
    (row,) = json.loads(orjson.dumps(pool.report(1.0)))
    assert row["states"][0]["model"] == "\\ud800"
    assert list(row["limits"]) == ["\\ud800"]


def test_since_is_the_start_of_the_state() -> None:
    pool = pool_named("a", "b")
    for now in (0.0, 10.0, 20.0):
        record(pool, "a", OutcomeKind.RATE_LIMITED, now, wait=30.0)
    assert pool.report(25.0)[0]["states"][0]["since_s"] == 25.0
    record(pool, "a", OutcomeKind.RATE_LIMITED, 100.0, wait=30.0)
    assert pool.report(101.0)[0]["states"][0]["since_s"] == 1.0


def test_counts_by_the_worst_state() -> None:
    pool = pool_named("a", "b", "c", "d")
    assert pool.counts_by_state(0.0) == {"ready": 4, "cooling": 0, "exhausted": 0, "rejected": 0, "missing": 0}
    record(pool, "a", OutcomeKind.RATE_LIMITED, 0.0, wait=30.0)
    record(pool, "b", OutcomeKind.QUOTA, 0.0)
    record(pool, "c", OutcomeKind.RATE_LIMITED, 0.0, wait=30.0)
    record(pool, "c", OutcomeKind.UNAUTHORIZED, 0.0)
    assert pool.counts_by_state(1.0) == {"ready": 1, "cooling": 1, "exhausted": 1, "rejected": 1, "missing": 0}
    assert pool.counts_by_state(600.0)["ready"] == 4
