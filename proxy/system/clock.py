"""The only file that reads a clock, sleeps, draws random numbers or starts tasks. Tests replace its `Clock`."""

from __future__ import annotations

import asyncio
import logging
import os
import random
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any

log = logging.getLogger("proxy")


class _Ids:
    """Unguessable ids. Random bytes are drawn for 256 ids at once, since each draw is a system call."""

    def __init__(self) -> None:
        self._left: list[str] = []

    def __call__(self) -> str:
        if not self._left:
            drawn = os.urandom(16 * 256).hex()
            self._left = [drawn[start : start + 32] for start in range(0, len(drawn), 32)]
        return self._left.pop()


_ids = _Ids()


@dataclass(frozen=True, slots=True)
class Clock:
    """The clock and other sources of chance.

    monotonic: seconds, for durations.
    wall: Unix seconds.
    random: a number from 0 to below 1.
    new_id: 32 hexadecimal characters.
    """

    monotonic: Callable[[], float] = time.monotonic
    wall: Callable[[], float] = time.time
    random: Callable[[], float] = random.random
    sleep: Callable[[float], Coroutine[Any, Any, None]] = asyncio.sleep
    new_id: Callable[[], str] = _ids


SYSTEM_CLOCK = Clock()

_tasks: set[asyncio.Task[Any]] = set()


def spawn(coroutine: Coroutine[Any, Any, Any], name: str) -> asyncio.Task[Any]:
    """Start a background task. It is referenced until it ends, and an exception in it is logged."""
    task = asyncio.get_running_loop().create_task(coroutine, name=name)
    _tasks.add(task)
    task.add_done_callback(_finished)
    return task


def _finished(task: asyncio.Task[Any]) -> None:
    _tasks.discard(task)
    if not task.cancelled() and (error := task.exception()) is not None:
        log.error("background task %s failed: %r", task.get_name(), error)
