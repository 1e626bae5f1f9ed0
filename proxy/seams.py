"""The only room that reads a clock, sleeps, rolls dice or starts a task. Tests put their own in its place."""

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


@dataclass(frozen=True, slots=True)
class Seams:
    """monotonic: seconds for durations; wall: Unix seconds; random: [0, 1); new_id: 32 hex characters."""

    monotonic: Callable[[], float] = time.monotonic
    wall: Callable[[], float] = time.time
    random: Callable[[], float] = random.random
    sleep: Callable[[float], Coroutine[Any, Any, None]] = asyncio.sleep
    new_id: Callable[[], str] = lambda: os.urandom(16).hex()


REAL = Seams()

_tasks: set[asyncio.Task[Any]] = set()


def spawn(coroutine: Coroutine[Any, Any, Any], name: str) -> asyncio.Task[Any]:
    """A background task that is kept alive until done and whose crash is logged."""
    task = asyncio.get_running_loop().create_task(coroutine, name=name)
    _tasks.add(task)
    task.add_done_callback(_finished)
    return task


def _finished(task: asyncio.Task[Any]) -> None:
    _tasks.discard(task)
    if not task.cancelled() and (error := task.exception()) is not None:
        log.error("background task %s failed: %r", task.get_name(), error)
