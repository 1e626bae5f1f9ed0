"""`AttemptLog`: what has happened to one request on its way upstream."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from ..accounting.budgets.account import BudgetReservation
from ..protocol.routes import printable
from .deadline import SharedDeadline
from .limits.estimate import RequestSize

MAX_CAUSES: Final = 16


@dataclass(slots=True)
class AttemptLog:
    """What a request has taken so far: attempts, milliseconds of waiting and upstream, where it was sent last.

    client_left: status and error of a client that left while the response is still read, for others or for the cache.
    for_cache_only: no client waits any more. waiting_for_peer: another process fetches the same.
    sent: a connection was made for it. size: what its estimates are made of.
    queue_ms: waiting for a key. paused_ms: pauses between attempts. first_byte_ms: until a stream could begin.
    causes: of retries: key, status and the upstream's code. upstream_code: of the last error response, without secrets.
    upstream, key: of the last attempt. model: the fallback that answered; "": the request's own.
    spent: the retries are used up. no_usable_key: every key was refused. exhausted: every key and upstream failed.
    """

    deadline: SharedDeadline
    client_left: tuple[int, str] | None = None
    for_cache_only: bool = False
    waiting_for_peer: bool = False
    sent: bool = False
    size: RequestSize | None = None
    budget_reservation: BudgetReservation | None = None
    attempts: int = 0
    queue_ms: float = 0.0
    paused_ms: float = 0.0
    upstream_ms: float = 0.0
    first_byte_ms: float | None = None
    upstream: str = ""
    key: str = ""
    spent: bool = False
    no_usable_key: bool = False
    exhausted: bool = False
    model: str = ""
    causes: list[str] = field(default_factory=list)
    upstream_code: str = ""

    def note_cause(self, cause: str) -> None:
        """Note why another attempt follows: of a request with very many, the first ones."""
        if len(self.causes) < MAX_CAUSES:
            self.causes.append(cause)

    def upstream_headers(self) -> tuple[tuple[str, str], ...]:
        """Return the headers that say where the request went."""
        if not self.upstream:
            return ()
        headers = ("X-Proxy-Upstream", self.upstream), ("X-Proxy-Key", self.key)
        return (*headers, ("X-Proxy-Model", printable(self.model))) if self.model else headers

    def retry_headers(self) -> tuple[tuple[str, str], ...]:
        """Return the headers that say what a client should make of a failure."""
        if self.no_usable_key:
            return ("X-Proxy-Error", "no_usable_key"), ("X-Should-Retry", "false")
        return (("X-Should-Retry", "false"),) if self.spent else ()
