"""What has happened to one request on its way: attempts, waits, key, upstream."""

from __future__ import annotations

from dataclasses import dataclass

from ..accounting.budgets.account import BudgetReservation
from ..cost.pricing import Cost
from ..cost.usage import Usage
from ..protocol.routes import printable
from .deadline import SharedDeadline
from .limits.estimate import RequestSize


@dataclass(slots=True)
class AttemptLog:
    """What the exchange has cost so far: calls made, milliseconds waited and spent upstream, where it went last.

    spent: our retries are used up; exhausted: every key and upstream failed; model: the fallback that answered;
    usage, cost: of the calls that ended well, where several are needed for one answer; horizon: until when it may take;
    gone: (status, error) of a client who left while the answer is still read, for others or for the cache; unread: for
    the cache alone; elsewhere: it waits for what another process is buying; measure: what the estimate was made of;
    first_byte_ms: until a stream could begin; stake: what is held of the budgets.
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
    usage: Usage | None = None
    cost: Cost | None = None

    def upstream_headers(self) -> str:
        """Header lines that tell where it went."""
        if not self.upstream:
            return ""
        other = f"X-Proxy-Model: {printable(self.model)}\r\n" if self.model else ""
        return f"X-Proxy-Upstream: {self.upstream}\r\nX-Proxy-Key: {self.key}\r\n{other}"

    def retry_headers(self) -> str:
        """Header lines that tell how a failure came about."""
        lines = "X-Proxy-Error: no_usable_key\r\n" if self.no_usable_key else ""
        return lines + ("X-Should-Retry: false\r\n" if self.spent or self.no_usable_key else "")
