"""The local half of a limit shared over Redis: what this proxy's requests use of it, and its share without Redis.

While the limit is shared the local windows do not decide alone; they keep what must be published again if Redis loses
its data. Without Redis each proxy uses an equal share of the limit, less its part of what was last known to be in use.
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
"""Seconds after Redis was lost for which nothing counts as freed."""

_FREE = (-math.inf, -math.inf, 0)


class Asked:
    """One decision that Redis is asked for. reply: None until it comes; abandoned: no caller waits for it any more."""

    __slots__ = ("abandoned", "reply")

    def __init__(self) -> None:
        self.abandoned = False
        self.reply: tuple[Any, ...] | None = None


class RedisReservation(Reservation):
    """A reservation that all proxies count.

    stamp: when it was admitted, in the server's ms; None until it is.
    alone: it was made from this proxy's share.
    round: None if Redis has counted it; otherwise `RedisRateLimiter.round` when it was made: if that has changed since,
        Redis has counted it too.
    """

    __slots__ = ("alone", "limiter", "round", "stamp")

    def __init__(self, limiter: RedisRateLimiter, tokens: int, made: Reservation) -> None:
        super().__init__(limiter, tokens, made._windows, made._buckets)
        self.limiter = limiter
        self.alone = not limiter.shared
        self.stamp: float | None = None
        self.round: int | None = limiter.round

    def settle(self, tokens: int | None) -> None:
        if self._open:
            self.limiter.leave(self)
            super().settle(tokens)
            self.limiter.ended(self, 0 if tokens is None else max(tokens, 0) - self.tokens, 0)

    def cancel(self) -> None:
        if self._open:
            self.limiter.leave(self)
            super().cancel()
            self.limiter.ended(self, -self.tokens, -1)


Publish = Callable[[RedisReservation, int, int], None]
"""Publishes a change of a reservation that Redis has counted: (reservation, tokens, requests)."""


class RedisRateLimiter(RateLimiter):
    """The rate limiter of one name in one proxy.

    confirmed: how many requests are admitted and in flight.
    turn: held while Redis is asked if concurrency is limited, so that a request that is not yet admitted does not count
        against others.
    shared: the limit is shared; False while this proxy keeps to its share.
    round: how often everything was published again.
    """

    __slots__ = (
        "__weakref__",
        "_among",
        "_asking",
        "_blocked",
        "_free",
        "_frozen_until",
        "_full",
        "_known",
        "_known_at",
        "_max_concurrency",
        "_others_use",
        "_publish",
        "_taken",
        "confirmed",
        "name",
        "round",
        "shared",
        "turn",
    )

    def __init__(self, name: str, limits: Limits, use: float, publish: Publish) -> None:
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
        self._asking = 0, 0  # requests and tokens that are reserved here and not yet admitted
        self.turn = asyncio.Lock()
        self._publish = publish
        self._others_use: list[tuple[_Window, _Bucket]] = []
        self._blocked = _FREE
        self._known: dict[str, int] = {}

    @property
    def windows(self) -> tuple[_Window, ...]:
        return self._windows

    @property
    def max_concurrency(self) -> int | None:
        """Return how many requests of all proxies may be in flight at once; None: any number."""
        return self._max_concurrency

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
            return Wait(RECHECK)  # larger than this proxy's share, but not than the limit
        return answer

    def _fits(self, tokens: int) -> bool:
        fits = all(
            (tokens if w.counts_tokens else 1) <= full for w, full in zip(self._windows, self._full, strict=True)
        )
        return fits and self._max_concurrency != 0

    def refused(self, reservation: RedisReservation, wait: float, now: float) -> None:
        """Note that others leave no room for `wait` seconds (inf: unknown), unless they free some.

        Until `RECHECK` is over they are not asked again.
        """
        self._blocked = (now + min(wait, 0.9 * RECHECK), now + wait, reservation.tokens)

    def note_usage(self, totals: dict[str, int], now: float) -> None:
        """Note what all proxies together use."""
        self._known, self._known_at = totals, now

    @property
    def known_at(self) -> float:
        """Return when the use by all proxies was last known, in monotonic seconds."""
        return self._known_at

    def stale(self, now: float) -> bool:
        """Return whether the use by all proxies should be read again."""
        return RECHECK <= now - self._known_at < max((window.span for window in self._windows), default=0.0)

    def note_window_usage(self, totals: Sequence[int], now: float) -> None:
        """Note what all proxies together use of each window; requests in flight are not part of it."""
        known = dict(zip((window.name for window in self._windows), totals, strict=False))
        self.note_usage(self._known | known, now)

    def ended(self, reservation: RedisReservation, tokens: int, requests: int) -> None:
        """Publish what a settlement changed, if Redis has counted the reservation."""
        if reservation.stamp is not None and reservation.round != self.round:
            for window in self._windows:
                if window.name in self._known:
                    self._known[window.name] += tokens if window.counts_tokens else requests
            if "concurrency" in self._known:
                self._known["concurrency"] -= 1
            self._publish(reservation, tokens, requests)

    def leave(self, reservation: RedisReservation) -> None:
        """Note that a reservation ends, or is admitted."""
        if reservation.stamp is not None:
            self.confirmed -= 1
        else:
            self._asking = self._asking[0] - 1, self._asking[1] - reservation.tokens

    def admitted(self, reservation: RedisReservation, stamp: float, counted: bool) -> None:
        """Note that a request may be sent. counted: Redis has counted it."""
        self.leave(reservation)
        reservation.stamp = stamp
        self.confirmed += 1
        if counted:
            reservation.round = None

    def made_alone(self, reservation: RedisReservation) -> bool:
        """Return whether a reservation was made from this proxy's share, not from the whole limit."""
        return not self.shared and reservation.alone

    def change(self, limits: Limits, use: float) -> None:
        alone, now = not self.shared, self._known_at
        if alone:
            self.share()
        super().change(limits, use)
        self._full = [window.limit for window in self._windows]
        self._max_concurrency = self._concurrency
        if alone:
            self.use_share(*self._among, now)

    # -- without Redis -------------------------------------------------------------------------------------------------

    def use_share(self, proxies: int, rank: int, now: float) -> None:
        """Use an equal share of the limit from now on, less this proxy's part of what all were last known to use.

        rank: this proxy's place among the `proxies`.
        """
        self.shared = False
        self._among = proxies, rank
        self._blocked = _FREE
        for window, full in zip(self._windows, self._full, strict=True):
            window.advance(now)
            window.limit = part(full, proxies, rank)
            known = self._known.get(window.name)
            if known is not None and now - self._known_at < window.span:
                # What others use reduces this share. If this proxy uses more than its part, that is not compensated:
                # the others may not know of it yet.
                ours = window.total - self._asking[window.counts_tokens]
                slot = window.add_alone(max(0, part(known, proxies, proxies - 1 - rank) - ours), now)
                self._others_use.append((window, slot))
        # For some seconds only a part of what was free then may be used: perhaps only this proxy has lost Redis, and
        # then the others use what leaves the windows meanwhile.
        self._frozen_until, self._taken = now + HOLD_AFTER_OUTAGE, (0, 0)
        self._free = [(window.counts_tokens, window.limit - window.total) for window in self._windows]
        if self._max_concurrency is not None:
            self._concurrency = part(self._max_concurrency, proxies, rank)
            self._free.append(
                (False, part(max(self._max_concurrency - self._known.get("concurrency", 0), 0), proxies, rank))
            )

    def share(self) -> None:
        """Use the whole limit again, together with the others."""
        self.shared = True
        self._frozen_until = -math.inf
        for window, slot in self._others_use:
            window.correct(slot, -slot.amount)
        self._others_use.clear()
        for window, full in zip(self._windows, self._full, strict=True):
            window.limit = full
        self._concurrency = self._max_concurrency

    def published(self) -> None:
        """Note that everything in the windows was published."""
        self.round += 1

    def used_since(self, moment: float) -> list[tuple[_Window, float, int]]:
        """Return (window, time, amount) of this proxy's requests since `moment`, in monotonic seconds."""
        others = {id(slot) for _, slot in self._others_use}
        return [
            (window, slot.latest, slot.amount)
            for window in self._windows
            for slot in window.buckets
            if slot.latest >= moment and slot.amount and id(slot) not in others
        ]

    def reset(self) -> None:
        super().reset()
        self._others_use.clear()
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
    """Return one proxy's equal part of an amount; the parts of all proxies add up to it."""
    return amount // proxies + (1 if rank < amount % proxies else 0)


def read_decision(reply: Sequence[Any]) -> tuple[int, float, float, int, Sequence[Any], Sequence[int]]:
    """Return the script's decision. Raises ValueError or TypeError if the reply has another shape."""
    code, server, wait, running, states, totals = reply
    return int(code), float(server), float(wait), int(running), list(states), [int(total) for total in totals]
