"""What one attempt came to: what it says to the client, to the key ring and to the upstream's breaker."""

from __future__ import annotations

from dataclasses import dataclass

from ..protocol.errors import ProxyError
from ..protocol.routes import printable
from .progress import AttemptLog
from .response import ResponseInHand
from .retry.outcome import (
    KEY_TROUBLE,
    ErrorInfo,
    OutcomeKind,
    TransportFailure,
    dimension_of,
    error_info,
    read_number,
    retry_after,
)


def rate_limit_info(
    answered: ResponseInHand | None, failure: TransportFailure | None, tokens: int, wall: float
) -> tuple[float | None, str, int]:
    """(seconds the upstream asks to wait, the reason in a few words, the least tokens that a limit holds back)."""
    if answered is None:
        return None, failure.detail if failure else "", 0
    info = error_info(answered.body) if answered.body is not None else ErrorInfo()
    headers = answered.response.headers
    limit = dimension_of(headers, info) if answered.status == 429 else None
    reason = f"{answered.status} {info.code or info.type}".strip() + (f" ({limit})" if limit else "")
    left = read_number(headers.get("x-ratelimit-remaining-tokens")) if limit == "tokens" else None
    floor = int(left) + 1 if left and left < tokens else 0
    return retry_after(headers, wall, info), reason, floor


@dataclass(frozen=True, slots=True)
class LastOutcome:
    """What came of the last attempt, held while another key or upstream is tried, or the same again.

    waits: a key may still be waited for, so that being told to wait longer is the better answer.
    """

    response: ResponseInHand | None
    failure: TransportFailure | None
    outcome: OutcomeKind
    spent: bool
    waits: bool

    def unwrap(self, attempt_log: AttemptLog, passthrough: bool) -> ResponseInHand:
        """It is the client's. Raises ProxyError where there was no answer."""
        attempt_log.no_usable_key = (
            self.outcome in KEY_TROUBLE and self.outcome is not OutcomeKind.TOO_LARGE and not passthrough
        )
        attempt_log.spent = self.spent or self.outcome is OutcomeKind.TOO_LARGE
        if self.response is None:
            assert self.failure is not None
            raise self.failure.proxy_error(self.spent)
        return self.response

    def is_less_specific_than(self, code: str) -> bool:
        """Whether a refusal of the pool is the better answer: one that tells when another try can succeed."""
        if code == "circuit_open":
            return self.outcome in KEY_TROUBLE
        return self.waits and code not in ("no_usable_key", "request_exceeds_limit")

    def close(self) -> None:
        if self.response is not None:
            self.response.response.close()


def unwrap(result: ResponseInHand | ProxyError) -> ResponseInHand:
    if isinstance(result, ProxyError):
        raise result.copy(result.lines)
    return result


def waited_too_long(why: str, model: str, seconds: float) -> ProxyError:
    """The refusal of a request whose patience is over; `seconds`: to go until it may be served."""
    shown = f"{printable(model, 60)!r}, {seconds:.1f} s to go"
    if why == "keys_cooling":
        message = f"all keys that could serve this are cooling down ({shown})"
        return ProxyError("keys_cooling", message, retry_after=seconds)
    message = (
        f"throttle.limits leave no room within the time this request may wait ({shown}); "
        "throttle.max_wait or X-Proxy-Max-Wait let it wait longer"
    )
    return ProxyError("throttled", message, retry_after=seconds)
