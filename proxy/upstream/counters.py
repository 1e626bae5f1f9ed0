"""Counts of what no receipt tells: how values spread, why requests were sent again, how a stream's reads follow.

Plain numbers: they are counted on the hot path, where a metrics library costs several times as much, and are turned
into metrics when somebody asks.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Final

GAPS: Final = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)


class Histogram:
    """A histogram: how many values lie above the bound before and at most at each bound; the last count is of those
    above all.
    """

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def add(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def cumulative(self) -> list[tuple[str, float]]:
        """(the bound as text, how many values are at most that), as Prometheus wants it."""
        found, sum_ = [], 0
        for bound, count in zip((*map(float, self.bounds), float("inf")), self.counts, strict=True):
            sum_ += count
            found.append(("+Inf" if bound == float("inf") else repr(bound), float(sum_)))
        return found


class UpstreamCounters:
    """What the story counts. retries: by (upstream, why); gaps: seconds between two reads of a stream."""

    def __init__(self) -> None:
        self.retries: defaultdict[tuple[str, ...], float] = defaultdict(float)
        self.gaps = Histogram(GAPS)

    def record_retry(self, upstream: str, why: str) -> None:
        """After an attempt there, another follows. why: a `OutcomeKind`."""
        self.retries[upstream, why] += 1

    def reads(self, clock: Callable[[], float]) -> Callable[[], None]:
        """To be called at each read of one stream, which begins now. clock: monotonic seconds."""
        last, add = clock(), self.gaps.add

        def read() -> None:
            nonlocal last
            now = clock()
            add(now - last)
            last = now

        return read
