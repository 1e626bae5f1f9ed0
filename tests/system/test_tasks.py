"""Background tasks start again, whatever ends them."""

from __future__ import annotations

import asyncio
import logging

import pytest

from proxy.system.clock import Clock
from proxy.system.tasks import RESTARTS, spawn_forever


async def test_a_task_that_fails_or_ends_starts_again_after_pauses_that_double(
    caplog: pytest.LogCaptureFixture,
) -> None:
    now, pauses, calls, blocked = 0.0, list[float](), 0, asyncio.Event()

    async def sleep(seconds: float) -> None:
        nonlocal now
        pauses.append(seconds)
        now += seconds
        await asyncio.sleep(0)

    async def work() -> None:
        nonlocal calls, now
        calls += 1
        if calls == 5:
            now += 100.0  # it ran for long: the next pause is short again
        if calls % 2:
            raise AttributeError("a driver's own fault")
        if calls > 6:
            blocked.set()
            await asyncio.Event().wait()

    before = RESTARTS["a test"]
    with caplog.at_level(logging.ERROR, "proxy"):
        task = spawn_forever(work, "a test", Clock(monotonic=lambda: now, sleep=sleep))
        async with asyncio.timeout(15):
            await blocked.wait()
        task.cancel()
        await asyncio.wait([task])
    assert task.cancelled()
    assert RESTARTS["a test"] - before == 7
    assert pauses == [1, 2, 4, 8, 16, 1, 2]
    assert (
        "background task a test stopped (AttributeError: a driver's own fault); it starts again in 1 s" in caplog.text
    )
    assert 1 < len(caplog.records) < 7  # one line in 10 s
