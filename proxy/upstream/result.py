"""What came of an attempt: for the client, for the pool of keys and for the upstream's circuit breaker."""

from __future__ import annotations

from dataclasses import dataclass

from ..protocol.errors import ProxyError
from .progress import AttemptLog
from .response import ResponseInHand, refuses_stream_options
from .retry.limit_headers import limit_headers
from .retry.outcome import (
    KEY_TROUBLE,
    OutcomeKind,
    TransportFailure,
    breaker_failure,
    dimension_of,
    retry_after,
)


@dataclass(frozen=True, slots=True)
class AttemptResult:
    """What came of one attempt: a response, or a failure if there was none."""

    response: ResponseInHand | None
    failure: TransportFailure | None
    outcome: OutcomeKind

    @property
    def refuses_usage(self) -> bool:
        """Whether the upstream refuses the `stream_options` that the proxy has added."""
        response = self.response
        return response is not None and response.injected and refuses_stream_options(response)

    @property
    def breaker_failure(self) -> int | None:
        """What counts against the upstream's health, by kind; None: nothing."""
        response = self.response
        answer = (response.status, response.response.headers) if response is not None else None
        return breaker_failure(self.outcome, answer)

    @property
    def cause(self) -> str:
        """Why another attempt follows: the status and the upstream's code, or the kind of the failure."""
        if self.response is None:
            return self.outcome.value
        return f"{self.response.status} {self.response.error.name}".strip()

    def rate_limit_info(self, tokens: int, wall: float) -> tuple[float | None, str, int]:
        """Return what a failed attempt says of the key's limits.

        That is the seconds that the upstream asks to wait (None: it does not), the reason in a few words, and the
        number of tokens from which on a request is held back (0: every request).

        tokens: estimate of this request. wall: Unix time.
        """
        if self.response is None:
            return None, self.failure.detail if self.failure else "", 0
        headers, info = self.response.response.headers, self.response.error
        limit = dimension_of(headers, info) if self.response.status == 429 else None
        reason = f"{self.response.status} {info.name}".strip() + (f" ({limit})" if limit else "")
        left = limit_headers(headers, "tokens").remaining if limit == "tokens" else None
        floor = int(left) + 1 if left and left < tokens else 0
        return retry_after(headers, wall, info), reason, floor


@dataclass(frozen=True, slots=True)
class LastOutcome:
    """The result of the last attempt, kept while another is made: it is the client's if none is possible.

    spent: the retries are used up. waits: a key may still be waited for, so that the pool's error, which says how
    long, is the better answer.
    """

    result: AttemptResult
    spent: bool
    waits: bool

    def unwrap(self, attempt_log: AttemptLog, pooled: bool) -> ResponseInHand:
        """Return the response for the client. Raises ProxyError if there was none.

        pooled: the key was the proxy's, so that the client can do nothing about it.
        """
        result = self.result
        too_large = result.outcome is OutcomeKind.TOO_LARGE
        attempt_log.no_usable_key = result.outcome in KEY_TROUBLE and not too_large and pooled
        attempt_log.spent = self.spent or too_large
        if result.response is None:
            assert result.failure is not None
            raise result.failure.proxy_error(self.spent)
        return result.response

    def is_less_specific_than(self, code: str) -> bool:
        """Whether the pool's own error is more useful to the client: it says when another try can succeed."""
        if code == "circuit_open":
            return self.result.outcome in KEY_TROUBLE
        return self.waits and code not in ("no_usable_key", "request_exceeds_limit")

    def close(self) -> None:
        """Close the response that is not going to the client."""
        if self.result.response is not None:
            self.result.response.response.close()


def unwrap(result: ResponseInHand | ProxyError) -> ResponseInHand:
    """Return the response, or raise the error."""
    if isinstance(result, ProxyError):
        raise result.copy(result.proxy_headers)
    return result
