"""The local half of a shared limit: what this proxy's own requests hold of it, and its share while others are out of
reach.

While the limit is shared the local windows never decide alone; they keep what would have to be told again should the
store lose it. Without the store each proxy holds an equal part of the limit, less its part of what was in use last.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence
from typing import Any

from ...config.limits import Limits
from .rate_limiter import ExceedsLimit, RateLimiter, Reservation, Wait, _Bucket, _Window
from .shared import RECHECK

HOLD_AFTER_OUTAGE = 3.0
"""Seconds after the loss of the others for which nothing counts as given back."""

_FREE = (-math.inf, -math.inf, 0)


class Asked:
    """One decision on its way: what came back, and whether nobody waits for it any more."""

    __slots__ = ("abandoned", "reply")

    def __init__(self) -> None:
        self.abandoned = False
        self.reply: list[Any] | None = None


class RedisReservation(Reservation):
    """stamp: server's ms at which it was admitted, None until it is; round: None where the others have counted it, else
    `RedisRateLimiter.round` at its beginning: when that has moved on, they have been told of it.
    """

    __slots__ = ("allowance", "alone", "round", "stamp")

    def __init__(self, allowance: RedisRateLimiter, tokens: int, made: Reservation) -> None:
        super().__init__(allowance, tokens, made._windows, made._buckets)
        self.allowance = allowance
        self.alone = not allowance.shared
        self.stamp: float | None = None
        self.round: int | None = allowance.round

    def settle(self, tokens: int | None) -> None:
        if self._open:
            self.allowance.leave(self)
            super().settle(tokens)
            self.allowance.ended(self, 0 if tokens is None else max(tokens, 0) - self.tokens, 0)

    def cancel(self) -> None:
        if self._open:
            self.allowance.leave(self)
            super().cancel()
            self.allowance.ended(self, -self.tokens, -1)


Publish = Callable[[RedisReservation, int, int], None]


class RedisRateLimiter(RateLimiter):
    """`tell(reservation, tokens, requests)` is called with what changes of a reservation counted elsewhere.

    confirmed: admitted and at work; turn: held by who asks where requests at once are limited, so that what is still
    being asked for does not count against others.
    """

    __slots__ = (
        "__weakref__",
        "_among",
        "_asking",
        "_blocked",
        "_free",
        "_frozen_until",
        "_full",
        "_ghosts",
        "_known",
        "_known_at",
        "_most",
        "_taken",
        "_tell",
        "confirmed",
        "name",
        "round",
        "shared",
        "turn",
    )

    def __init__(self, name: str, limits: Limits, use: float, tell: Publish) -> None:
        self.shared = True
        self._known_at = -math.inf
        super().__init__(limits, use)
        self.name = name
        self.round = 0
        self._among = 1, 0
        self._frozen_until = -math.inf
        self._free: list[tuple[bool, int]] = []
        self._taken = 0, 0
        self.confirmed = 0
        self._asking = 0, 0  # requests and tokens reserved here, and not yet admitted
        self.turn = asyncio.Lock()
        self._tell = tell
        self._ghosts: list[tuple[_Window, _Bucket]] = []
        self._blocked = _FREE
        self._known: dict[str, int] = {}

    @property
    def windows(self) -> tuple[_Window, ...]:
        return self._windows

    @property
    def most(self) -> int | None:
        """Requests at once, of all proxies together."""
        return self._most

    def reserve(self, tokens: int, now: float) -> Reservation | Wait | ExceedsLimit:
        tokens = max(tokens, 0)
        until, due, of = self._blocked
        if now < until and tokens >= of:
            return Wait(due - now)
        if now < self._frozen_until and any(
            self._taken[of_tokens] + (tokens if of_tokens else 1) > free for of_tokens, free in self._free
        ):
            return Wait(self._frozen_until - now)
        answer = super().reserve(tokens, now)
        if isinstance(answer, Reservation):
            self._taken = self._taken[0] + 1, self._taken[1] + tokens
            self._asking = self._asking[0] + 1, self._asking[1] + tokens
            return RedisReservation(self, tokens, answer)
        if isinstance(answer, ExceedsLimit) and not self.shared and self._fits(tokens):
            return Wait(RECHECK)  # larger than our share, but not than the whole
        return answer

    def _fits(self, tokens: int) -> bool:
        fits = all(
            (tokens if w.counts_tokens else 1) <= full for w, full in zip(self._windows, self._full, strict=True)
        )
        return fits and self._most != 0

    def refused(self, reservation: RedisReservation, wait: float, now: float) -> None:
        """The others leave no room for it for `wait` s (math.inf: unknown), unless they give back: they are asked again
        only after `RECHECK`.
        """
        self._blocked = (now + min(wait, 0.9 * RECHECK), now + wait, reservation.tokens)

    def seen(self, totals: dict[str, int], now: float) -> None:
        """What all proxies together hold."""
        self._known, self._known_at = totals, now

    @property
    def known_at(self) -> float:
        """When that was."""
        return self._known_at

    def stale(self, now: float) -> bool:
        """Whether it should be looked up again: it matters, and is not of just now."""
        return RECHECK <= now - self._known_at < max((window.span for window in self._windows), default=0.0)

    def looked(self, totals: Sequence[int], now: float) -> None:
        """The same, but for requests at work."""
        known = dict(zip((window.name for window in self._windows), totals, strict=False))
        self.seen(self._known | known, now)

    def ended(self, reservation: RedisReservation, tokens: int, requests: int) -> None:
        """Tells the others of what a settlement changed, where they have counted it."""
        if reservation.stamp is not None and reservation.round != self.round:
            for window in self._windows:
                if window.name in self._known:
                    self._known[window.name] += tokens if window.counts_tokens else requests
            if "concurrency" in self._known:
                self._known["concurrency"] -= 1
            self._tell(reservation, tokens, requests)

    def leave(self, reservation: RedisReservation) -> None:
        """A reservation ends, or is answered."""
        if reservation.stamp is not None:
            self.confirmed -= 1
        else:
            self._asking = self._asking[0] - 1, self._asking[1] - reservation.tokens

    def admitted(self, reservation: RedisReservation, stamp: float, counted: bool) -> None:
        """It may go up. counted: the others have counted it."""
        self.leave(reservation)
        reservation.stamp = stamp
        self.confirmed += 1
        if counted:
            reservation.round = None

    def made_alone(self, reservation: RedisReservation) -> bool:
        """Whether it was reserved of our share, not of the whole limit."""
        return not self.shared and reservation.alone

    def change(self, limits: Limits, use: float) -> None:
        alone, now = not self.shared, self._known_at
        if alone:
            self.share()
        super().change(limits, use)
        self._full = [window.limit for window in self._windows]
        self._most = self._concurrency
        if alone:
            self.lose(*self._among, now)

    # -- alone --------------------------------------------------------------------------------------------------------

    def lose(self, proxies: int, rank: int, now: float) -> None:
        """From now on an equal share: of the limit, less our part of what all held last, or what is our own of it."""
        self.shared = False
        self._among = proxies, rank
        self._blocked = _FREE
        for window, full in zip(self._windows, self._full, strict=True):
            window.advance(now)
            window.limit = part(full, proxies, rank)
            known = self._known.get(window.name)
            if known is not None and now - self._known_at < window.span:
                # What others hold leaves our share. Where we hold more than our part, that is not made good: perhaps
                # they do not know of it yet.
                ours = window.total - self._asking[window.counts_tokens]
                slot = window.add_alone(max(0, part(known, proxies, proxies - 1 - rank) - ours), now)
                self._ghosts.append((window, slot))
        # For a moment only our part of what was free then, for it may be that only we have lost the others: they go on
        # filling the limit, and what leaves the windows meanwhile is theirs.
        self._frozen_until, self._taken = now + HOLD_AFTER_OUTAGE, (0, 0)
        self._free = [(window.counts_tokens, window.limit - window.total) for window in self._windows]
        if self._most is not None:
            self._concurrency = part(self._most, proxies, rank)
            self._free.append((False, part(max(self._most - self._known.get("concurrency", 0), 0), proxies, rank)))

    def share(self) -> None:
        """The whole limit again: others count with us."""
        self.shared = True
        self._frozen_until = -math.inf
        for window, slot in self._ghosts:
            window.correct(slot, -slot.amount)
        self._ghosts.clear()
        for window, full in zip(self._windows, self._full, strict=True):
            window.limit = full
        self._concurrency = self._most

    def pushed(self) -> None:
        """All that the windows hold was told to the others."""
        self.round += 1

    def held_since(self, moment: float) -> list[tuple[_Window, float, int]]:
        """(window, stamp, amount) of what was counted after `moment`, but for the ghosts."""
        ghosts = {id(slot) for _, slot in self._ghosts}
        return [
            (window, slot.latest, slot.amount)
            for window in self._windows
            for slot in window.buckets
            if slot.latest >= moment and slot.amount and id(slot) not in ghosts
        ]

    def reset(self) -> None:
        super().reset()
        self._ghosts.clear()
        self._known = {}
        self._blocked = _FREE

    def idle(self, now: float) -> bool:
        return super().idle(now) and now - self._known_at > 2 * RECHECK

    def _levels(self, now: float) -> dict[str, tuple[int, int]]:
        levels = super()._levels(now)
        if self.shared and now - self._known_at < 60.0:
            for name, total in self._known.items():
                used, limit = levels[name]
                levels[name] = (max(used, total), limit)
        return levels


def part(amount: int, proxies: int, rank: int) -> int:
    """One proxy's equal part; the parts of all add up to the amount."""
    return amount // proxies + (1 if rank < amount % proxies else 0)
