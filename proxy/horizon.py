"""Until when somebody still waits for an answer: it may move on while the answer is being fetched."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager


class Horizon:
    """until: monotonic seconds. Whoever joins a flight with more time of his own moves it, and with it the timeout that
    runs: so the first one's short deadline ends his own waiting only."""

    __slots__ = ("_clock", "_running", "until")

    def __init__(self, until: float, clock: Callable[[], float]) -> None:
        self.until = until
        self._clock = clock
        self._running: asyncio.Timeout | None = None

    def left(self) -> float:
        """Seconds."""
        return self.until - self._clock()

    @asynccontextmanager
    async def limit(self) -> AsyncIterator[None]:
        """Raises TimeoutError where what runs inside is not over by then. One at a time."""
        async with asyncio.timeout(max(0.0, self.left())) as running:
            self._running = running
            try:
                yield
            finally:
                self._running = None

    def extend(self, until: float) -> None:
        """Moves the horizon on; never back."""
        if until <= self.until:
            return
        self.until = until
        if self._running is not None and not self._running.expired():
            self._running.reschedule(asyncio.get_running_loop().time() + self.left())
