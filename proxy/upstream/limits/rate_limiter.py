"""Rate limits of one (quota, model): reserve before sending, settle by what was used (`docs/keys-and-limits.md`).

No window of 60 s, nor of 86,400 s, ever holds more than the limit, and a burst of the whole limit may go at once. Fixed
windows would let twice the limit through around their edge, and a token bucket a burst plus a refill. So this is a true
sliding window: every amount counts from its own time stamp until a whole window later. Amounts close in time share a
bucket, which expires by its *latest* stamp. That bounds memory, and the error (1/1,200 of a window) only makes a
request wait.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from decimal import Decimal

from ...config.limits import Limits

# The upstream counts requests when they arrive, the proxy when they leave, and one request may travel longer than the
# next. A window is this much longer here, so that such jitter cannot put more than the limit into one of the
# upstream's windows.
MARGIN = 1.01
BUCKETS = 1200


@dataclass(frozen=True, slots=True)
class Wait:
    """There is no room now: ask again after `seconds`, not sooner. math.inf: only a release can make room."""

    seconds: float


@dataclass(frozen=True, slots=True)
class ExceedsLimit:
    """Waiting cannot help: the request is larger than a whole window."""

    reason: str


class _Bucket:
    """An amount stamped between `opened` and `latest` (monotonic s). An expired bucket never changes again."""

    __slots__ = ("amount", "expired", "latest", "opened")

    def __init__(self, now: float, amount: int) -> None:
        self.opened = self.latest = now
        self.amount = amount
        self.expired = False


class _Window:
    """A sliding window of `seconds` that holds at most `limit`, unless a settlement exceeds the estimate."""

    __slots__ = ("buckets", "counts_tokens", "limit", "name", "span", "total", "width")

    def __init__(self, name: str, limit: int, seconds: float, counts_tokens: bool) -> None:
        self.name = name
        self.limit = limit
        self.counts_tokens = counts_tokens
        self.span = seconds * MARGIN
        self.width = self.span / BUCKETS
        self.total = 0
        self.buckets: deque[_Bucket] = deque()

    def advance(self, now: float) -> None:
        """Drop the buckets that are a whole window old."""
        buckets = self.buckets
        while buckets and buckets[0].latest + self.span <= now:
            bucket = buckets.popleft()
            bucket.expired = True
            self.total -= bucket.amount

    def clear(self) -> None:
        """Drop all buckets."""
        for bucket in self.buckets:
            bucket.expired = True
        self.buckets.clear()
        self.total = 0

    def delay(self, amount: int, now: float) -> float:
        """Return the seconds after which `amount` (at most the limit) fits, if nothing else is added or released."""
        self.advance(now)
        excess = self.total + amount - self.limit
        if excess <= 0:
            return 0.0
        oldest, expiry = iter(self.buckets), now
        while excess > 0:
            bucket = next(oldest)
            excess -= bucket.amount
            expiry = bucket.latest + self.span
        # One unit in the last place more, so that `now + delay` cannot round to just before `expiry`.
        return expiry - now + math.ulp(expiry)

    def add(self, amount: int, now: float) -> _Bucket:
        """Count `amount` at `now`, whether it fits or not."""
        self.total += amount
        if self.buckets:
            last = self.buckets[-1]
            if now - last.opened < self.width:
                last.amount += amount
                if now > last.latest:
                    last.latest = now
                return last
        bucket = _Bucket(now, amount)
        self.buckets.append(bucket)
        return bucket

    def add_alone(self, amount: int, now: float) -> _Bucket:
        """Count `amount`, which may be negative, in a bucket that nothing else joins."""
        bucket = _Bucket(now, amount)
        bucket.opened = -math.inf
        self.buckets.append(bucket)
        self.total += amount
        return bucket

    def correct(self, bucket: _Bucket, change: int) -> None:
        """Change the amount of `bucket`, at its own time stamp. An expired bucket stays as it is."""
        if not bucket.expired:
            bucket.amount += change
            self.total += change


class Reservation:
    """What one admitted request holds of a rate limiter. Every exit path ends it once; later calls do nothing.

    tokens: the estimate it was made with.
    """

    __slots__ = ("_buckets", "_open", "_rate_limiter", "_windows", "tokens")

    def __init__(
        self, rate_limiter: RateLimiter, tokens: int, windows: tuple[_Window, ...], buckets: list[_Bucket]
    ) -> None:
        self.tokens = tokens
        self._windows = windows  # those it is counted in, even if the limits have changed since
        self._rate_limiter = rate_limiter
        self._buckets = buckets
        self._open = True

    def settle(self, tokens: int | None) -> None:
        """End it for a request that was sent: it stays counted, with its actual tokens (None: the estimate).

        If more tokens were used than estimated, a window may exceed its limit; it then admits nothing until it fits.
        """
        if self._open:
            self._open = False
            change = 0 if tokens is None else max(tokens, 0) - self.tokens
            self._rate_limiter._release(self._windows, self._buckets, change, 0)

    def cancel(self) -> None:
        """End it for a request that was never sent: everything is released."""
        if self._open:
            self._open = False
            self._rate_limiter._release(self._windows, self._buckets, -self.tokens, -1)


class RateLimiter:
    """All limits of one (quota, model), reserved together or not at all. For one event loop: it takes no lock.

    use: the share of each limit to use, which leaves at least 1. `now` is always monotonic seconds.
    """

    __slots__ = ("_concurrency", "_in_flight", "_windows")

    def __init__(self, limits: Limits, use: float = 1.0) -> None:
        self._windows: tuple[_Window, ...] = ()
        self._in_flight = 0
        self.change(limits, use)

    def change(self, limits: Limits, use: float) -> None:
        """Apply other limits from now on; what was counted still counts."""
        known = {window.name: window for window in self._windows}
        windows = []
        for name, limit, seconds, counts_tokens in (
            ("rpm", limits.rpm, 60.0, False),
            ("tpm", limits.tpm, 60.0, True),
            ("rpd", limits.rpd, 86_400.0, False),
            ("tpd", limits.tpd, 86_400.0, True),
        ):
            if limit is not None:
                window = known.get(name) or _Window(name, 0, seconds, counts_tokens)
                window.limit = _share(limit, use)
                windows.append(window)
        self._windows = tuple(windows)
        self._concurrency = None if limits.concurrency is None else _share(limits.concurrency, use)

    def reserve(self, tokens: int, now: float) -> Reservation | Wait | ExceedsLimit:
        """Reserve one request of `tokens` (an estimate; below 0 is 0) in every limit, or nothing in any."""
        tokens = max(tokens, 0)
        longest = 0.0
        for window in self._windows:
            amount = tokens if window.counts_tokens else 1
            if amount > window.limit:
                what = "tokens" if window.counts_tokens else "request"
                return ExceedsLimit(f"the request counts as {amount} {what} and {window.name} allows {window.limit}")
            delay = window.delay(amount, now)
            if delay > longest:
                longest = delay
        if self._concurrency is not None and self._in_flight >= self._concurrency:
            if self._concurrency == 0:
                return ExceedsLimit("concurrency allows 0 requests")
            longest = math.inf
        if longest:
            return Wait(longest)
        self._in_flight += 1
        buckets = [window.add(tokens if window.counts_tokens else 1, now) for window in self._windows]
        return Reservation(self, tokens, self._windows, buckets)

    def _release(self, windows: tuple[_Window, ...], buckets: list[_Bucket], tokens: int, requests: int) -> None:
        self._in_flight -= 1
        for window, bucket in zip(windows, buckets, strict=True):
            change = tokens if window.counts_tokens else requests
            if change:
                window.correct(bucket, change)

    def reset(self) -> None:
        """Clear the windows. Requests in flight keep their place under `concurrency`, and settle no tokens any more."""
        for window in self._windows:
            window.clear()

    def headroom(self, now: float) -> float:
        """Return the smallest share still free over all limits, 0 to 1; 1.0 without limits."""
        free = 1.0
        for used, limit in self._levels(now).values():
            free = min(free, (limit - used) / limit if limit else 0.0)
        return max(free, 0.0)

    def usage(self, now: float) -> dict[str, dict[str, int]]:
        """Return what is held of each limit, {"rpm": {"limit": 500, "used": 12}}; `limit` is the share to use."""
        return {name: {"limit": limit, "used": used} for name, (used, limit) in self._levels(now).items()}

    def idle(self, now: float) -> bool:
        """Return whether it holds nothing, so that it may be dropped and made anew."""
        for window in self._windows:
            window.advance(now)
        return not self._in_flight and not any(window.buckets for window in self._windows)

    def _levels(self, now: float) -> dict[str, tuple[int, int]]:
        levels = {}
        for window in self._windows:
            window.advance(now)
            levels[window.name] = (window.total, window.limit)
        if self._concurrency is not None:
            levels["concurrency"] = (self._in_flight, self._concurrency)
        return levels


def _share(limit: int, use: float) -> int:
    """Return the floor of limit * use, at least 1 unless the limit is 0. In decimals 0.29 of 100 is 29, not 28.99…"""
    return max(int(limit * Decimal(repr(use))), min(limit, 1), 0)
