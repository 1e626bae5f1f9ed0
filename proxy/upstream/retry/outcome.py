"""What came of one attempt, sorted into the kinds that the retry policy and the key states know."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC
from email.utils import parsedate_to_datetime
from enum import Enum
from typing import Final, Literal

from ...protocol.durations import parse_composite
from ...protocol.errors import ProxyError
from .error_body import NO_ERROR_INFO, Dimension, ErrorInfo
from .limit_headers import DIMENSIONS, MAX_WAIT, limit_headers, read_number


class OutcomeKind(Enum):
    """The kinds of outcomes, by what may follow."""

    OK = "ok"
    FINAL = "final"  # an answer for the client, whatever its status
    RETRY = "retry"  # 408, 409, 5xx, an error as first stream event: again, after a pause
    RATE_LIMITED = "rate_limited"  # this key cools; another key at once
    QUOTA = "quota"  # no quota, no money, a closed account: this key is exhausted
    UNAUTHORIZED = "unauthorized"  # 401
    FORBIDDEN = "forbidden"  # 403 about the key: (key, model)
    DOUBTFUL = "doubtful"  # 403 that does not say whether it is about the key or the request
    REFUSED = "refused"  # 403 or 404 about this request: a flagged prompt, a firewall, an unknown path
    SCOPE = "scope"  # the key lacks a right that this route needs: (key, route)
    MODEL_MISSING = "model_missing"  # the model or deployment is not there: (key, model)
    ORGANIZATION = "organization"  # 401 for an organization or project that is not the key's: the key itself is good
    TOO_LARGE = "too_large"  # 429 for a request beyond a whole window of this key: no wait helps, another key may
    UNREACHED = "unreached"  # the request never went up
    STALE = "stale"  # a reused connection closed without an answer: once more, on a fresh one
    AMBIGUOUS = "ambiguous"  # sent, and the connection died without one byte of answer
    TIMEOUT = "timeout"
    INVALID = "invalid"  # cut or broken answer: never sent again


KEY_TROUBLE: Final = frozenset(
    {
        OutcomeKind.QUOTA,
        OutcomeKind.UNAUTHORIZED,
        OutcomeKind.FORBIDDEN,
        OutcomeKind.DOUBTFUL,
        OutcomeKind.REFUSED,
        OutcomeKind.SCOPE,
        OutcomeKind.MODEL_MISSING,
        OutcomeKind.ORGANIZATION,
        OutcomeKind.TOO_LARGE,
    }
)
"""Outcomes that are the key's, not the request's: another key may do better, the same one will not."""

FailureKind = Literal["unreached", "stale", "ambiguous", "timeout", "invalid"]

_CODES: Final[dict[FailureKind, str]] = {"timeout": "upstream_timeout", "invalid": "upstream_invalid_response"}


class TransportFailure(Exception):
    """No usable response came. kind: how far the request got. detail: for people; it names no secret."""

    def __init__(self, kind: FailureKind, detail: str) -> None:
        super().__init__(detail)
        self.kind: FailureKind = kind
        self.detail = detail

    @property
    def outcome(self) -> OutcomeKind:
        return OutcomeKind(self.kind)

    @property
    def code(self) -> str:
        """The code of the proxy's own error (`docs/routes-and-errors.md`)."""
        return _CODES.get(self.kind, "upstream_unreachable")

    def again(self) -> TransportFailure:
        """Return a copy to keep or raise, without the frames that this one holds."""
        return TransportFailure(self.kind, self.detail)

    def proxy_error(self, spent: bool = False) -> ProxyError:
        """Return the proxy's own error for it. spent: the retries are used up."""
        return ProxyError(self.code, self.detail, should_retry=False if spent else None)


_ORGANIZATION: Final = frozenset({"mismatched_organization", "mismatched_project", "invalid_organization"})


def classify(status: int, error: ErrorInfo, should_retry: str | None, *, endpoint: bool = True) -> OutcomeKind:
    """Return the kind of a response.

    should_retry: the upstream's `x-should-retry`, obeyed if the key is not at fault. endpoint: the request is one to
    the five endpoints, where a 404 is tried elsewhere unless it names a stored object.
    """
    if status < 400:
        return OutcomeKind.OK
    if status < 500:
        refusal = _refusal(status, error, endpoint and should_retry != "true")
        if refusal is not None:
            return refusal
    if status == 429 and error.code != "resource_unavailable":
        return OutcomeKind.FINAL if should_retry == "false" else OutcomeKind.RATE_LIMITED
    if should_retry == "true":
        return OutcomeKind.RETRY
    if should_retry != "false" and (status in (408, 409, 429) or status >= 500):
        return OutcomeKind.RETRY  # a 429 here is flex processing without room: it says nothing of other requests
    return OutcomeKind.FINAL


def _refusal(status: int, error: ErrorInfo, endpoint: bool) -> OutcomeKind | None:
    """Return the kind of a 4xx that another key may not meet; None: it is none."""
    subject = error.subject
    if status in (402, 429) and error.too_large:
        return OutcomeKind.TOO_LARGE
    if subject == "account":
        return OutcomeKind.QUOTA
    if status in (401, 403) and subject == "scope":
        return OutcomeKind.SCOPE
    if status == 401:
        return OutcomeKind.ORGANIZATION if not _ORGANIZATION.isdisjoint(error.names) else OutcomeKind.UNAUTHORIZED
    if subject == "model" and status in (400, 403, 404, 422):
        return OutcomeKind.MODEL_MISSING
    if status == 403:
        if error.html or subject == "content":
            return OutcomeKind.REFUSED
        return OutcomeKind.FORBIDDEN if subject == "key" else OutcomeKind.DOUBTFUL
    if status == 404 and endpoint and subject != "object":
        return OutcomeKind.REFUSED
    return None


NO_ANSWER: Final = 0


def breaker_failure(outcome: OutcomeKind, answer: tuple[int, Mapping[str, str]] | None) -> int | None:
    """Return what counts against the upstream's health: the status, or `NO_ANSWER`; None: nothing.

    answer: status and headers; None: there was no response. An upstream that says when to come back is only busy (RFC
    9110 section 15.6.4). A final 501 says what it cannot do (section 15.6.2), not that it is ill.
    """
    if answer is None:
        return None if outcome is OutcomeKind.STALE else NO_ANSWER
    status, headers = answer
    if status == 501 and outcome is OutcomeKind.FINAL:
        return None
    if status >= 500:
        return None if "retry-after" in headers or "retry-after-ms" in headers else status
    return status if status < 400 and outcome is OutcomeKind.RETRY else None


def allows_stale(status: int, error: str) -> bool:
    """Whether a stale response may take the place of a final failure (RFC 5861 section 4).

    It may if the upstreams failed or the keys cool or are refused. It may not if the request itself is at fault or the
    proxy's own limits refuse it; a 404 is the client's to see.

    error: as in receipts: a code of the proxy's, or `upstream_STATUS`.
    """
    if error in ("keys_cooling", "no_usable_key", "circuit_open"):
        return status != 404
    return error.startswith("upstream_") and (status >= 500 or status == 429)


def retry_after(headers: Mapping[str, str], wall: float, error: ErrorInfo = NO_ERROR_INFO) -> float | None:
    """Return the seconds that the upstream asks to wait, from 0 to `MAX_WAIT`; None if it asks for nothing readable.

    `retry-after-ms` comes first, then `Retry-After` as seconds, decimals, HTTP date (RFC 9110 section 10.2.3) or
    `6m0s`. Then comes `x-ratelimit-reset-*` of a dimension whose `remaining` is 0, or is not given while the error
    names the dimension. A reset of 0 or -1, which Azure sends, says nothing. wall: Unix time, for dates.
    """
    millis = read_number(headers.get("retry-after-ms"))
    if millis is not None:
        return _clamp(millis / 1000)
    value = headers.get("retry-after")
    if value is not None:
        seconds = read_number(value)
        if seconds is None:
            seconds = parse_composite(value)
        if seconds is None:
            seconds = _date(value, wall)
        if seconds is not None:
            return _clamp(seconds)
    named = dimension_of(headers, error)
    waits = []
    for dimension in DIMENSIONS:
        told = limit_headers(headers, dimension)
        if told.remaining == 0 or (told.remaining is None and dimension == named):
            waits.append(told.reset or 0.0)
    return _clamp(max(waits)) if any(waits) else None


def dimension_of(headers: Mapping[str, str], error: ErrorInfo) -> Dimension | None:
    """Return the limit that a 429 is about: as the body says, else the dimension with nothing left; None: unknown."""
    if error.limit is not None:
        return error.limit
    requests, tokens = (limit_headers(headers, dimension).remaining for dimension in DIMENSIONS)
    if (requests == 0) == (tokens == 0):
        return None
    return "requests" if requests == 0 else "tokens"


def _date(text: str, wall: float) -> float | None:
    try:
        moment = parsedate_to_datetime(text)
    except (TypeError, ValueError, IndexError, OverflowError):
        return None
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    return max(0.0, moment.timestamp() - wall)


def _clamp(seconds: float) -> float:
    return min(max(seconds, 0.0), MAX_WAIT)
