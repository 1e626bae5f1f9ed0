"""The circuit breaker of one upstream (contract 3, `breaker`): after failures in a row nothing is sent for a while."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Literal, get_args

if TYPE_CHECKING:
    from ...config.settings import BreakerSettings

State = Literal["closed", "open", "half_open"]
STATES: Final[tuple[State, ...]] = get_args(State)


class CircuitBreaker:
    """One upstream's health. Failures count in a row, so that a busy upstream with a few errors in a thousand answers
    never trips it; and each kind by itself: what is dead fails the same way every time, while different errors are
    news, which the client should see. `now` is monotonic seconds.
    """

    __slots__ = ("_failed", "_open_until", "_probing", "settings")

    def __init__(self, settings: BreakerSettings) -> None:
        self.settings = settings
        self._failed: dict[int, list[float]] = {}
        self._open_until: float | None = None
        self._probing = False

    def wait(self, now: float) -> float:
        """Seconds until a request may be sent; 0.0 now."""
        return 0.0 if self._open_until is None else max(0.0, self._open_until - now)

    def sends(self, now: float) -> None:
        """A request goes up: in an open breaker whose time is over it is the probe, and the others wait for it, but no
        longer than for another opening.
        """
        if self._open_until is not None and self._open_until <= now:
            self._probing = True
            self._open_until = now + self.settings.open_for

    def record_success(self) -> None:
        """The upstream answered; whatever it said, it is there."""
        if self._failed or self._open_until is not None:
            self._failed.clear()
            self._open_until = None
            self._probing = False

    def record_failure(self, now: float, kind: int = 0) -> None:
        """No answer, or an answer that says that the upstream is broken. kind: `outcome.ailment`."""
        if self._open_until is not None:
            if self._probing:
                self._probing = False
                self._open_until = now + self.settings.open_for
            return  # sent before it opened: it says nothing new
        same = [stamp for stamp in self._failed.get(kind, ()) if now - stamp < self.settings.window]
        self._failed[kind] = [*same, now]
        if len(self._failed[kind]) >= self.settings.failures:
            self._failed.clear()
            self._open_until = now + self.settings.open_for

    def state(self, now: float) -> State:
        if self._open_until is None:
            return "closed"
        return "half_open" if self._probing or self._open_until <= now else "open"
