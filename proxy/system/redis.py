"""Redis: connections, a deadline for each command, and a circuit breaker."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any, Final, TypeVar, cast
from urllib.parse import urlsplit

from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError, ResponseError

from .clock import spawn
from .state_changes import Change, state_changed

log = logging.getLogger("proxy.cache")
T = TypeVar("T")

DEADLINE_MAX: Final = 2.0
"""Seconds after which a command is ended although its caller no longer waits: connecting, or a long write."""

EXPECTED_URL: Final = "redis://[user:password@]host[:port][/number], rediss://… or unix://path"

_CONNECTIONS: Final = 32
_FAILURES: Final = 3
_PROBE_FIRST, _PROBE_LAST = 0.5, 2.5  # and at most DEADLINE_MAX for the reply: a probe at least every 5 s


class UnexpectedReply(RedisError):
    """The driver raised what it does not document, or a reply has another shape than the command's."""


class RedisConnection:
    """A connection to Redis, used as long as Redis replies.

    url: a secret.
    deadline: seconds within which Redis must reply to a probe.
    what, meanwhile: for log messages: the user of Redis, and what happens without it.
    up: whether Redis may be asked.
    state: "ok", or what is wrong.
    gone: the last failure was a refused or closed connection, not a late reply.
    failures: how many there were so far.
    Raises ValueError, without the URL's text.
    """

    def __init__(
        self, url: str, deadline: float, what: str = "redis cache", meanwhile: str = "answers are served without it"
    ) -> None:
        self._what, self._meanwhile = what, meanwhile
        self._pool = _pool(url)
        self.redis = Redis.from_pool(self._pool)
        self._slots = asyncio.Semaphore(self._pool.max_connections)  # so that no command queues in the pool itself
        self._deadline = deadline
        self.up = False
        self.state = "not open"
        self.gone = False
        self.failures = 0
        self._failures_in_a_row = 0
        self._probing: asyncio.Task[None] | None = None
        self._complain_at = 0.0

    @property
    def in_doubt(self) -> bool:
        """Return whether the last command failed or Redis is not asked: avoid commands that are not needed."""
        return not self.up or self._failures_in_a_row > 0

    async def open(self) -> None:
        """Connect. Returns after the first attempt, or after a second."""
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
        """Close unused connections, so that the name is looked up again. busy: close those in use, too."""
        await self._pool.disconnect(inuse_connections=busy)

    async def run(self, command: Callable[[], Awaitable[T]], timeout: float) -> T:
        """Run a command in a task of its own, and whatever it does with the reply.

        Raises RedisError, OSError, TimeoutError, and nothing else: every other exception of the command becomes
        UnexpectedReply. Failures of the connection count towards the circuit breaker.

        timeout: seconds after which TimeoutError is raised and the command is left to itself.
        """
        began, late = False, False

        async def alone() -> T | Exception:
            nonlocal began
            try:
                async with asyncio.timeout(max(DEADLINE_MAX, timeout)), self._slots:
                    if late:
                        return TimeoutError()
                    began = True
                    return await command()
            except (RedisError, OSError, TimeoutError) as error:
                return error
            except Exception as error:
                self.complain(f"an unexpected reply or fault of the driver ({type(error).__name__}: {error})")
                return UnexpectedReply(type(error).__name__)

        task = spawn(alone(), "redis command")
        await asyncio.wait({task}, timeout=timeout)
        if not task.done():
            late = True
            if began:  # otherwise it only waited for a connection
                self.gone = False
                self._failed(f"no reply within {timeout * 1000:.0f} ms")
            raise TimeoutError
        outcome: T | Exception = task.result()
        if not isinstance(outcome, Exception):
            self._failures_in_a_row, self.gone = 0, False
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
        self._failures_in_a_row += 1
        if self.up and self._failures_in_a_row >= _FAILURES:
            self.up = False
            self.state = reason
            self._log_state("down", f"{reason}; {self._meanwhile} until it works again")
            self._probing = spawn(self._probe(None), "redis probe")

    async def _probe(self, first: asyncio.Future[None] | None) -> None:
        """Ping until Redis replies in time on an open connection. first: set after the first attempt."""
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
                    self._log_state("down", f"{text_of(error)}; {self._meanwhile} until it works")
                    first.set_result(None)
                self.state, self.gone = text_of(error), _is_gone(error)
                with contextlib.suppress(Exception):
                    await self._pool.disconnect()  # so that the name is looked up again
            await asyncio.sleep(pause)
            pause = min(2 * pause, _PROBE_LAST)
        if first is None or first.done():
            self._log_state("up", "works again")
        else:
            first.set_result(None)
        self.up, self._failures_in_a_row, self.state = True, 0, "ok"

    def _log_state(self, state: str, text: str) -> None:
        state_changed(Change("store", self._what, state, f"{self._what}: {text}", logger=log.name))

    async def _ping(self) -> None:
        async with self._slots:
            await cast("Awaitable[Any]", self.redis.ping())

    def complain(self, what: str) -> None:
        """Log an error reply and count it as a failure; at most once a minute, since every key may have one."""
        self.failures += 1
        now = time.monotonic()
        if now >= self._complain_at:
            self._complain_at = now + 60.0
            log.warning("%s: %s", self._what, what)


def check_url(url: str) -> None:
    """Check the address of a Redis without connecting. Raises ValueError, without the URL's text."""
    _pool(url)
    database = urlsplit(url).path.strip("/")
    if not url.startswith("unix://") and database and not database.isdigit():
        raise ValueError(f"expected {EXPECTED_URL}, found a database that is not a number")


def _pool(url: str) -> BlockingConnectionPool:
    settings: dict[str, Any] = {
        "max_connections": _CONNECTIONS,
        "timeout": DEADLINE_MAX,
        "socket_timeout": DEADLINE_MAX,
        "socket_connect_timeout": DEADLINE_MAX,
        "retry": Retry(NoBackoff(), 0),
        "protocol": 2,  # every server knows it, and version 3 has no advantage for a cache
    }
    try:
        pool = BlockingConnectionPool.from_url(url, **settings)
        cast(Any, pool).make_connection()  # opens nothing, but refuses a query parameter that redis-py does not know
    except (ValueError, TypeError, AttributeError):
        raise ValueError(f"expected {EXPECTED_URL}, found something else") from None
    pool.connection_kwargs["decode_responses"] = False  # values are bytes, whatever the URL says
    return pool


def _is_gone(error: Exception) -> bool:
    """Return whether an error says that a connection was refused or closed, not that a reply is late."""
    return isinstance(error, ConnectionError | RedisConnectionError)


def text_of(error: Exception) -> str:
    return str(error) or ("no reply" if isinstance(error, TimeoutError) else type(error).__name__)
