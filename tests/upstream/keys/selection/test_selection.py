"""Key strategies: fair among equal keys, and more traffic where there is more headroom."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.config.limits import Limits
from proxy.upstream.keys.lease import KeyRequest, Lease, UpstreamKey
from proxy.upstream.keys.pool import KeyPool
from proxy.upstream.keys.prompt_affinity import TTL
from proxy.upstream.keys.selection import STRATEGIES
from proxy.upstream.keys.selection.auto import auto
from proxy.upstream.keys.selection.headroom import headroom
from proxy.upstream.keys.selection.round_robin import round_robin
from proxy.upstream.keys.selection.sticky import sticky
from proxy.upstream.keys.selection.weighted import weighted
from proxy.upstream.keys.states import KeyOutcome
from proxy.upstream.limits.rate_limiter import MARGIN
from proxy.upstream.retry.outcome import OutcomeKind

M = "gpt-4o"
NOBODY: frozenset[str] = frozenset()


def pool_with(strategy: str, count: int = 3, limits: dict[str, Limits] | None = None, own: int = 0) -> KeyPool:
    """own: the rpm of the first key instead of the common ones."""
    mine = {"*": Limits(rpm=own)} if own else {}
    keys = [UpstreamKey(f"k{n}", 0, ("*",), limits=mine if n == 0 else {}) for n in range(count)]
    return KeyPool(keys, STRATEGIES[strategy], limits or {})


def serve(pool: KeyPool, times: int, now: float = 0.0, model: str = M) -> list[str]:
    labels = []
    for _ in range(times):
        lease = pool.lease(model, 1, NOBODY, now)
        assert isinstance(lease, Lease)
        labels.append(lease.key.label)
    return labels


def test_the_table_of_strategies() -> None:
    names = {"auto": auto, "headroom": headroom, "round_robin": round_robin, "sticky": sticky, "weighted": weighted}
    assert names == STRATEGIES


@pytest.mark.parametrize("strategy", STRATEGIES)
@given(count=st.integers(1, 6), now=st.floats(0, 1e6))
def test_every_strategy_returns_all_keys_it_was_given(strategy: str, count: int, now: float) -> None:
    pool = pool_with(strategy, count, {"*": Limits(rpm=5)})
    order = STRATEGIES[strategy](pool.keys, pool, M, now, b"")
    assert sorted(key.label for key in order) == sorted(key.label for key in pool.keys)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("limits", [{}, {"*": Limits(rpm=1000)}], ids=["unlimited", "limited"])
def test_equal_keys_get_equal_shares(strategy: str, limits: dict[str, Limits]) -> None:
    counts = Counter(serve(pool_with(strategy, 4, limits), 400))
    assert set(counts.values()) == {100}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_without_limits_each_in_turn(strategy: str) -> None:
    assert serve(pool_with(strategy), 7) == ["k0", "k1", "k2", "k0", "k1", "k2", "k0"]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_other_keys_take_the_share_of_a_cooling_key(strategy: str) -> None:
    pool = pool_with(strategy)
    pool.record_outcome(pool.keys[1], M, KeyOutcome(OutcomeKind.RATE_LIMITED, 0.0, 30.0))
    assert Counter(serve(pool, 100, 1.0)) == {"k0": 50, "k2": 50}
    assert set(serve(pool, 3, 31.0)) == {"k0", "k1", "k2"}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_key_is_used_up_before_anybody_waits(strategy: str) -> None:
    pool = pool_with(strategy, 3, {"*": Limits(rpm=10)}, own=50)
    assert Counter(serve(pool, 70)) == {"k0": 50, "k1": 10, "k2": 10}
    assert not isinstance(pool.lease(M, 1, NOBODY, 0.0), Lease)
    assert Counter(serve(pool, 70, 60 * MARGIN)) == {"k0": 50, "k1": 10, "k2": 10}


def test_most_headroom_first() -> None:
    pool = pool_with("headroom", 2, {"*": Limits(rpm=100)})
    first, second = pool.keys
    rate_limiter = pool.rate_limiter(first, M, 0.0)
    assert rate_limiter is not None
    for _ in range(50):
        rate_limiter.reserve(1, 0.0)
    assert serve(pool, 45) == ["k1"] * 45
    assert pool.headroom(second, M, 0.0) == pytest.approx(0.55)


def test_shares_follow_the_limits() -> None:
    pool = pool_with("auto", 2, {"*": Limits(rpm=100)}, own=300)
    counts = Counter(serve(pool, 200))
    assert counts["k0"] == pytest.approx(150, abs=4)


def test_a_tiny_difference_does_not_send_all_traffic_to_one_key() -> None:
    """Two idle keys, one of them an answer ahead in a large window: they still take turns."""
    pool = pool_with("auto", 2, {"*": Limits(tpm=10_000_000)})
    counts = Counter(serve(pool, 100))
    assert counts == {"k0": 50, "k1": 50}


def test_the_least_recently_used_of_equals() -> None:
    pool = pool_with("auto", 3)
    assert serve(pool, 2) == ["k0", "k1"]
    assert serve(pool, 1, model="other") == ["k2"]  # use is the key's, whatever the model
    assert serve(pool, 3) == ["k0", "k1", "k2"]


def test_round_robin_takes_turns_per_model() -> None:
    pool = pool_with("round_robin", 2)
    assert serve(pool, 1) == ["k0"]
    assert serve(pool, 1, model="other") == ["k0"]
    assert serve(pool, 1) == ["k1"]
    assert serve(pool, 1, model="other") == ["k1"]


def test_round_robin_forgets_old_models() -> None:
    pool = pool_with("round_robin", 2)
    for number in range(5000):
        serve(pool, 1, model=f"m{number}")
    assert len(pool.turns) <= 4096


# --- prompts ----------------------------------------------------------------------------------------------------------


def asked(pool: KeyPool, prefix: bytes, now: float = 0.0, tokens: int = 1) -> str:
    lease = pool.lease(M, tokens, NOBODY, now, request=KeyRequest(prefix))
    assert isinstance(lease, Lease)
    return lease.key.label


def test_auto_stays_with_the_key_that_has_the_prompt() -> None:
    pool = pool_with("auto", 4)
    home = asked(pool, b"p")
    for number in range(20):
        serve(pool, 1)  # others come in between
        assert asked(pool, b"p", float(number)) == home
    assert asked(pool, b"q", 20.0) != home


def test_auto_spreads_prompts_evenly() -> None:
    pool = pool_with("auto", 4)
    assert set(Counter(asked(pool, str(n).encode()) for n in range(1000)).values()) == {250}


def test_auto_leaves_a_key_that_is_80_percent_used() -> None:
    pool = pool_with("auto", 2, {"*": Limits(tpm=1000)})
    home = asked(pool, b"p", tokens=700)
    assert asked(pool, b"p", tokens=90) == home
    assert asked(pool, b"p", tokens=90) == home  # 79 % before it
    assert asked(pool, b"p", tokens=90) != home


def test_auto_leaves_a_cooling_key_and_stays_on_the_new_one() -> None:
    pool = pool_with("auto", 2)
    home = asked(pool, b"p")
    pool.record_outcome(pool.by_label(home) or pool.keys[0], M, KeyOutcome(OutcomeKind.RATE_LIMITED, 0.0, 30.0))
    other = asked(pool, b"p", 1.0)
    assert other != home
    assert asked(pool, b"p", 40.0) == other  # its cache is warm now


def test_auto_forgets_after_a_while() -> None:
    pool = pool_with("auto", 2)
    home = asked(pool, b"p")
    assert asked(pool, b"p", TTL + 1.0) != home


def test_sticky_is_the_same_everywhere_and_whatever_the_load() -> None:
    first, second = pool_with("sticky", 4), pool_with("sticky", 4)
    serve(second, 7)
    prefixes = [str(n).encode() for n in range(400)]
    homes = [asked(first, prefix) for prefix in prefixes]
    assert homes == [asked(second, prefix) for prefix in prefixes]
    assert all(70 <= count <= 130 for count in Counter(homes).values())


def test_sticky_moves_only_the_share_of_a_cooling_key() -> None:
    pool = pool_with("sticky", 4)
    prefixes = [str(n).encode() for n in range(200)]
    before = {prefix: asked(pool, prefix) for prefix in prefixes}
    pool.record_outcome(pool.keys[2], M, KeyOutcome(OutcomeKind.RATE_LIMITED, 0.0, 30.0))
    after = {prefix: asked(pool, prefix, 1.0) for prefix in prefixes}
    assert all(before[prefix] == "k2" for prefix in prefixes if before[prefix] != after[prefix])


def weights(*values: float) -> KeyPool:
    return KeyPool([UpstreamKey(f"k{n}", 0, ("*",), weight=w) for n, w in enumerate(values)], weighted, {})


def test_weighted_shares_are_exact_and_interleaved() -> None:
    pool = weights(5, 1, 1)
    assert serve(pool, 7) == ["k0", "k0", "k1", "k0", "k2", "k0", "k0"]  # nginx's own example
    assert Counter(serve(pool, 700)) == {"k0": 500, "k1": 100, "k2": 100}


def test_weight_0_is_the_last_resort() -> None:
    pool = weights(1, 0)
    assert set(serve(pool, 10)) == {"k0"}
    pool.record_outcome(pool.keys[0], M, KeyOutcome(OutcomeKind.RATE_LIMITED, 0.0, 30.0))
    assert serve(pool, 1, 1.0) == ["k1"]


def test_weighted_forgets_old_models() -> None:
    pool = weights(1, 2)
    for number in range(5000):
        serve(pool, 1, model=f"m{number}")
    assert len(pool.credit) <= 4096
