"""What the journey needs of the world outside: the way up, as Protocols. The edges implement them; tests script
them.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from ..protocol.headers import Raw

Write = Callable[[bytes], Awaitable[None]]


@dataclass(slots=True)
class ConnectionInfo:
    """What one call learns of its connection. fresh: it must be a new one; reused, connected: what it got;
    answered: at least one byte of an answer came.

    until: where it is later than the caller first said, the loop's time by which the answer's head must come; extend:
    while that is waited for, moves it on."""

    fresh: bool = False
    reused: bool = False
    connected: bool = False
    answered: bool = False
    until: float = 0.0
    extend: Callable[[float], None] | None = None


class UpstreamResponse(Protocol):
    """Status and headers of an answer are in hand; its body is still to be read."""

    status: int
    reason: str
    raw_headers: Sequence[Raw]

    @property
    def headers(self) -> Mapping[str, str]: ...

    def ready(self) -> bytes | None:
        """The whole body as it came, where all of it is here already: then nobody need wait for it."""

    def chunks(self) -> AsyncIterator[bytes]:
        """The body as it comes off the socket. Raises TransportFailure (`invalid`: cut short; `timeout`: silent)."""

    def close(self) -> None:
        """Ends it: the connection is kept only where the body was read to its end."""


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
        """The answer's head, within `first_byte` seconds. Raises TransportFailure."""


class LockStore(Protocol):
    """Who among several processes does what only one need do. Never raises: where it cannot tell, all are free."""

    async def acquire(self, name: str, token: str, seconds: float) -> Literal["mine", "theirs", "open"]:
        """Whose it is now, ours for `seconds` if nobody's; open: everybody may go on without it."""

    async def renew(self, name: str, token: str, seconds: float) -> bool:
        """Whether it was still ours, and is for `seconds` more."""

    async def release(self, name: str, token: str, open_for: float) -> None:
        """Gives it back if it is ours; where `open_for` is more than 0, nobody need ask for so many seconds."""
