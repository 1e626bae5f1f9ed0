"""Counts: which bucket a value falls into, and what is counted of a stream's reads."""

from __future__ import annotations

import math
from bisect import bisect_left

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.upstream.counters import Histogram, UpstreamCounters

BOUNDS = (0.1, 1, 10)


@pytest.mark.parametrize(
    ("value", "at"), [(-1.0, 0), (0.0, 0), (0.1, 0), (0.11, 1), (1.0, 1), (9.0, 2), (10.0, 2), (10.5, 3), (1e9, 3)]
)
def test_a_value_counts_below_the_first_bound_that_it_does_not_exceed(value: float, at: int) -> None:
    tally = Histogram(BOUNDS)
    tally.add(value)
    assert tally.counts == [int(n == at) for n in range(4)]
    assert tally.total == value


@given(st.lists(st.floats(0, 100)))
def test_buckets_are_cumulative_and_the_last_holds_all(values: list[float]) -> None:
    tally = Histogram(BOUNDS)
    for value in values:
        tally.add(value)
    assert tally.cumulative() == [
        ("0.1", sum(value <= 0.1 for value in values)),
        ("1.0", sum(value <= 1 for value in values)),
        ("10.0", sum(value <= 10 for value in values)),
        ("+Inf", len(values)),
    ]
    assert tally.total == pytest.approx(math.fsum(values))
    assert [bisect_left(BOUNDS, bound) for bound in BOUNDS] == [0, 1, 2]


def test_gaps_are_between_reads_of_one_stream() -> None:
    tallies, now = UpstreamCounters(), 100.0
    one, other = tallies.reads(lambda: now), tallies.reads(lambda: now)
    now = 100.3
    one()
    now = 100.304
    one()
    other()
    assert sum(tallies.gaps.counts) == 3
    assert tallies.gaps.total == pytest.approx(0.3 + 0.004 + 0.304)


def test_retries_by_upstream_and_reason() -> None:
    tallies = UpstreamCounters()
    for why in ("retry", "retry", "unreached"):
        tallies.record_retry("openai", why)
    assert dict(tallies.retries) == {("openai", "retry"): 2, ("openai", "unreached"): 1}
