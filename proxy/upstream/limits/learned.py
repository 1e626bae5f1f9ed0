"""The room an upstream says it has left for a key: its `x-ratelimit-*` headers (contract 7, Limits).

What is learned only tightens what is configured, and never holds a request back for longer than `LONGEST`: a header is
a hint, and when it misleads, the answer to the next request sets it right.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final, Literal

from ..retry.outcome import read_number, read_reset

Dimension = Literal["requests", "tokens"]
DIMENSIONS: Final[tuple[Dimension, ...]] = ("requests", "tokens")

LONGEST: Final = 60.0
"""Seconds after which what an answer told is forgotten, and which a reset may be away at most."""

_MOST: Final = 1e12
_MAX_QUOTAS: Final = 10_000

Where = tuple[str, str]
"""(quota, model)"""


@dataclass(slots=True)
class RemainingQuota:
    """What was left of one limit at `seen` (monotonic s), and is whole again `reset` seconds later; limit 0: not told.

    Upstream's windows slide: room comes back evenly until then (https://platform.openai.com/docs/guides/rate-limits).
    """

    limit: float
    remaining: float
    reset: float
    seen: float
    taken: float = 0.0

    def left(self, now: float) -> float:
        """How much may be left at `now`, less what was sent since."""
        return self.remaining + self._back(now - self.seen) - self.taken

    def _back(self, seconds: float) -> float:
        if seconds >= self.reset:
            return max(self.limit - self.remaining, self.taken)
        return max(self.limit - self.remaining, 0.0) * seconds / self.reset

    def wait(self, amount: float, now: float) -> float:
        """Seconds until `amount` is there; 0.0 now. What is larger than the whole limit is the upstream's to judge."""
        if 0 < self.limit < amount:
            return 0.0
        lacking = amount - self.left(now)
        if lacking <= 1e-9:
            return 0.0
        until_reset = max(self.seen + self.reset - now, 0.0)
        rate = max(self.limit - self.remaining, 0.0) / self.reset
        return min(lacking / rate, until_reset) if rate > 0 else until_reset


def parse_rate_limit_headers(headers: Mapping[str, str], now: float) -> Iterator[tuple[Dimension, RemainingQuota]]:
    """What an answer tells of each dimension; nonsense (text, negative, huge) is as if it were not there."""
    for dimension in DIMENSIONS:
        remaining = read_number(headers.get(f"x-ratelimit-remaining-{dimension}"))
        if remaining is None or remaining > _MOST:
            continue
        limit = read_number(headers.get(f"x-ratelimit-limit-{dimension}")) or 0.0
        if limit > _MOST:
            limit = 0.0
        reset = read_reset(headers.get(f"x-ratelimit-reset-{dimension}"))
        if remaining == 0.0 and (reset is None or limit == 0.0):
            continue  # Azure and lookalikes answer zeros where they tell nothing
        yield (
            dimension,
            RemainingQuota(max(limit, remaining) if limit else 0.0, remaining, min(reset or LONGEST, LONGEST), now),
        )


_NOTHING_TOLD: Final[Mapping[Dimension, RemainingQuota]] = {}


class UpstreamLimits:
    """The room each (quota, model) was told of last. `tokens`: whether any answer spoke of tokens."""

    def __init__(self) -> None:
        self._rooms: OrderedDict[Where, dict[Dimension, RemainingQuota]] = OrderedDict()
        self.tokens = False

    def record(self, where: Where, headers: Mapping[str, str], now: float) -> None:
        """Takes note of an answer's headers. Never raises."""
        told = dict(parse_rate_limit_headers(headers, now))
        if not told:
            return
        if "tokens" in told:
            self.tokens = True
        self._rooms.setdefault(where, {}).update(told)
        self._rooms.move_to_end(where)
        while len(self._rooms) > _MAX_QUOTAS:
            self._rooms.popitem(last=False)

    def _current(self, where: Where, now: float) -> Iterator[tuple[Dimension, RemainingQuota]]:
        for dimension, room in self._rooms.get(where, _NOTHING_TOLD).items():
            if now - room.seen < LONGEST:
                yield dimension, room

    def wait(self, where: Where, tokens: int, now: float) -> float:
        """Seconds until there is room for a request of so many tokens; 0.0 now."""
        longest = 0.0
        for of, room in self._rooms.get(where, _NOTHING_TOLD).items():
            if now - room.seen < LONGEST:
                longest = max(longest, room.wait(tokens if of == "tokens" else 1, now))
        return longest

    def take(self, where: Where, tokens: int) -> None:
        """A request goes up: until the next answer tells, it counts as taken."""
        for dimension, room in self._rooms.get(where, _NOTHING_TOLD).items():
            amount = tokens if dimension == "tokens" else 1
            if not 0 < room.limit < amount:
                room.taken += amount

    def headroom(self, where: Where, now: float) -> float:
        """The smallest share still free, 0..1; 1.0 where nothing is known."""
        shares = [room.left(now) / room.limit for _, room in self._current(where, now) if room.limit]
        return min(max(min(shares, default=1.0), 0.0), 1.0)

    def free(self, now: float) -> list[tuple[str, float]]:
        """(quota, the smallest share still free) for each model that something is known of."""
        return [(where[0], self.headroom(where, now)) for where in self._rooms]

    def usage(self, where: Where, now: float) -> dict[str, dict[str, int]]:
        """{"requests": {"limit": 500, "used": 12}} as upstream told, for people."""
        return {
            dimension: {"limit": int(room.limit), "used": int(max(room.limit - room.left(now), 0.0))}
            for dimension, room in self._current(where, now)
            if room.limit
        }

    def models(self, quota: str) -> list[str]:
        """The models that something is known of."""
        return [model for name, model in self._rooms if name == quota]
