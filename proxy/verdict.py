"""What one attempt came to: what it says to the client, to the key ring and to the upstream's breaker."""

from __future__ import annotations

from dataclasses import dataclass

from .answered import Answered
from .core.budgets import Stake
from .core.errors import Refusal
from .core.estimate import Measure
from .core.outcome import (
    KEY_TROUBLE,
    Class,
    ErrorInfo,
    TransportFailure,
    dimension_of,
    error_info,
    read_number,
    retry_after,
)
from .core.pricing import Cost
from .core.routes import printable
from .core.usage import Usage
from .horizon import Horizon


@dataclass(slots=True)
class Progress:
    """What the exchange has cost so far: calls made, milliseconds waited and spent upstream, where it went last.

    spent: our retries are used up; exhausted: every key and upstream failed; model: the fallback that answered;
    usage, cost: of the calls that ended well, where several are needed for one answer; horizon: until when it may take;
    gone: (status, error) of a client who left while the answer is still read, for others or for the cache; unread: for
    the cache alone; elsewhere: it waits for what another process is buying; measure: what the estimate was made of;
    first_byte_ms: until a stream could begin; stake: what is held of the budgets.
    """

    horizon: Horizon
    gone: tuple[int, str] | None = None
    unread: bool = False
    elsewhere: bool = False
    went_up: bool = False
    measure: Measure | None = None
    stake: Stake | None = None
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

    def went(self) -> str:
        """Header lines that tell where it went."""
        if not self.upstream:
            return ""
        other = f"X-Proxy-Model: {printable(self.model)}\r\n" if self.model else ""
        return f"X-Proxy-Upstream: {self.upstream}\r\nX-Proxy-Key: {self.key}\r\n{other}"

    def verdict(self) -> str:
        """Header lines that tell how a failure came about."""
        lines = "X-Proxy-Error: no_usable_key\r\n" if self.no_usable_key else ""
        return lines + ("X-Should-Retry: false\r\n" if self.spent or self.no_usable_key else "")


def reading(
    answered: Answered | None, failure: TransportFailure | None, tokens: int, wall: float
) -> tuple[float | None, str, int]:
    """(seconds the upstream asks to wait, the reason in a few words, the least tokens that a limit holds back)."""
    if answered is None:
        return None, failure.detail if failure else "", 0
    info = error_info(answered.body) if answered.body is not None else ErrorInfo()
    headers = answered.reply.headers
    limit = dimension_of(headers, info) if answered.status == 429 else None
    reason = f"{answered.status} {info.code or info.type}".strip() + (f" ({limit})" if limit else "")
    left = read_number(headers.get("x-ratelimit-remaining-tokens")) if limit == "tokens" else None
    floor = int(left) + 1 if left and left < tokens else 0
    return retry_after(headers, wall, info), reason, floor


@dataclass(frozen=True, slots=True)
class Last:
    """What came of the last attempt, held while another key or upstream is tried, or the same again.

    waits: a key may still be waited for, so that being told to wait longer is the better answer.
    """

    answered: Answered | None
    failure: TransportFailure | None
    outcome: Class
    spent: bool
    waits: bool

    def given(self, progress: Progress, passthrough: bool) -> Answered:
        """It is the client's. Raises Refusal where there was no answer."""
        progress.no_usable_key = self.outcome in KEY_TROUBLE and self.outcome is not Class.TOO_LARGE and not passthrough
        progress.spent = self.spent or self.outcome is Class.TOO_LARGE
        if self.answered is None:
            assert self.failure is not None
            raise self.failure.refusal(self.spent)
        return self.answered

    def says_less_than(self, code: str) -> bool:
        """Whether a refusal of the pool is the better answer: one that tells when another try can succeed."""
        if code == "circuit_open":
            return self.outcome in KEY_TROUBLE
        return self.waits and code not in ("no_usable_key", "request_exceeds_limit")

    def close(self) -> None:
        if self.answered is not None:
            self.answered.reply.close()


def given(result: Answered | Refusal) -> Answered:
    if isinstance(result, Refusal):
        raise result.again(result.lines)
    return result


def waited_too_long(why: str, model: str, seconds: float) -> Refusal:
    """The refusal of a request whose patience is over; `seconds`: to go until it may be served."""
    shown = f"{printable(model, 60)!r}, {seconds:.1f} s to go"
    if why == "keys_cooling":
        message = f"all keys that could serve this are cooling down ({shown})"
        return Refusal("keys_cooling", message, retry_after=seconds)
    message = (
        f"throttle.limits leave no room within the time this request may wait ({shown}); "
        "throttle.max_wait or X-Proxy-Max-Wait let it wait longer"
    )
    return Refusal("throttled", message, retry_after=seconds)
