"""Rate limits shared by all workers.

As with Redis, a worker's own windows decide first; the supervisor confirms each reservation, or it is cancelled.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from typing import Final
from weakref import WeakSet

from ..config.limits import Limits
from ..upstream.limits.rate_limiter import ExceedsLimit, RateLimiter, Reservation, Wait
from ..upstream.limits.shared import RECHECK, ApplyRemoteState, RemoteState
from .ipc import ConnectionLost
from .shared_state import pack, unpack
from .worker import WorkerLink

_REPORT_LIFETIME: Final = 5.0
"""Seconds for which the supervisor's report of the use of a limit is shown."""

_NOT_BLOCKED: Final = (-math.inf, -math.inf, 0)

OnRelease = Callable[[int, bool, int | None], None]
"""Called with a reservation's number, whether it was sent upstream, and its tokens."""


class _WorkerReservation(Reservation):
    """A reservation that the supervisor counts too. number: its name there."""

    __slots__ = ("number", "on_release", "rate_limiter")

    def __init__(self, rate_limiter: WorkerRateLimiter, tokens: int, local: Reservation, number: int) -> None:
        super().__init__(rate_limiter, tokens, local._windows, local._buckets)
        self.rate_limiter = rate_limiter
        self.number = number
        self.on_release = rate_limiter.on_release

    def settle(self, tokens: int | None) -> None:
        if self._open:
            super().settle(tokens)
            self.on_release(self.number, True, tokens)

    def cancel(self) -> None:
        if self._open:
            super().cancel()
            self.on_release(self.number, False, None)


class WorkerRateLimiter(RateLimiter):
    """This worker's part of a limit that the supervisor counts. limit_id: quota (or client) and model."""

    __slots__ = (
        "__weakref__",
        "_blocked",
        "_numbers",
        "_reported",
        "_reported_at",
        "limit_id",
        "limits",
        "on_release",
        "use",
    )

    def __init__(
        self,
        limit_id: tuple[str, str],
        limits: Limits,
        use: float,
        numbers: itertools.count[int],
        on_release: OnRelease,
    ) -> None:
        super().__init__(limits, use)
        self.limit_id = limit_id
        self._numbers = numbers
        self.on_release = on_release
        self._blocked = _NOT_BLOCKED
        self._reported: Mapping[str, int] = {}
        self._reported_at = -math.inf

    def change(self, limits: Limits, use: float) -> None:
        self.limits, self.use = limits, use
        super().change(limits, use)

    def reserve(self, tokens: int, now: float) -> Reservation | Wait | ExceedsLimit:
        tokens = max(tokens, 0)
        until, due, refused_tokens = self._blocked
        if now < until and tokens >= refused_tokens:
            return Wait(due - now)
        answer = super().reserve(tokens, now)
        if isinstance(answer, Reservation):
            return _WorkerReservation(self, tokens, answer, next(self._numbers))
        return answer

    def block(self, wait: float, tokens: int, now: float) -> None:
        """Let requests of `tokens` or more wait: the supervisor has refused one, for `wait` seconds.

        It is asked again after `RECHECK`, because other workers may release capacity earlier.
        """
        self._blocked = (now + min(wait, 0.9 * RECHECK), now + wait, tokens)

    def unblock(self) -> None:
        """Ask the supervisor at once: another worker has released capacity."""
        self._blocked = _NOT_BLOCKED

    def apply_report(self, used: Mapping[str, int], now: float) -> None:
        """Record the use of all workers."""
        self._reported, self._reported_at = used, now

    def reset(self) -> None:
        super().reset()
        self._reported = {}
        self._blocked = _NOT_BLOCKED

    def _levels(self, now: float) -> dict[str, tuple[int, int]]:
        levels = super()._levels(now)
        if now - self._reported_at < _REPORT_LIFETIME:
            for name, used in self._reported.items():
                if name in levels:
                    levels[name] = (max(levels[name][0], used), levels[name][1])
        return levels


class WorkerLimits:
    """`SharedLimits`, counted by the supervisor. clock: monotonic seconds."""

    def __init__(self, link: WorkerLink, clock: Callable[[], float]) -> None:
        self._link = link
        self._clock = clock
        self._numbers = itertools.count(1)
        self._published: dict[tuple[str, str], float] = {}
        self._apply_state: ApplyRemoteState = lambda *_: None
        self._rate_limiters: WeakSet[WorkerRateLimiter] = WeakSet()
        self.on_capacity: Callable[[], None] = lambda: None
        """Called when another worker has released capacity."""
        link.channel.handlers["key_state"] = self._receive_key_state
        link.channel.handlers["capacity"] = self._receive_capacity

    @property
    def sound(self) -> bool:
        return True

    def rate_limiter(self, limit_id: tuple[str, str], limits: Limits, use: float) -> RateLimiter:
        rate_limiter = WorkerRateLimiter(limit_id, limits, use, self._numbers, self._release)
        self._rate_limiters.add(rate_limiter)
        return rate_limiter

    async def open(self, apply_state: ApplyRemoteState) -> None:
        self._apply_state = apply_state

    async def close(self) -> None:
        await self._link.channel.flush()

    async def confirm(self, reservation: Reservation | None, key: str = "", model: str = "") -> bool:
        if reservation is None:
            return True
        assert isinstance(reservation, _WorkerReservation)
        rate_limiter, tokens = reservation.rate_limiter, reservation.tokens
        body = pack(reservation.number, rate_limiter.limit_id, rate_limiter.limits, rate_limiter.use, tokens)
        try:
            granted, wait, used = unpack(await self._link.channel.request("reserve", body), bool, float, dict[str, int])
        except ConnectionLost:
            granted, wait, used = False, RECHECK, {}
        now = self._clock()
        rate_limiter.apply_report(used, now)
        if not granted:
            rate_limiter.block(wait, tokens, now)
            reservation.cancel()
        return bool(granted)

    def _receive_capacity(self, _: bytes) -> None:
        for rate_limiter in self._rate_limiters:
            rate_limiter.unblock()
        self.on_capacity()

    def _release(self, number: int, sent: bool, tokens: int | None) -> None:
        self._link.channel.notify("release", pack(number, sent, tokens))

    def publish_key_state(self, key: str, model: str, states: Mapping[str, RemoteState]) -> None:
        """Send states that are new or last longer to the other workers."""
        now = self._clock()
        for slot, (status, seconds, reason) in states.items():
            state_id = key, slot
            if now + seconds > self._published.get(state_id, -math.inf) + 0.001:
                self._remember(state_id, now + seconds)
                self._link.notify_peers("key_state", pack(key, slot, status, seconds, reason))

    def _receive_key_state(self, body: bytes) -> None:
        key, slot, status, seconds, reason = unpack(body, str, str, str, float, str)
        self._remember((key, slot), self._clock() + seconds)
        self._apply_state(key, slot.partition(" ")[2], status, seconds, reason)

    def _remember(self, state_id: tuple[str, str], until: float) -> None:
        if len(self._published) >= 10_000:
            self._published.clear()
        self._published[state_id] = until

    def reset(self) -> None:
        self._link.channel.notify("reset")
