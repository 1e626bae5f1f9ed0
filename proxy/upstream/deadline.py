"""A deadline shared by coalesced requests: it moves when one with a later deadline joins."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from contextlib import suppress

from .interfaces import ConnectionInfo


class SharedDeadline:
    """The time by which a response must be there. at: monotonic seconds. clock: reads them.

    act_until: monotonic seconds from which on the proxy begins nothing by itself (a wait, a pause, another attempt),
    because the client gives up soon after. An upstream call under way is left to the client's own timeout.
    A request that joins with more time extends both, and with them the timeout that runs now. So a short deadline of
    the first request ends only that request.
    """

    __slots__ = ("_clock", "_connection", "_latest", "_running", "act_until", "at")

    def __init__(self, until: float, clock: Callable[[], float], act_until: float = math.inf) -> None:
        self.at = until
        self.act_until = min(until, act_until)
        self._clock = clock
        self._running: asyncio.Timeout | None = None
        self._connection: ConnectionInfo | None = None
        self._latest = 0.0

    def left(self) -> float:
        """Return the seconds left, which may be negative."""
        return self.at - self._clock()

    def left_to_act(self) -> float:
        """Return the seconds left for what the proxy does by itself, which may be negative."""
        return self.act_until - self._clock()

    def limit(self) -> asyncio.Timeout:
        """Return a timeout to enter at once: it raises TimeoutError at the deadline. One runs at a time."""
        self._running = asyncio.timeout(max(0.0, self.at - self._clock()))
        return self._running

    def sending(self, connection: ConnectionInfo, latest: float) -> None:
        """A request is sent: the head of its response is waited for until the deadline, but not beyond `latest`.

        latest: monotonic seconds.
        """
        self._connection, self._latest = connection, latest

    def extend(self, until: float, act_until: float = math.inf) -> None:
        """Move the deadline to `until`, and the end of the proxy's own actions to `act_until`, where that is later."""
        self.act_until = max(self.act_until, min(until, act_until))
        if until <= self.at:
            return
        self.at = until
        if self._connection is not None:
            ahead = asyncio.get_running_loop().time() - self._clock()
            self._connection.until = min(until, self._latest) + ahead
            if self._connection.extend is not None:
                self._connection.extend(self._connection.until)
        if self._running is not None:
            with suppress(RuntimeError):  # it has ended or expired
                self._running.reschedule(asyncio.get_running_loop().time() + self.left())
