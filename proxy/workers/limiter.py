"""Limits that hold across workers: the parent counts. A worker's own windows decide first, as with Redis; what they
would admit is confirmed by the parent, or taken back.
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

_KNOWN_FOR: Final = 5.0
"""Seconds for which what the parent said of use is shown."""

_FREE: Final = (-math.inf, -math.inf, 0)

Tell = Callable[[int, bool, int | None], None]


class _WorkerReservation(Reservation):
    """A reservation that the parent counts too. number: by which it knows it."""

    __slots__ = ("allowance", "number", "tell")

    def __init__(self, allowance: WorkerRateLimiter, tokens: int, made: Reservation, number: int, tell: Tell) -> None:
        super().__init__(allowance, tokens, made._windows, made._buckets)
        self.allowance = allowance
        self.number = number
        self.tell = tell

    def settle(self, tokens: int | None) -> None:
        if self._open:
            super().settle(tokens)
            self.tell(self.number, True, tokens)

    def cancel(self) -> None:
        if self._open:
            super().cancel()
            self.tell(self.number, False, None)


class WorkerRateLimiter(RateLimiter):
    """This worker's part of limits that the parent counts."""

    __slots__ = ("__weakref__", "_blocked", "_known", "_known_at", "_numbers", "_tell", "limits", "use", "where")

    def __init__(
        self, where: tuple[str, str], limits: Limits, use: float, numbers: itertools.count[int], tell: Tell
    ) -> None:
        super().__init__(limits, use)
        self.where = where
        self._numbers = numbers
        self._tell = tell
        self._blocked = _FREE
        self._known: Mapping[str, int] = {}
        self._known_at = -math.inf

    def change(self, limits: Limits, use: float) -> None:
        self.limits, self.use = limits, use
        super().change(limits, use)

    def reserve(self, tokens: int, now: float) -> Reservation | Wait | ExceedsLimit:
        tokens = max(tokens, 0)
        until, due, of = self._blocked
        if now < until and tokens >= of:
            return Wait(due - now)
        answer = super().reserve(tokens, now)
        if isinstance(answer, Reservation):
            return _WorkerReservation(self, tokens, answer, next(self._numbers), self._tell)
        return answer

    def refused(self, wait: float, tokens: int, now: float) -> None:
        """There is no room for `wait` s, unless somebody gives back: the parent is asked again after `RECHECK`."""
        self._blocked = (now + min(wait, 0.9 * RECHECK), now + wait, tokens)

    def ask_again(self) -> None:
        """Others gave back."""
        self._blocked = _FREE

    def seen(self, used: Mapping[str, int], now: float) -> None:
        """What all workers together hold."""
        self._known, self._known_at = used, now

    def reset(self) -> None:
        super().reset()
        self._known = {}
        self._blocked = _FREE

    def _levels(self, now: float) -> dict[str, tuple[int, int]]:
        levels = super()._levels(now)
        if now - self._known_at < _KNOWN_FOR:
            for name, used in self._known.items():
                if name in levels:
                    levels[name] = (max(levels[name][0], used), levels[name][1])
        return levels


class WorkerLimits:
    """`limiters.Limiter`, with the parent in Redis' place. clock: monotonic seconds."""

    def __init__(self, seat: WorkerLink, clock: Callable[[], float]) -> None:
        self._seat = seat
        self._clock = clock
        self._numbers = itertools.count(1)
        self._told: dict[tuple[str, str], float] = {}
        self._adopt: ApplyRemoteState = lambda *_: None
        self._allowances: WeakSet[WorkerRateLimiter] = WeakSet()
        self.room: Callable[[], None] = lambda: None
        """Called when it is worth while to ask again."""
        seat.channel.handlers["learned"] = self._heard
        seat.channel.handlers["room"] = self._room

    @property
    def sound(self) -> bool:
        return True

    def rate_limiter(self, where: tuple[str, str], limits: Limits, use: float) -> RateLimiter:
        made = WorkerRateLimiter(where, limits, use, self._numbers, self._settle)
        self._allowances.add(made)
        return made

    async def open(self, adopt: ApplyRemoteState) -> None:
        self._adopt = adopt

    async def close(self) -> None:
        await self._seat.channel.flush()

    async def confirm(self, reservation: Reservation | None, key: str = "", model: str = "") -> bool:
        if reservation is None:
            return True
        assert isinstance(reservation, _WorkerReservation)
        allowance, tokens = reservation.allowance, reservation.tokens
        body = pack(reservation.number, allowance.where, allowance.limits, allowance.use, tokens)
        try:
            granted, wait, used = unpack(await self._seat.channel.request("reserve", body), bool, float, dict[str, int])
        except ConnectionLost:
            granted, wait, used = False, RECHECK, {}
        now = self._clock()
        allowance.seen(used, now)
        if not granted:
            allowance.refused(wait, tokens, now)
            reservation.cancel()
        return bool(granted)

    def _room(self, _: bytes) -> None:
        for allowance in self._allowances:
            allowance.ask_again()
        self.room()

    def _settle(self, number: int, went: bool, tokens: int | None) -> None:
        self._seat.channel.notify("settle", pack(number, went, tokens))

    def publish_key_state(self, key: str, model: str, states: Mapping[str, RemoteState]) -> None:
        """Tells the others of states that have come or grown."""
        now = self._clock()
        for slot, (status, seconds, reason) in states.items():
            where = key, slot
            if now + seconds > self._told.get(where, -math.inf) + 0.001:
                self._note(where, now + seconds)
                self._seat.tell("learned", pack(key, slot, status, seconds, reason))

    def _heard(self, body: bytes) -> None:
        key, slot, status, seconds, reason = unpack(body, str, str, str, float, str)
        self._note((key, slot), self._clock() + seconds)
        self._adopt(key, slot.partition(" ")[2], status, seconds, reason)

    def _note(self, where: tuple[str, str], until: float) -> None:
        if len(self._told) >= 10_000:
            self._told.clear()
        self._told[where] = until

    def reset(self) -> None:
        self._seat.channel.notify("reset")
