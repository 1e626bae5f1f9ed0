"""One request as it is sent to the upstreams: what every attempt of it needs."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Final, Protocol

import msgspec

from ..protocol.errors import ProxyError
from ..protocol.headers import Raw
from ..protocol.request import Client
from ..protocol.routes import Route
from .keys.lease import ANY_KEY, KeyRequest
from .progress import AttemptLog
from .target import Upstream

Body = bytes | AsyncIterator[bytes] | None


class RequestBody(Protocol):
    """The body of a request, which may differ between upstreams."""

    @property
    def length(self) -> int | None:
        """Bytes, if the client announced them and the body is streamed."""

    @property
    def error(self) -> ProxyError | None:
        """Why the client's body could not be sent, if that is the client's fault."""

    def for_upstream(self, upstream: Upstream) -> tuple[Body, bool]:
        """Return the body to send there, and whether the proxy asks in it for the usage of a stream."""

    def without_usage(self, upstream: Upstream) -> None:
        """The upstream refuses `stream_options`: from now on the proxy does not add the field there."""


class _NoBody:
    length = None
    error = None

    def for_upstream(self, upstream: Upstream) -> tuple[Body, bool]:
        return None, False

    def without_usage(self, upstream: Upstream) -> None:
        raise AssertionError("nothing is added to no body")


NO_BODY: Final[RequestBody] = _NoBody()


class UpstreamRequest(msgspec.Struct, frozen=True):
    """A request to be sent, with a key of the pool and as often as the retry policy allows.

    headers: the client's, as received.
    model: its limits and key states count, and it decides which keys may serve unless `key_request` names them.
    key_request: what else decides the key.
    tokens: estimate to reserve of the key's limits.
    max_wait: seconds it may wait for a key; the deadline in `attempt_log` bounds the wait too.
    max_retries: in place of the setting's; None: the setting counts.
    quota: under which name its limits count; None: the key's own.
    repeatable: it may be sent again after bytes of it have gone up.
    verbatim: the response is handed on as it comes; only errors are read.
    uncompressed: the response should come without compression, since more of it is read.
    upgrade: it is a WebSocket handshake. stream: it asks for a stream of events.
    """

    method: str
    route: Route
    headers: Sequence[Raw]
    body: RequestBody
    model: str
    client: Client
    attempt_log: AttemptLog
    max_wait: float
    key_request: KeyRequest = ANY_KEY
    tokens: int = 0
    max_retries: int | None = None
    quota: str | None = None
    repeatable: bool = True
    verbatim: bool = False
    uncompressed: bool = False
    upgrade: bool = False
    stream: bool = False

    @property
    def model_known(self) -> bool:
        """Whether the model decides the key."""
        return self.key_request.groups is None

    @property
    def key_route(self) -> str:
        """The part of the API that a restricted key may lack the right for: read or write, and the first segment."""
        return f"{'GET' if self.method in ('GET', 'HEAD') else 'POST'} {self.route.segment}"

    def digest(self, upstream: Upstream) -> int:
        """Return a number that tells this request from others; an upload is like no other."""
        body, _ = self.body.for_upstream(upstream)
        return hash((self.route.path, self.route.query, body))

    @property
    def queue(self) -> str:
        """The name of the queue that it waits in."""
        name = self.route.deployment or self.model
        return f"{name} {self.quota}" if self.quota else name
