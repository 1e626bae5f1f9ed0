"""What upstreams say is left of their limits: the `x-ratelimit-*` headers (`docs/keys-and-limits.md`).

What is learned only tightens the configured limits, and never holds a request back for longer than `MAX_RESET`: a
header is a hint, and if it misleads, the next response corrects it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from ..retry.error_body import Dimension
from ..retry.limit_headers import DIMENSIONS, limit_headers

MAX_RESET: Final = 60.0
"""Seconds after which what a response said is forgotten; a reset further away counts as this far."""

_MAX_AMOUNT: Final = 1e12
_MAX_QUOTAS: Final = 10_000

QuotaAndModel = tuple[str, str]


@dataclass(slots=True)
class RemainingQuota:
    """What a response said is left of one limit.

    limit: 0 if it was not told; reset: seconds after `told_at` (monotonic s) until all of it is free again;
    sent_since: what was sent since then. The upstream's windows slide, so room comes back evenly until the reset
    (https://platform.openai.com/docs/guides/rate-limits).
    """

    limit: float
    remaining: float
    reset: float
    told_at: float
    sent_since: float = 0.0

    def left(self, now: float) -> float:
        """Return how much may be left at `now`, less what was sent since."""
        return self.remaining + self._restored(now - self.told_at) - self.sent_since

    def _restored(self, seconds: float) -> float:
        if seconds >= self.reset:
            return max(self.limit - self.remaining, self.sent_since)
        return max(self.limit - self.remaining, 0.0) * seconds / self.reset

    def wait(self, amount: float, now: float) -> float:
        """Return the seconds until `amount` is free; 0.0 if it is now.

        An amount larger than the whole limit does not wait: the upstream decides.
        """
        if 0 < self.limit < amount:
            return 0.0
        lacking = amount - self.left(now)
        if lacking <= 1e-9:
            return 0.0
        until_reset = max(self.told_at + self.reset - now, 0.0)
        rate = max(self.limit - self.remaining, 0.0) / self.reset
        return min(lacking / rate, until_reset) if rate > 0 else until_reset


def parse_rate_limit_headers(headers: Mapping[str, str], now: float) -> Iterator[tuple[Dimension, RemainingQuota]]:
    """Yield what a response tells of each dimension. Nonsense (text, negative, huge numbers) is ignored."""
    for dimension in DIMENSIONS:
        remaining, limit, reset = limit_headers(headers, dimension)
        if remaining is None or remaining > _MAX_AMOUNT:
            continue
        limit = 0.0 if limit is None or limit > _MAX_AMOUNT else limit
        if remaining == 0.0 and (reset is None or limit == 0.0):
            continue  # Azure and similar servers send zeros for limits they do not tell
        yield (
            dimension,
            RemainingQuota(max(limit, remaining) if limit else 0.0, remaining, min(reset or MAX_RESET, MAX_RESET), now),
        )


_NO_QUOTAS: Final[Mapping[Dimension, RemainingQuota]] = {}


class UpstreamLimits:
    """What is left of each limit of (quota, model), as last told. counts_tokens: any response told of tokens."""

    def __init__(self) -> None:
        self._quotas: OrderedDict[QuotaAndModel, dict[Dimension, RemainingQuota]] = OrderedDict()
        self.counts_tokens = False

    def record(self, where: QuotaAndModel, headers: Mapping[str, str], now: float) -> None:
        """Remember what a response's headers say. Never raises."""
        told = dict(parse_rate_limit_headers(headers, now))
        if not told:
            return
        if "tokens" in told:
            self.counts_tokens = True
        self._quotas.setdefault(where, {}).update(told)
        self._quotas.move_to_end(where)
        while len(self._quotas) > _MAX_QUOTAS:
            self._quotas.popitem(last=False)

    def _current(self, where: QuotaAndModel, now: float) -> Iterator[tuple[Dimension, RemainingQuota]]:
        for dimension, quota in self._quotas.get(where, _NO_QUOTAS).items():
            if now - quota.told_at < MAX_RESET:
                yield dimension, quota

    def wait(self, where: QuotaAndModel, tokens: int, now: float) -> float:
        """Return the seconds until there is room for a request of `tokens`; 0.0 if there is now."""
        longest = 0.0
        for dimension, quota in self._quotas.get(where, _NO_QUOTAS).items():
            if now - quota.told_at < MAX_RESET:
                longest = max(longest, quota.wait(tokens if dimension == "tokens" else 1, now))
        return longest

    def record_sent(self, where: QuotaAndModel, tokens: int) -> None:
        """Count a request of `tokens` as used until the next response says what is left."""
        for dimension, quota in self._quotas.get(where, _NO_QUOTAS).items():
            amount = tokens if dimension == "tokens" else 1
            if not 0 < quota.limit < amount:
                quota.sent_since += amount

    def headroom(self, where: QuotaAndModel, now: float) -> float:
        """Return the smallest share still free, 0 to 1; 1.0 if nothing is known."""
        shares = [quota.left(now) / quota.limit for _, quota in self._current(where, now) if quota.limit]
        return min(max(min(shares, default=1.0), 0.0), 1.0)

    def headrooms(self, now: float) -> list[tuple[str, float]]:
        """Return (quota, smallest share still free) for each model about which something is known."""
        return [(where[0], self.headroom(where, now)) for where in self._quotas]

    def usage(self, where: QuotaAndModel, now: float) -> dict[str, dict[str, int]]:
        """Return {"requests": {"limit": 500, "used": 12}}, as the upstream told."""
        return {
            dimension: {"limit": int(quota.limit), "used": int(max(quota.limit - quota.left(now), 0.0))}
            for dimension, quota in self._current(where, now)
            if quota.limit
        }

    def models(self, quota: str) -> list[str]:
        """Return the models about which something is known."""
        return [model for name, model in self._quotas if name == quota]
