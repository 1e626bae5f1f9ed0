"""The way to Redis: connections, one deadline for each command, and a breaker. Imported only with the backend."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any, Final, TypeVar, cast

from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import ResponseError

from .clock import spawn

log = logging.getLogger("proxy.cache")
T = TypeVar("T")

DEADLINE_MAX: Final = 2.0
"""Seconds a command may take behind the caller's back (a connection being made, a long write), before it is closed."""

_CONNECTIONS: Final = 32
_FAILURES: Final = 3
_PROBE_FIRST, _PROBE_LAST = 0.5, 2.5  # and LONGEST for the answer: a probe at least every 5 s


class RedisConnection:
    """Redis as long as it answers. deadline: seconds within which a probe must be answered; what, meanwhile: for logs.

    up: whether it may be asked; state: "ok", or what is wrong; gone: the last failure was no late answer, nobody is
    there. Raises ValueError, without the URL's text.
    """

    def __init__(
        self, url: str, deadline: float, what: str = "redis cache", meanwhile: str = "answers are served without it"
    ) -> None:
        self._what, self._meanwhile = what, meanwhile
        self._pool = _pool(url)
        self.redis = Redis.from_pool(self._pool)
        self._slots = asyncio.Semaphore(self._pool.max_connections)  # so that nobody queues in the pool itself
        self._deadline = deadline
        self.up = False
        self.state = "not open"
        self.gone = False
        self.failures = 0
        """All so far."""
        self._in_a_row = 0
        self._probing: asyncio.Task[None] | None = None
        self._complain_at = 0.0

    @property
    def in_doubt(self) -> bool:
        """The last command failed, or Redis is given up: what can be done without should be."""
        return not self.up or self._in_a_row > 0

    async def open(self) -> None:
        """Returns after the first attempt, or after a second."""
        first = asyncio.get_running_loop().create_future()
        self._probing = spawn(self._probe(first), "redis probe")
        await asyncio.wait({first}, timeout=1.0)

    async def close(self) -> None:
        self.up = False
        if self._probing is not None:
            self._probing.cancel()
        with contextlib.suppress(Exception):
            await self._pool.disconnect(inuse_connections=True)

    async def drop_connections(self, busy: bool = False) -> None:
        """Those not in use, with `busy` all: the name is looked up anew, and no answer is left over."""
        await self._pool.disconnect(inuse_connections=busy)

    async def run(self, command: Callable[[], Awaitable[T]], patience: float) -> T:
        """Runs the command in a task of its own; raises TimeoutError after `patience` seconds and leaves it to itself.

        Raises RedisError, OSError, TimeoutError. Counts towards the breaker what speaks about the link, once.
        """
        began, late = False, False

        async def alone() -> T | Exception:
            nonlocal began
            try:
                async with asyncio.timeout(max(DEADLINE_MAX, patience)), self._slots:
                    if late:
                        return TimeoutError()
                    began = True
                    return await command()
            except Exception as error:
                return error

        task = spawn(alone(), "redis command")
        await asyncio.wait({task}, timeout=patience)
        if not task.done():
            late = True
            if began:  # else it only waited for its turn
                self.gone = False
                self._failed(f"no answer within {patience * 1000:.0f} ms")
            raise TimeoutError
        outcome: T | Exception = task.result()
        if not isinstance(outcome, Exception):
            self._in_a_row, self.gone = 0, False
            return outcome
        if not isinstance(outcome, ResponseError):
            self.gone = _is_gone(outcome)
            self._failed(text_of(outcome))
        try:
            raise outcome
        finally:
            del task, outcome  # an error and the frame it is raised in would hold each other

    def _failed(self, reason: str) -> None:
        self.failures += 1
        self._in_a_row += 1
        if self.up and self._in_a_row >= _FAILURES:
            self.up = False
            self.state = reason
            log.warning("%s: %s; %s until it works again", self._what, reason, self._meanwhile)
            self._probing = spawn(self._probe(None), "redis probe")

    async def _probe(self, first: asyncio.Future[None] | None) -> None:
        """Asks until Redis answers, in time, on a connection that is already there."""
        pause = _PROBE_FIRST
        while True:
            try:
                async with asyncio.timeout(DEADLINE_MAX):
                    await self._ping()
                async with asyncio.timeout(self._deadline):
                    await self._ping()
                break
            except Exception as error:
                if first is not None and not first.done():
                    log.warning("%s: %s; %s until it works", self._what, text_of(error), self._meanwhile)
                    first.set_result(None)
                self.state, self.gone = text_of(error), _is_gone(error)
                await self._pool.disconnect()  # let the name be looked up anew
            await asyncio.sleep(pause)
            pause = min(2 * pause, _PROBE_LAST)
        if first is None or first.done():
            log.warning("%s: works again", self._what)
        else:
            first.set_result(None)
        self.up, self._in_a_row, self.state = True, 0, "ok"

    async def _ping(self) -> None:
        async with self._slots:
            await cast("Awaitable[Any]", self.redis.ping())

    def complain(self, what: str) -> None:
        """Once a minute: it may be about every single key."""
        self.failures += 1
        now = time.monotonic()
        if now >= self._complain_at:
            self._complain_at = now + 60.0
            log.warning("%s: %s", self._what, what)


def _pool(url: str) -> BlockingConnectionPool:
    settings: dict[str, Any] = {
        "max_connections": _CONNECTIONS,
        "timeout": DEADLINE_MAX,
        "socket_timeout": DEADLINE_MAX,
        "socket_connect_timeout": DEADLINE_MAX,
        "retry": Retry(NoBackoff(), 0),
        "protocol": 2,  # understood by every server; version 3 gives a cache nothing
    }
    try:
        pool = BlockingConnectionPool.from_url(url, **settings)
    except (ValueError, TypeError):
        raise ValueError(
            "redis.url: expected redis://, rediss:// or unix:// with settings that redis-py knows"
        ) from None
    pool.connection_kwargs["decode_responses"] = False  # whatever the URL says: values are bytes
    return pool


def _is_gone(error: Exception) -> bool:
    """Whether an error says that nobody listens, or that the connection was closed; not that an answer is late."""
    return isinstance(error, ConnectionError | RedisConnectionError)


def text_of(error: Exception) -> str:
    return str(error) or ("no answer" if isinstance(error, TimeoutError) else type(error).__name__)
