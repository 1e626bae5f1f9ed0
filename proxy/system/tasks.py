"""Background tasks that run as long as the proxy: whatever ends one, it starts again."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Coroutine
from typing import Any, Final

from .clock import SYSTEM_CLOCK, Clock, spawn

log = logging.getLogger("proxy")

RESTARTS: Final[Counter[str]] = Counter()
"""How often each background task was started again, by its name."""

_FIRST_PAUSE, _LONGEST_PAUSE = 1.0, 60.0
_LOG_INTERVAL: Final = 10.0


def spawn_forever(
    work: Callable[[], Coroutine[Any, Any, None]], name: str, clock: Clock = SYSTEM_CLOCK
) -> asyncio.Task[None]:
    """Start a task that calls `work` again whenever it ends, after a pause that doubles, until it is cancelled.

    An exception is logged, at most once in 10 s, and counted.
    """
    return spawn(_keep_running(work, name, clock), name)


async def _keep_running(work: Callable[[], Coroutine[Any, Any, None]], name: str, clock: Clock) -> None:
    pause, silent_until = _FIRST_PAUSE, 0.0
    while True:
        began = clock.monotonic()
        try:
            await work()
            reason = "it ended"
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
        now = clock.monotonic()
        RESTARTS[name] += 1
        if now >= silent_until:
            log.error("background task %s stopped (%s); it starts again in %g s", name, reason, pause)
            silent_until = now + _LOG_INTERVAL
        await clock.sleep(pause)
        pause = _FIRST_PAUSE if now - began > _LONGEST_PAUSE else min(2 * pause, _LONGEST_PAUSE)
