"""Protocols of what sends requests upstream. `client` implements them; tests script them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

from ..protocol.headers import Raw

if TYPE_CHECKING:
    import asyncio

Write = Callable[[bytes], Awaitable[None]]


@dataclass(slots=True)
class ConnectionInfo:
    """What one attempt asks of its connection, and learns of it.

    fresh: it must be a new one. reused: it was used before. connected: there was one.
    answered: at least one byte of a response came.
    until: the loop's time by which the head of the response must come, if that is later than what the caller said.
    extend: moves that time while the head is waited for.
    """

    fresh: bool = False
    reused: bool = False
    connected: bool = False
    answered: bool = False
    until: float = 0.0
    extend: Callable[[float], None] | None = None


class SwitchedConnection(Protocol):
    """A connection that no longer speaks HTTP, as aiohttp's protocols are on both sides."""

    transport: asyncio.Transport | None

    @property
    def writing_paused(self) -> bool:
        """Whether the peer takes less than is written."""

    def set_parser(self, parser: Any, _: None, /) -> None:
        """Hand to `parser` what comes from now on, and before it what has come since the handshake."""

    def pause_reading(self) -> None: ...

    def resume_reading(self) -> None: ...

    async def _drain_helper(self) -> None: ...


class UpstreamResponse(Protocol):
    """A response whose status and headers are here; its body is still to be read."""

    status: int
    reason: str
    raw_headers: Sequence[Raw]

    @property
    def headers(self) -> Mapping[str, str]: ...

    def ready(self) -> bytes | None:
        """Return the whole body as it came, if all of it is here already."""

    def chunks(self) -> AsyncIterator[bytes]:
        """Yield the body as it comes. Raises TransportFailure (`invalid`: cut short; `timeout`: silent)."""

    def switched(self) -> SwitchedConnection:
        """Return the connection after a 101."""

    def close(self) -> None:
        """End the response: the connection is kept only if the body was read to its end."""


class UpstreamTransport(Protocol):
    """Sends requests to upstreams."""

    async def send(
        self,
        method: str,
        url: str,
        headers: Sequence[tuple[str, str]],
        body: bytes | AsyncIterator[bytes] | None,
        *,
        first_byte: float,
        connection: ConnectionInfo,
    ) -> UpstreamResponse:
        """Send, and return the head of the response, within `first_byte` seconds. Raises TransportFailure."""


class LockStore(Protocol):
    """Locks for work that only one of several processes need do. No method raises."""

    async def acquire(self, name: str, token: str, seconds: float) -> Literal["acquired", "held", "unavailable"]:
        """Acquire a lock for `seconds`. held: by another process; unavailable: go on without the lock."""

    async def renew(self, name: str, token: str, seconds: float) -> bool:
        """Hold a lock for `seconds` more. Returns False if it is no longer held by this token."""

    async def release(self, name: str, token: str, open_for: float) -> None:
        """Release a lock. open_for: seconds for which nobody needs the lock; `acquire` says unavailable."""
