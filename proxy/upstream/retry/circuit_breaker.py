"""The circuit breaker of one upstream: after several failures in a row nothing is sent there for a while."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final, Literal, get_args

if TYPE_CHECKING:
    from ...config.settings import BreakerSettings

State = Literal["closed", "open", "half_open"]
STATES: Final[tuple[State, ...]] = get_args(State)


def _ignore(state: State, seconds: float, reason: str) -> None:
    pass


def _cause(kind: int) -> str:
    return f"status {kind}" if kind else "no answer"


class CircuitBreaker:
    """One upstream's health. `now` is monotonic seconds.

    Only failures in a row count, so that a busy upstream with a few errors in a thousand responses never opens it. Each
    kind counts by itself: an upstream that is down fails the same way every time, while different errors are news that
    the client should see.
    """

    __slots__ = ("_failed", "_open_until", "_probing", "on_change", "settings")

    def __init__(self, settings: BreakerSettings) -> None:
        self.settings = settings
        self._failed: dict[int, list[float]] = {}
        self._open_until: float | None = None
        self._probing = False
        self.on_change: Callable[[State, float, str], None] = _ignore
        """Called at each change: (state, seconds that it lasts or 0, reason)."""

    def wait(self, now: float) -> float:
        """Return the seconds until a request may be sent; 0.0: now."""
        return 0.0 if self._open_until is None else max(0.0, self._open_until - now)

    def sends(self, now: float) -> None:
        """A request is sent. If the breaker's time is over, it is the probe, and the others wait for its outcome.

        They wait no longer than the breaker stays open.
        """
        if self._open_until is not None and self._open_until <= now:
            begins = not self._probing
            self._probing = True
            self._open_until = now + self.settings.open_for
            if begins:
                self.on_change("half_open", 0.0, "one request tries the upstream")

    def record_success(self) -> None:
        """The upstream answered: it is there, whatever it said."""
        if self._failed or self._open_until is not None:
            was_open = self._open_until is not None
            self._failed.clear()
            self._open_until = None
            self._probing = False
            if was_open:
                self.on_change("closed", 0.0, "it answers again")

    def record_failure(self, now: float, kind: int = 0) -> None:
        """The upstream did not answer, or said that it is broken. kind: see `outcome.breaker_failure`."""
        if self._open_until is not None:
            if self._probing:
                self._probing = False
                self._open_until = now + self.settings.open_for
                self.on_change("open", self.settings.open_for, f"still {_cause(kind)}")
            return  # it was sent before the breaker opened, and says nothing new
        same = [stamp for stamp in self._failed.get(kind, ()) if now - stamp < self.settings.window]
        self._failed[kind] = [*same, now]
        if len(self._failed[kind]) >= self.settings.failures:
            self._failed.clear()
            self._open_until = now + self.settings.open_for
            self.on_change("open", self.settings.open_for, f"{self.settings.failures} times in a row {_cause(kind)}")

    def state(self, now: float) -> State:
        if self._open_until is None:
            return "closed"
        return "half_open" if self._probing or self._open_until <= now else "open"
