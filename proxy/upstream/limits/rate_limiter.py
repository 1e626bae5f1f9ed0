"""Rate limits of one (quota, model): reserve before sending, settle by what was really used.

The promise (contract 7) is strict: in no window of 60 s, nor of 86,400 s, is more admitted than the limit,
and a burst of the whole limit may go at once. Fixed windows let twice the limit through around their edge,
token buckets a burst plus a refill; so this is a true sliding window: every amount counts from its own time
stamp until a whole window later. Amounts close in time share a slot that leaves with its *latest* stamp,
which bounds memory and errs only towards waiting (by 1/1,200 of a window).
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from decimal import Decimal

from ...config.limits import Limits

# The upstream counts by arrival, we by departure, and one request may travel longer than the next. Our
# window is this much longer, so that such jitter cannot put more than the limit into one of the upstream's
# windows.
MARGIN = 1.01
SLOTS = 1200


@dataclass(frozen=True, slots=True)
class Wait:
    """Not now: ask again after `seconds`, not sooner. math.inf: only something coming back can help."""

    seconds: float


@dataclass(frozen=True, slots=True)
class ExceedsLimit:
    """No waiting can help: the request is larger than a whole window."""

    reason: str


class _Bucket:
    """An amount stamped between `opened` and `latest` (s). Once `gone` from its window it stays as it is."""

    __slots__ = ("amount", "gone", "latest", "opened")

    def __init__(self, now: float, amount: int) -> None:
        self.opened = self.latest = now
        self.amount = amount
        self.gone = False


class _Window:
    """A sliding window of `seconds` that holds at most `limit`, unless a settlement overdraws it."""

    __slots__ = ("limit", "name", "of_tokens", "slots", "span", "total", "width")

    def __init__(self, name: str, limit: int, seconds: float, of_tokens: bool) -> None:
        self.name = name
        self.limit = limit
        self.of_tokens = of_tokens
        self.span = seconds * MARGIN
        self.width = self.span / SLOTS
        self.total = 0
        self.slots: deque[_Bucket] = deque()

    def advance(self, now: float) -> None:
        """Let go of what is a whole window old."""
        slots = self.slots
        while slots and slots[0].latest + self.span <= now:
            slot = slots.popleft()
            slot.gone = True
            self.total -= slot.amount

    def clear(self) -> None:
        """Let go of everything."""
        for slot in self.slots:
            slot.gone = True
        self.slots.clear()
        self.total = 0

    def delay(self, amount: int, now: float) -> float:
        """Seconds after which `amount` (at most the limit) fits, if nothing else is added or given back."""
        self.advance(now)
        excess = self.total + amount - self.limit
        if excess <= 0:
            return 0.0
        oldest, due = iter(self.slots), now
        while excess > 0:
            slot = next(oldest)
            excess -= slot.amount
            due = slot.latest + self.span
        # One unit in the last place more, so that `now + delay` cannot round to just before `due`.
        return due - now + math.ulp(due)

    def add(self, amount: int, now: float) -> _Bucket:
        """Count `amount` at `now`; whether it fits was asked before."""
        self.total += amount
        if self.slots:
            last = self.slots[-1]
            if now - last.opened < self.width:
                last.amount += amount
                if now > last.latest:
                    last.latest = now
                return last
        slot = _Bucket(now, amount)
        self.slots.append(slot)
        return slot

    def add_alone(self, amount: int, now: float) -> _Bucket:
        """Count `amount`, which may be negative, in a slot of its own."""
        slot = _Bucket(now, amount)
        slot.opened = -math.inf  # nothing joins it
        self.slots.append(slot)
        self.total += amount
        return slot

    def correct(self, slot: _Bucket, change: int) -> None:
        """Change what was counted in `slot`, at its own time stamp. Too late once its window has passed."""
        if not slot.gone:
            slot.amount += change
            self.total += change


class Reservation:
    """One admitted request's hold on its allowance, ended once on every exit path; later calls do nothing.

    `tokens` is the estimate it was made with.
    """

    __slots__ = ("_allowance", "_open", "_slots", "_windows", "tokens")

    def __init__(self, allowance: RateLimiter, tokens: int, windows: tuple[_Window, ...], slots: list[_Bucket]) -> None:
        self.tokens = tokens
        self._windows = windows  # those it was counted in, whatever the limits are by now
        self._allowance = allowance
        self._slots = slots
        self._open = True

    def settle(self, tokens: int | None) -> None:
        """It went up: the request stays counted, its tokens become the actual ones (None: stay the estimate).

        More than the estimate may overdraw a window, which then admits nothing until it fits again.
        """
        if self._open:
            self._open = False
            change = 0 if tokens is None else max(tokens, 0) - self.tokens
            self._allowance._release(self._windows, self._slots, change, 0)

    def cancel(self) -> None:
        """It never went up: everything is given back."""
        if self._open:
            self._open = False
            self._allowance._release(self._windows, self._slots, -self.tokens, -1)


class RateLimiter:
    """All limits of one (quota, model), decided together or not at all. For one event loop: it takes no lock.

    `use` is the share of each limit to use, which leaves at least 1. `now` is always monotonic seconds.
    """

    __slots__ = ("_concurrency", "_running", "_windows")

    def __init__(self, limits: Limits, use: float = 1.0) -> None:
        self._windows: tuple[_Window, ...] = ()
        self._running = 0
        self.change(limits, use)

    def change(self, limits: Limits, use: float) -> None:
        """Other limits from now on; what was counted still counts."""
        known = {window.name: window for window in self._windows}
        windows = []
        for name, limit, seconds, of_tokens in (
            ("rpm", limits.rpm, 60.0, False),
            ("tpm", limits.tpm, 60.0, True),
            ("rpd", limits.rpd, 86_400.0, False),
            ("tpd", limits.tpd, 86_400.0, True),
        ):
            if limit is not None:
                window = known.get(name) or _Window(name, 0, seconds, of_tokens)
                window.limit = _share(limit, use)
                windows.append(window)
        self._windows = tuple(windows)
        self._concurrency = None if limits.concurrency is None else _share(limits.concurrency, use)

    def reserve(self, tokens: int, now: float) -> Reservation | Wait | ExceedsLimit:
        """Take one request of `tokens` (an estimate; below 0 is 0) from every limit, or nothing from any."""
        tokens = max(tokens, 0)
        longest = 0.0
        for window in self._windows:
            amount = tokens if window.of_tokens else 1
            if amount > window.limit:
                what = "tokens" if window.of_tokens else "request"
                return ExceedsLimit(f"the request counts as {amount} {what} and {window.name} allows {window.limit}")
            delay = window.delay(amount, now)
            if delay > longest:
                longest = delay
        if self._concurrency is not None and self._running >= self._concurrency:
            if self._concurrency == 0:
                return ExceedsLimit("concurrency allows 0 requests")
            longest = math.inf
        if longest:
            return Wait(longest)
        self._running += 1
        slots = [window.add(tokens if window.of_tokens else 1, now) for window in self._windows]
        return Reservation(self, tokens, self._windows, slots)

    def _release(self, windows: tuple[_Window, ...], slots: list[_Bucket], tokens: int, requests: int) -> None:
        self._running -= 1
        for window, slot in zip(windows, slots, strict=True):
            change = tokens if window.of_tokens else requests
            if change:
                window.correct(slot, change)

    def reset(self) -> None:
        """Forget what the windows hold; requests at work keep their permits, and settle nothing any more."""
        for window in self._windows:
            window.clear()

    def headroom(self, now: float) -> float:
        """The smallest share still free over all limits, 0 to 1; 1.0 without limits."""
        free = 1.0
        for used, limit in self._levels(now).values():
            free = min(free, (limit - used) / limit if limit else 0.0)
        return max(free, 0.0)

    def usage(self, now: float) -> dict[str, dict[str, int]]:
        """What is held of each limit: {"rpm": {"limit": 500, "used": 12}}; `limit` is the share in use."""
        return {name: {"limit": limit, "used": used} for name, (used, limit) in self._levels(now).items()}

    def idle(self, now: float) -> bool:
        """Whether it holds nothing, so that forgetting it and starting afresh changes no decision."""
        for window in self._windows:
            window.advance(now)
        return not self._running and not any(window.slots for window in self._windows)

    def _levels(self, now: float) -> dict[str, tuple[int, int]]:
        levels = {}
        for window in self._windows:
            window.advance(now)
            levels[window.name] = (window.total, window.limit)
        if self._concurrency is not None:
            levels["concurrency"] = (self._running, self._concurrency)
        return levels


def _share(limit: int, use: float) -> int:
    """The floor of limit * use, at least 1 unless the limit is 0. Decimal: 0.29 of 100 is 29, not 28.99…"""
    return max(int(limit * Decimal(repr(use))), min(limit, 1), 0)
