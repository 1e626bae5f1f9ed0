"""Until when somebody still waits for an answer: it may move on while the answer is being fetched."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress

from .interfaces import ConnectionInfo


class SharedDeadline:
    """until: monotonic seconds. Whoever joins a flight with more time of his own moves it, and with it the timeout that
    runs: so the first one's short deadline ends his own waiting only."""

    __slots__ = ("_clock", "_connection", "_latest", "_running", "at")

    def __init__(self, until: float, clock: Callable[[], float]) -> None:
        self.at = until
        self._clock = clock
        self._running: asyncio.Timeout | None = None
        self._connection: ConnectionInfo | None = None
        self._latest = 0.0

    def left(self) -> float:
        """Seconds."""
        return self.at - self._clock()

    def limit(self) -> asyncio.Timeout:
        """To be entered at once: raises TimeoutError where what runs inside is not over by then. One at a time."""
        self._running = asyncio.timeout(max(0.0, self.at - self._clock()))
        return self._running

    def sending(self, connection: ConnectionInfo, latest: float) -> None:
        """A call is made, whose answer's head may be waited for until then, but no longer than `latest` (monotonic
        seconds)."""
        self._connection, self._latest = connection, latest

    def extend(self, until: float) -> None:
        """Moves the horizon on; never back."""
        if until <= self.at:
            return
        self.at = until
        if self._connection is not None:
            ahead = asyncio.get_running_loop().time() - self._clock()
            self._connection.until = min(until, self._latest) + ahead
            if self._connection.extend is not None:
                self._connection.extend(self._connection.until)
        if self._running is not None:
            with suppress(RuntimeError):  # it is over, or has expired
                self._running.reschedule(asyncio.get_running_loop().time() + self.left())
