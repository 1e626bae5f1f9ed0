"""The pool of keys with a turned clock: states, priorities, quotas, fairness (contract 7, Keys; contract 3)."""

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
from proxy.upstream.keys.states import ANY_MODEL, UNUSABLE_FOR, Status
from proxy.upstream.limits.rate_limiter import MARGIN
from proxy.upstream.retry.outcome import OutcomeKind

M = "gpt-4o"
NOBODY: frozenset[str] = frozenset()
MINUTE = 60 * MARGIN


def in_order(keys: Sequence[UpstreamKey], ring: KeyPool, model: str, now: float, prefix: bytes) -> list[UpstreamKey]:
    return list(keys)


def pool(*names: str, limits: Mapping[str, Limits] | None = None, **fields: Any) -> KeyPool:
    return KeyPool([UpstreamKey(name, 0, ("*",), **fields) for name in names], in_order, limits or {})


def ring_of(*keys: UpstreamKey, limits: Mapping[str, Limits] | None = None, use: float = 1.0) -> KeyPool:
    return KeyPool(keys, in_order, limits or {}, use)


def got(ring: KeyPool, now: float, model: str = M, tokens: int = 1, excluded: frozenset[str] = NOBODY) -> str:
    """The label of the leased key, or what there was instead."""
    answer = ring.lease(model, tokens, excluded, now)
    match answer:
        case Lease(key):
            return key.label
        case NotReady(wait, why):
            return f"{why} {wait.seconds:.3f}"
        case NoKey(why):
            return why


def learn(ring: KeyPool, name: str, outcome: OutcomeKind, now: float, wait: float = 0.0, model: str = M) -> None:
    key = next(key for key in ring.keys if key.label == name)
    ring.record_outcome(key, model, outcome, now, wait, "why")


def status(ring: KeyPool, name: str, now: float, model: str = M) -> str:
    state = ring.state(name, model, now)
    return "ready" if state is None else f"{state.status.value} {state.until - now:.0f}"


# --- cooling ----------------------------------------------------------------------------------------------------------


def test_a_limited_key_cools_and_the_other_serves() -> None:
    ring = pool("a", "b")
    learn(ring, "a", OutcomeKind.RATE_LIMITED, 0.0, wait=30.0)
    assert got(ring, 1.0) == "b"
    assert status(ring, "a", 1.0) == "cooling 29"
    assert got(ring, 29.99) == "b"
    assert status(ring, "a", 30.0) == "ready"
    assert got(ring, 30.0) == "a"


def test_cooling_is_a_matter_of_one_model() -> None:
    ring = pool("a")
    learn(ring, "a", OutcomeKind.RATE_LIMITED, 0.0, wait=30.0)
    assert got(ring, 1.0, "gpt-4o-mini") == "a"


def test_when_all_cool_the_wait_is_that_of_the_first_to_return() -> None:
    ring = pool("a", "b")
    learn(ring, "a", OutcomeKind.RATE_LIMITED, 0.0, wait=30.0)
    learn(ring, "b", OutcomeKind.RATE_LIMITED, 0.0, wait=12.0)
    assert got(ring, 2.0) == "keys_cooling 10.000"


def test_a_single_key_cools_like_any() -> None:
    ring = pool("a")
    learn(ring, "a", OutcomeKind.RATE_LIMITED, 0.0, wait=30.0)
    assert got(ring, 0.0) == "keys_cooling 30.000"
    assert got(ring, 30.0) == "a"


COOLERS = st.lists(st.tuples(st.floats(0, 50), st.floats(0, 200)), min_size=1, max_size=10)


@given(COOLERS)
def test_cooling_is_extended_never_shortened(story: list[tuple[float, float]]) -> None:
    ring = pool("a", "b")
    now, until = 0.0, 0.0
    for step, wait in story:
        now += step
        learn(ring, "a", OutcomeKind.RATE_LIMITED, now, wait)
        until = max(until, now + wait)
        state = ring.state("a", M, now)
        assert (state.until if state is not None else now) == max(until, now)
    assert status(ring, "a", until) == "ready"


def test_success_and_other_answers_do_not_shorten_cooling() -> None:
    """A request that was under way when the limit was hit proves nothing about the limit."""
    ring = pool("a", "b")
    learn(ring, "a", OutcomeKind.RATE_LIMITED, 0.0, wait=30.0)
    for outcome in (
        OutcomeKind.OK,
        OutcomeKind.FINAL,
        OutcomeKind.RETRY,
        OutcomeKind.TIMEOUT,
        OutcomeKind.INVALID,
        OutcomeKind.AMBIGUOUS,
        OutcomeKind.UNREACHED,
    ):
        learn(ring, "a", outcome, 1.0)
        assert status(ring, "a", 1.0) == "cooling 29"


@pytest.mark.parametrize("first", ["limit", "refusal"])
@pytest.mark.parametrize(
    "trouble", [OutcomeKind.FORBIDDEN, OutcomeKind.MODEL_MISSING, OutcomeKind.UNAUTHORIZED, OutcomeKind.QUOTA]
)
def test_cooling_and_a_refusal_stand_side_by_side(trouble: OutcomeKind, first: str) -> None:
    """Two requests under way at once can end with both; neither deadline is lost to the other."""
    for wait in (30.0, 3600.0):
        ring = pool("a", "b")
        learn(ring, "b", OutcomeKind.UNAUTHORIZED, 0.0)
        outcomes = [OutcomeKind.RATE_LIMITED, trouble]
        for outcome in outcomes if first == "limit" else reversed(outcomes):
            learn(ring, "a", outcome, 0.0, wait if outcome is OutcomeKind.RATE_LIMITED else 0.0)
        assert status(ring, "a", 1.0).endswith(f" {max(wait, UNUSABLE_FOR) - 1:.0f}")
        assert got(ring, min(wait, UNUSABLE_FOR) - 1.0) != "a"
        if wait > UNUSABLE_FOR:
            assert got(ring, UNUSABLE_FOR, excluded=frozenset({"b"})) == f"keys_cooling {wait - UNUSABLE_FOR:.3f}"
        assert got(ring, max(wait, UNUSABLE_FOR)) == "a"


def test_a_single_key_that_rests_still_cools() -> None:
    ring = pool("a")
    learn(ring, "a", OutcomeKind.QUOTA, 0.0)
    assert got(ring, 1.0) == "a"
    learn(ring, "a", OutcomeKind.RATE_LIMITED, 1.0, wait=30.0)
    assert got(ring, 2.0) == "keys_cooling 29.000"
    assert got(ring, 31.0) == "a"


# --- exhausted, rejected, missing -------------------------------------------------------------------------------------

RESTS = {
    OutcomeKind.QUOTA: ("exhausted", True),
    OutcomeKind.UNAUTHORIZED: ("rejected", True),
    OutcomeKind.FORBIDDEN: ("rejected", False),
    OutcomeKind.MODEL_MISSING: ("missing", False),
}
"""Outcome -> (state, whether it is the whole key's)."""


@pytest.mark.parametrize("outcome", RESTS)
def test_a_bad_key_rests_ten_minutes_and_is_tried_again(outcome: OutcomeKind) -> None:
    name, whole = RESTS[outcome]
    ring = pool("a", "b")
    learn(ring, "a", outcome, 100.0)
    assert status(ring, "a", 100.0) == f"{name} 600"
    assert [got(ring, now) for now in (100.0, 400.0, 699.9, 700.0)] == ["b", "b", "b", "a"]
    learn(ring, "a", outcome, 700.0)
    assert got(ring, 1299.9) == "b"
    assert (got(ring, 800.0, "other-model") == "b") is whole


@pytest.mark.parametrize("outcome", RESTS)
def test_an_answer_proves_that_the_key_works(outcome: OutcomeKind) -> None:
    ring = pool("a", "b")
    learn(ring, "a", outcome, 0.0)
    learn(ring, "a", OutcomeKind.OK, 1.0)
    assert status(ring, "a", 1.0) == "ready"


@pytest.mark.parametrize(
    "outcome", [OutcomeKind.RETRY, OutcomeKind.UNREACHED, OutcomeKind.STALE, OutcomeKind.AMBIGUOUS, OutcomeKind.TIMEOUT]
)
def test_an_upstreams_trouble_is_not_the_keys(outcome: OutcomeKind) -> None:
    ring = pool("a", "b")
    for _ in range(25):
        learn(ring, "a", outcome, 0.0)
    assert status(ring, "a", 0.0) == "ready"
    learn(ring, "a", OutcomeKind.UNAUTHORIZED, 0.0)
    learn(ring, "a", outcome, 1.0)
    assert status(ring, "a", 1.0) == "rejected 599"  # nor does it prove anything


@pytest.mark.parametrize("outcome", RESTS)
def test_a_single_key_is_never_blacked_out(outcome: OutcomeKind) -> None:
    """Without another key the upstream's own answer helps the client more than ours."""
    ring = pool("a")
    learn(ring, "a", outcome, 0.0)
    assert got(ring, 1.0) == "a"
    assert got(ring, 1.0, excluded=frozenset({"a"})) == "no_usable_key"


def test_all_keys_bad_is_said_at_once() -> None:
    ring = pool("a", "b", "c")
    learn(ring, "a", OutcomeKind.UNAUTHORIZED, 0.0)
    learn(ring, "b", OutcomeKind.QUOTA, 0.0)
    learn(ring, "c", OutcomeKind.FORBIDDEN, 0.0)
    answer = ring.lease(M, 1, NOBODY, 1.0)
    assert isinstance(answer, NoKey)
    assert answer.why == "no_usable_key"
    for words in ("a rejected", "b exhausted", "c rejected"):
        assert words in answer.detail


def test_a_model_missing_at_one_key_is_served_by_another_and_the_key_serves_others() -> None:
    ring = pool("a", "b")
    learn(ring, "a", OutcomeKind.MODEL_MISSING, 0.0)
    assert got(ring, 1.0) == "b"
    assert got(ring, 1.0, "gpt-4o-mini") == "a"


def test_a_model_missing_everywhere_is_asked_for_again() -> None:
    """It may be a new model, or a slip of the client's: the upstream's 404 says it best."""
    ring = pool("a", "b")
    learn(ring, "a", OutcomeKind.MODEL_MISSING, 0.0)
    learn(ring, "b", OutcomeKind.MODEL_MISSING, 0.0)
    assert got(ring, 1.0) == "a"
    assert got(ring, 1.0, excluded=frozenset({"a"})) == "b"
    assert got(ring, 1.0, excluded=frozenset({"a", "b"})) == "no_usable_key"
    learn(ring, "a", OutcomeKind.RATE_LIMITED, 1.0, wait=5.0)
    assert got(ring, 2.0, excluded=frozenset({"b"})) == "keys_cooling 4.000"


def test_a_missing_model_is_no_way_round_the_limits() -> None:
    ring = ring_of(UpstreamKey("a", 0, ("*",)), UpstreamKey("b", 0, ("*",)), limits={"*": Limits(rpm=1, tpm=100)})
    assert [got(ring, 0.0), got(ring, 0.0)] == ["a", "b"]
    for name in ("a", "b"):
        learn(ring, name, OutcomeKind.MODEL_MISSING, 0.0)
    assert got(ring, 1.0) == f"throttled {MINUTE - 1:.3f}"
    assert got(ring, 1.0, tokens=101) == "request_exceeds_limit"


def test_excluded_keys_are_not_used_for_this_request() -> None:
    ring = pool("a", "b", "c")
    assert got(ring, 0.0, excluded=frozenset({"a", "b"})) == "c"
    assert got(ring, 0.0, excluded=frozenset({"a", "b", "c"})) == "no_usable_key"


def test_ten_bad_keys_and_a_good_one() -> None:
    names = [f"k{number}" for number in range(11)]
    ring = pool(*names)
    for name in names[:10]:
        assert got(ring, 0.0) == name
        learn(ring, name, OutcomeKind.UNAUTHORIZED, 0.0)
    assert [got(ring, 1.0 + number) for number in range(20)] == ["k10"] * 20


def test_the_memory_of_states_is_bounded() -> None:
    ring = pool("a", "b")
    for number in range(10_500):
        learn(ring, "a", OutcomeKind.MODEL_MISSING, float(number) / 1000, model=f"m{number}")
        learn(ring, "a", OutcomeKind.RATE_LIMITED, float(number) / 1000, 1e6, model=f"m{number}")
    assert len(ring.report(11.0)[0]["states"]) <= 20_000
    assert status(ring, "a", 11.0, "m10499").startswith("cooling")


# --- models and priorities --------------------------------------------------------------------------------------------


def test_only_keys_whose_upstream_serves_the_model() -> None:
    ring = ring_of(
        UpstreamKey("gpt", 0, ("gpt-*",)),
        UpstreamKey("mini", 1, ("gpt-4o-mini", "o1")),
        UpstreamKey("ft", 2, ("ft:*",)),
    )
    assert [key.label for group in ring.serving("gpt-4o-mini") for key in group] == ["gpt", "mini"]
    assert [got(ring, 0.0, model) for model in ("gpt-4o", "o1", "ft:x")] == ["gpt", "mini", "ft"]
    answer = ring.lease("claude", 1, NOBODY, 0.0)
    assert isinstance(answer, NoKey)
    assert answer.why == "no_usable_key"
    assert "serves this model" in answer.detail


def test_many_models_do_not_pile_up() -> None:
    ring = pool("a")
    for number in range(5000):
        assert got(ring, 0.0, f"m{number}") == "a"
    assert len(ring._serving) <= 4096


def tiers(**limits: Limits) -> KeyPool:
    keys = [UpstreamKey("low1", 0, ("*",), priority=0), UpstreamKey("high", 1, ("*",), priority=5)]
    keys += [UpstreamKey("low2", 0, ("*",), priority=0), UpstreamKey("higher", 2, ("*",), priority=9)]
    return ring_of(*keys, limits=limits)


def test_equal_numbers_form_one_pool_in_rising_order() -> None:
    groups = [[key.label for key in group] for group in tiers().serving(M)]
    assert groups == [["low1", "low2"], ["high"], ["higher"]]


def test_a_higher_number_serves_only_while_all_lower_ones_cool() -> None:
    ring = tiers()
    assert got(ring, 0.0) == "low1"
    learn(ring, "low1", OutcomeKind.RATE_LIMITED, 0.0, wait=10.0)
    assert got(ring, 1.0) == "low2"
    learn(ring, "low2", OutcomeKind.RATE_LIMITED, 1.0, wait=20.0)
    assert got(ring, 2.0) == "high"
    learn(ring, "high", OutcomeKind.RATE_LIMITED, 2.0, wait=5.0)
    assert got(ring, 3.0) == "higher"
    assert got(ring, 7.0) == "high"
    assert got(ring, 10.0) == "low1"


def test_a_higher_number_serves_while_all_lower_ones_are_full() -> None:
    ring = tiers(**{"*": Limits(rpm=2)})
    names = [got(ring, 0.0) for _ in range(8)]
    assert names == ["low1", "low1", "low2", "low2", "high", "high", "higher", "higher"]
    assert got(ring, 1.0) == f"throttled {MINUTE - 1:.3f}"
    assert got(ring, MINUTE) == "low1"


def test_a_higher_number_serves_where_the_lower_ones_were_refused() -> None:
    ring = tiers()
    assert got(ring, 0.0, excluded=frozenset({"low1", "low2"})) == "high"
    learn(ring, "low1", OutcomeKind.UNAUTHORIZED, 0.0)
    learn(ring, "low2", OutcomeKind.MODEL_MISSING, 0.0)
    assert got(ring, 1.0) == "high"
    assert got(ring, 1.0, excluded=frozenset({"high", "higher"})) == "low2"  # the last resort


# --- limits -----------------------------------------------------------------------------------------------------------


def test_keys_of_one_quota_share_its_limits() -> None:
    keys = [
        UpstreamKey("a", 0, ("*",), quota="org"),
        UpstreamKey("b", 0, ("*",), quota="org"),
        UpstreamKey("c", 0, ("*",)),
    ]
    ring = ring_of(*keys, limits={"*": Limits(rpm=2)})
    assert [got(ring, 0.0) for _ in range(3)] == ["a", "a", "c"]
    report = {row["name"]: row for row in ring.report(0.0)}
    assert report["c"]["limits"] == {M: {"rpm": {"limit": 2, "used": 1}}}
    assert [got(ring, 0.0) for _ in range(2)] == ["c", f"throttled {MINUTE:.3f}"]
    assert report["a"]["limits"] == report["b"]["limits"] == {M: {"rpm": {"limit": 2, "used": 2}}}
    assert [report[name]["quota"] for name in "abc"] == ["org", "org", "c"]


def test_limits_are_per_model() -> None:
    ring = pool("a", limits={"gpt-4o": Limits(rpm=1), "gpt-*": Limits(rpm=2)})
    assert [got(ring, 0.0), got(ring, 0.0)] == ["a", f"throttled {MINUTE:.3f}"]
    assert [got(ring, 0.0, "gpt-5") for _ in range(2)] == ["a", "a"]
    assert got(ring, 0.0, "gpt-5").startswith("throttled")
    assert [got(ring, 0.0, "o3") for _ in range(9)] == ["a"] * 9


def test_a_keys_own_limits_lie_over_the_common_ones() -> None:
    keys = [UpstreamKey("a", 0, ("*",), limits={"*": Limits(rpm=3)}), UpstreamKey("b", 0, ("*",))]
    ring = ring_of(*keys, limits={"*": Limits(rpm=1)})
    assert [got(ring, 0.0) for _ in range(4)] == ["a", "a", "a", "b"]
    assert ring_of(keys[0]).limited
    assert not ring_of(keys[1]).limited


def test_the_share_to_use() -> None:
    ring = ring_of(UpstreamKey("a", 0, ("*",)), limits={"*": Limits(rpm=10)}, use=0.5)
    assert [got(ring, 0.0) for _ in range(6)][4:] == ["a", f"throttled {MINUTE:.3f}"]


def test_a_lease_returned_makes_room() -> None:
    ring = pool("a", limits={"*": Limits(concurrency=1)})
    lease = ring.lease(M, 1, NOBODY, 0.0)
    assert isinstance(lease, Lease)
    assert got(ring, 0.0) == f"throttled {math.inf}"
    assert lease.reservation is not None
    lease.reservation.settle(1)
    assert got(ring, 0.0) == "a"


def test_nothing_is_reserved_where_no_lease_is_given() -> None:
    ring = pool("a", "b", limits={"*": Limits(rpm=5, tpm=100)})
    assert got(ring, 0.0, tokens=90) == "a"
    assert got(ring, 0.0, tokens=90) == "b"
    before = ring.report(0.0)
    for _ in range(10):
        assert got(ring, 0.0, tokens=90).startswith("throttled")
        assert got(ring, 0.0, tokens=101) == "request_exceeds_limit"
    assert ring.report(0.0) == before


def test_larger_than_a_window_fails_at_once_unless_another_key_has_room() -> None:
    keys = [UpstreamKey("a", 0, ("*",)), UpstreamKey("b", 0, ("*",), limits={"*": Limits(tpm=1000)})]
    ring = ring_of(*keys, limits={"*": Limits(tpm=100)})
    assert got(ring, 0.0, tokens=500) == "b"
    assert got(ring, 0.0, tokens=600).startswith("throttled")  # b will have room
    assert got(ring, 0.0, tokens=1001) == "request_exceeds_limit"
    learn(ring, "b", OutcomeKind.RATE_LIMITED, 0.0, wait=7.0)
    assert got(ring, 0.0, tokens=500) == "keys_cooling 7.000"


def test_why_one_waits_is_what_ends_first() -> None:
    ring = pool("a", "b", limits={"*": Limits(rpm=1)})
    assert got(ring, 0.0) == "a"
    learn(ring, "b", OutcomeKind.RATE_LIMITED, 0.0, wait=90.0)
    assert got(ring, 0.0) == f"throttled {MINUTE:.3f}"
    ring = pool("a", "b", limits={"*": Limits(rpm=1)})
    assert got(ring, 0.0) == "a"
    learn(ring, "b", OutcomeKind.RATE_LIMITED, 0.0, wait=9.0)
    assert got(ring, 0.0) == "keys_cooling 9.000"


def test_each_pass_through_credential_has_its_own_limits() -> None:
    ring = pool("client", limits={"*": Limits(rpm=1)})
    for credential in ("one", "two"):
        assert isinstance(ring.lease(M, 1, NOBODY, 0.0, credential), Lease)
        assert isinstance(ring.lease(M, 1, NOBODY, 0.0, credential), NotReady)


def test_idle_allowances_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("proxy.upstream.keys.pool._MAX_RATE_LIMITERS", 10)
    ring = pool("a", limits={"*": Limits(rpm=1)})
    for number in range(100):
        lease = ring.lease(f"m{number}", 1, NOBODY, number * 100.0)
        assert isinstance(lease, Lease)
        assert lease.reservation is not None
        lease.reservation.settle(1)
    assert len(ring._allowances) <= 11


def test_headroom() -> None:
    ring = pool("a", "b", limits={"*": Limits(rpm=4)})
    assert [ring.headroom(key, M, 0.0) for key in ring.keys] == [1.0, 1.0]
    got(ring, 0.0)
    assert [ring.headroom(key, M, 0.0) for key in ring.keys] == [0.75, 1.0]
    assert ring.headroom(ring.keys[0], "other", 0.0) == 1.0
    assert pool("a").headroom(UpstreamKey("a", 0, ("*",)), M, 0.0) == 1.0
    partly = pool("a", limits={"o1": Limits(rpm=1)})
    assert partly.headroom(partly.keys[0], M, 0.0) == 1.0


OUTCOMES = st.sampled_from(list(OutcomeKind))
STORY = st.lists(st.tuples(st.sampled_from("abc"), OUTCOMES, st.floats(0, 400), st.floats(0, 700)), max_size=30)


@given(STORY, st.sampled_from([{}, {"*": Limits(rpm=3)}]))
def test_a_bad_key_is_never_chosen_while_a_ready_one_has_room(
    story: list[tuple[str, OutcomeKind, float, float]], limits: dict[str, Limits]
) -> None:
    ring = pool("a", "b", "c", limits=limits)
    now = 0.0
    for name, outcome, step, wait in story:
        now += step
        learn(ring, name, outcome, now, wait)
        ready = [key for key in ring.keys if ring.state(key.label, M, now) is None]
        room = [key for key in ready if ring.headroom(key, M, now) > 0]
        before = {key.label: ring.state(key.label, M, now) for key in ring.keys}
        answer = ring.lease(M, 1, NOBODY, now)
        if room:
            assert isinstance(answer, Lease)
            assert answer.key in room
        elif isinstance(answer, Lease):
            state = before[answer.key.label]
            assert state is not None
            assert state.status is Status.MISSING
        elif isinstance(answer, NotReady):
            assert answer.wait.seconds > 0


# --- what operators see -----------------------------------------------------------------------------------------------


def test_the_report_names_labels_states_and_times() -> None:
    ring = pool("a", "b", priority=3)
    learn(ring, "a", OutcomeKind.RATE_LIMITED, 10.0, wait=30.0)
    learn(ring, "b", OutcomeKind.UNAUTHORIZED, 15.0)
    a, b = ring.report(20.0)
    assert (a["name"], a["state"], a["priority"], b["state"]) == ("a", "ready", 3, "rejected")
    assert a["states"] == [{"model": M, "state": "cooling", "since_s": 10.0, "until_s": 20.0, "reason": "why"}]
    assert [(s["model"], s["state"], s["until_s"]) for s in b["states"]] == [(ANY_MODEL, "rejected", 595.0)]
    assert ring.report(1000.0)[0]["states"] == []


def test_the_report_is_json_whatever_clients_call_a_model() -> None:
    ring = pool("a", limits={"*": Limits(rpm=5)})
    assert got(ring, 0.0, "\ud800") == "a"
    learn(ring, "a", OutcomeKind.MODEL_MISSING, 0.0, model="\ud800")
    (row,) = json.loads(orjson.dumps(ring.report(1.0)))
    assert row["states"][0]["model"] == "\\ud800"
    assert list(row["limits"]) == ["\\ud800"]


def test_since_is_when_it_began() -> None:
    ring = pool("a", "b")
    for now in (0.0, 10.0, 20.0):
        learn(ring, "a", OutcomeKind.RATE_LIMITED, now, wait=30.0)
    assert ring.report(25.0)[0]["states"][0]["since_s"] == 25.0
    learn(ring, "a", OutcomeKind.RATE_LIMITED, 100.0, wait=30.0)
    assert ring.report(101.0)[0]["states"][0]["since_s"] == 1.0


def test_counts_by_the_worst_state() -> None:
    ring = pool("a", "b", "c", "d")
    assert ring.counts(0.0) == {"ready": 4, "cooling": 0, "exhausted": 0, "rejected": 0, "missing": 0}
    learn(ring, "a", OutcomeKind.RATE_LIMITED, 0.0, wait=30.0)
    learn(ring, "b", OutcomeKind.QUOTA, 0.0)
    learn(ring, "c", OutcomeKind.RATE_LIMITED, 0.0, wait=30.0)
    learn(ring, "c", OutcomeKind.UNAUTHORIZED, 0.0)
    assert ring.counts(1.0) == {"ready": 1, "cooling": 1, "exhausted": 1, "rejected": 1, "missing": 0}
    assert ring.counts(600.0)["ready"] == 4
