"""Turned time: an event loop whose clock jumps to the next timer instead of waiting for it.

Everything that asyncio times (sleeps, timeouts, the gate's naps) happens in order and at once: an hour takes
milliseconds, and the order of events is the same in every run. Only work in threads is waited for.
"""

from __future__ import annotations

import asyncio
import functools
import selectors
from collections.abc import Callable, Coroutine, Mapping
from concurrent.futures import Executor
from typing import Any, ParamSpec, TypeVar, TypeVarTuple, Unpack

P = ParamSpec("P")
R = TypeVar("R")
Ts = TypeVarTuple("Ts")

START = 1_000_000.0
"""The loop's time at its beginning (monotonic s): not 0, so that a clock mistaken for a duration is seen."""

WALL = 1_790_000_000.0
"""Unix time at `START`."""


class Stuck(Exception):
    """Nothing can ever happen again: everybody waits, and nobody will come."""


class _Selector(selectors.BaseSelector):
    """Called once in every turn of the loop: polls, and turns the clock where the loop would have slept."""

    def __init__(self) -> None:
        self._real = selectors.DefaultSelector()
        self.now = START
        self.steps = 0
        self.at: dict[int, Callable[[], object]] = {}
        self.threads = 0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        step, self.steps = self.steps, self.steps + 1
        if (told := self.at.pop(step, None)) is not None:
            told()
            return []
        ready = self._real.select(0)
        if ready or (timeout is not None and timeout <= 0):
            return ready
        if self.threads:
            return self._real.select(5)
        if timeout is None:
            raise Stuck
        self.now += timeout
        return []

    def register(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        return self._real.register(fileobj, events, data)

    def unregister(self, fileobj: Any) -> selectors.SelectorKey:
        return self._real.unregister(fileobj)

    def modify(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        return self._real.modify(fileobj, events, data)

    def close(self) -> None:
        self._real.close()

    def get_map(self) -> Mapping[Any, selectors.SelectorKey]:
        return self._real.get_map()


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    """`troubles`: what nobody caught: failed tasks, callbacks, generators."""

    def __init__(self) -> None:
        self._turned = _Selector()
        super().__init__(self._turned)
        self.troubles: list[str] = []
        self.set_exception_handler(lambda _, context: self.troubles.append(str(context)))

    def time(self) -> float:
        return self._turned.now

    @property
    def steps(self) -> int:
        """Turns of the loop so far."""
        return self._turned.steps

    def at_step(self, step: int, callback: Callable[[], object]) -> None:
        """Calls `callback` in the `step`-th turn from now, between whatever happens in it and before."""
        self._turned.at[self.steps + step] = callback

    def run_in_executor(
        self, executor: Executor | None, func: Callable[[Unpack[Ts]], R], *args: *Ts
    ) -> asyncio.Future[R]:
        """As ever; the clock stands while a thread works."""
        self._turned.threads += 1
        future = super().run_in_executor(executor, func, *args)
        future.add_done_callback(self._came_back)
        return future

    def _came_back(self, _: object) -> None:
        self._turned.threads -= 1

    async def shutdown_default_executor(self, *args: Any, **kwargs: Any) -> None:
        self._turned.threads += 1  # its threads are joined in a thread
        await super().shutdown_default_executor(*args, **kwargs)


def run(main: Coroutine[Any, Any, None]) -> None:
    """Runs a story to its end in turned time. Fails where anything was left to the loop's exception handler."""
    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        runner.run(main)
        loop = runner.get_loop()
        assert isinstance(loop, VirtualTimeLoop)
        runner.run(asyncio.sleep(0))
        troubles = loop.troubles
    assert not troubles, troubles


def virtual_time(test: Callable[P, Coroutine[Any, Any, None]]) -> Callable[P, None]:
    """A test that is told in turned time."""

    @functools.wraps(test)
    def told(*args: P.args, **kwargs: P.kwargs) -> None:
        run(test(*args, **kwargs))

    return told


def virtual_time_loop() -> VirtualTimeLoop:
    loop = asyncio.get_running_loop()
    assert isinstance(loop, VirtualTimeLoop)
    return loop


async def settled(turns: int = 20) -> None:
    """Lets everything happen that needs no time."""
    for _ in range(turns):
        await asyncio.sleep(0)
