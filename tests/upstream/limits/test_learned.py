"""Remaining quotas as upstreams tell them in their headers."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.upstream.limits.learned import MAX_RESET, RemainingQuota, UpstreamLimits, parse_rate_limit_headers

A = ("a", "gpt-4o")


def headers(limit: object, remaining: object, reset: object, of: str = "requests") -> dict[str, str]:
    values = {"limit": limit, "remaining": remaining, "reset": reset}
    return {f"x-ratelimit-{name}-{of}": str(value) for name, value in values.items() if value is not None}


def learned(*received: dict[str, str]) -> UpstreamLimits:
    room = UpstreamLimits()
    for one in received:
        room.record(A, one, 0.0)
    return room


DATE = "Tue, 01 Dec 2026 12:00:00 GMT"
AT = 1796126400

SPELLINGS = {
    "Azure": {
        "x-ratelimit-remaining-requests": "2",
        "x-ratelimit-limit-requests": "60",
        "x-ratelimit-reset-requests": "30",
    },
    "Groq": {
        "x-ratelimit-remaining-requests": "2",
        "x-ratelimit-limit-requests": "60",
        "x-ratelimit-reset-requests": "30.0s",
    },
    "Mistral": {"x-ratelimit-remaining-req-minute": "2", "x-ratelimit-limit-req-minute": "60"},
    "Together": {"x-ratelimit-remaining": "2", "x-ratelimit-limit": "60", "x-ratelimit-reset": "30"},
    "OpenRouter": {"x-ratelimit-remaining": "2", "x-ratelimit-limit": "60", "x-ratelimit-reset": f"{AT + 30}000"},
    "Unix seconds": {"x-ratelimit-remaining": "2", "x-ratelimit-limit": "60", "x-ratelimit-reset": f"{AT + 30}"},
    "Anthropic": {
        "anthropic-ratelimit-requests-remaining": "2",
        "anthropic-ratelimit-requests-limit": "60",
        "anthropic-ratelimit-requests-reset": "2026-12-01T12:00:30Z",
    },
}


@pytest.mark.parametrize(("provider", "told"), SPELLINGS.items(), ids=SPELLINGS.keys())
def test_a_limit_is_read_in_every_providers_spelling(provider: str, told: dict[str, str]) -> None:
    [(dimension, quota)] = parse_rate_limit_headers({"date": DATE, **told}, 0.0)
    assert (dimension, quota.limit, quota.remaining) == ("requests", 60, 2)
    assert quota.reset == (MAX_RESET if provider == "Mistral" else 30.0)


@pytest.mark.parametrize(
    "told",
    [
        {"x-ratelimitbysize-remaining-minute": "500", "x-ratelimitbysize-limit-minute": "30000"},
        {"x-tokenlimit-remaining": "500", "x-tokenlimit-limit": "30000"},
        {"x-ratelimit-remaining-tokens-minute": "500", "x-ratelimit-limit-tokens-minute": "30000"},
        {"anthropic-ratelimit-tokens-remaining": "500", "anthropic-ratelimit-tokens-limit": "30000"},
    ],
)
def test_tokens_too(told: dict[str, str]) -> None:
    [(dimension, quota)] = parse_rate_limit_headers(told, 0.0)
    assert (dimension, quota.limit, quota.remaining) == ("tokens", 30_000, 500)


def test_the_remaining_quota_is_used_and_then_requests_wait() -> None:
    room = learned(headers(60, 2, "58s"))
    for wait in (0.0, 0.0, 1.0):
        assert room.wait(A, 0, 0.0) == pytest.approx(wait)
        room.record_sent(A, 0)


def test_the_quota_comes_back_evenly() -> None:
    room = learned(headers(60, 0, "60s"))
    assert room.wait(A, 0, 0.0) == pytest.approx(1.0)
    assert room.wait(A, 0, 1.0) == 0.0
    assert room.headroom(A, 30.0) == pytest.approx(0.5)


def test_tokens_are_counted_as_tokens() -> None:
    room = learned(headers(30_000, 500, "59s", "tokens"))
    assert room.wait(A, 400, 0.0) == 0.0
    assert room.wait(A, 1000, 0.0) == pytest.approx(1.0)
    assert room.counts_tokens
    assert room.wait(A, 10**9, 0.0) == 0.0  # more than the limit: upstream may judge it
    room.record_sent(A, 10**9)
    assert room.wait(A, 400, 0.0) == 0.0


def test_the_tighter_dimension_decides() -> None:
    room = learned(headers(500, 499, "120ms") | headers(30_000, 3_000, "54s", "tokens"))
    assert room.headroom(A, 0.0) == pytest.approx(0.1)
    assert room.usage(A, 0.0) == {
        "requests": {"limit": 500, "used": 1},
        "tokens": {"limit": 30_000, "used": 27_000},
    }


def test_a_later_answer_takes_the_place_of_the_earlier() -> None:
    room = learned(headers(60, 0, "60s"), headers(60, 30, "30s"))
    assert room.wait(A, 0, 0.0) == 0.0
    assert room.headroom(A, 0.0) == pytest.approx(0.5)


def test_keys_and_models_are_apart() -> None:
    room = learned(headers(60, 0, "60s"))
    assert room.wait(("b", "gpt-4o"), 0, 0.0) == room.wait(("a", "o1"), 0, 0.0) == 0.0
    assert room.models("a") == ["gpt-4o"]


NONSENSE = [
    headers(-1, -1, -1),
    headers(0, 0, 0),
    headers(10, 0, 0),  # Azure, and lookalikes: nothing left, and never again
    headers(10, 0, None),
    headers("many", "some", "soon"),
    headers("", "", ""),
    headers("1e400", "1e400", "1s"),
    headers(10**30, 10**30, "1s"),
    headers("nan", "nan", "nan"),
    headers(10, None, "60s"),
    {},
]


@pytest.mark.parametrize("headers", NONSENSE)
def test_nonsense_in_headers_is_ignored(headers: dict[str, str]) -> None:
    room = learned(headers)
    assert room.wait(A, 1000, 0.0) == 0.0
    assert room.headroom(A, 0.0) == 1.0
    assert room.usage(A, 0.0) == {}


def test_azure_tells_no_limit_and_no_reset() -> None:
    room = learned({"x-ratelimit-remaining-requests": "2", "x-ratelimit-remaining-tokens": "900"})
    assert room.wait(A, 900, 0.0) == 0.0
    assert room.wait(A, 901, 0.0) == MAX_RESET
    assert room.headroom(A, 0.0) == 1.0  # a share of what?


@pytest.mark.parametrize("reset", ["9999h", "999999999", "1e30"])
def test_no_header_blocks_a_key_for_long(reset: str) -> None:
    room = learned(headers(1, 0, reset))
    assert 0 < room.wait(A, 0, 0.0) <= MAX_RESET
    assert room.wait(A, 0, MAX_RESET) == 0.0


TEXT = st.one_of(
    st.none(), st.text(max_size=12), st.floats().map(str), st.integers(-5, 10**6).map(str), st.just("6m0s")
)


@given(st.lists(st.tuples(TEXT, TEXT, TEXT, st.sampled_from(["requests", "tokens"]), st.floats(0, 90)), max_size=8))
def test_no_header_makes_a_request_wait_over_a_minute(
    story: list[tuple[object, object, object, str, float]],
) -> None:
    room, now = UpstreamLimits(), 0.0
    for limit, remaining, reset, of, step in story:
        now += step
        room.record(A, headers(limit, remaining, reset, of), now)
        room.record_sent(A, 100)
        assert 0.0 <= room.wait(A, 1000, now) <= MAX_RESET + 0.001
        assert 0.0 <= room.headroom(A, now) <= 1.0
        room.usage(A, now)


@given(st.integers(1, 1000), st.integers(0, 1000), st.floats(0.1, 60), st.integers(0, 2000), st.floats(0, 60))
def test_after_the_wait_there_is_room(limit: int, remaining: int, reset: float, amount: int, taken: float) -> None:
    room = RemainingQuota(max(limit, remaining), remaining, reset, 0.0, min(taken, remaining))
    wait = room.wait(amount, 0.0)
    assert room.wait(amount, wait + 1e-6) <= 1e-3


def test_memory_is_bounded() -> None:
    room = UpstreamLimits()
    for number in range(10_500):
        room.record(("a", f"m{number}"), headers(10, 1, "1s"), 0.0)
    assert len(room.models("a")) == 10_000


def test_both_dimensions_of_one_answer() -> None:
    result = dict(parse_rate_limit_headers(headers(5, 4, "1s") | headers(100, 50, "6m0s", "tokens"), 7.0))
    assert result["requests"] == RemainingQuota(5.0, 4.0, 1.0, 7.0)
    assert result["tokens"] == RemainingQuota(100.0, 50.0, MAX_RESET, 7.0)
