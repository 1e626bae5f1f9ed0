"""What came of one attempt, sorted into the kinds that the retry policy and the key states know."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC
from email.utils import parsedate_to_datetime
from enum import Enum
from typing import Any, Final, Literal

import orjson

from ...protocol.durations import parse_composite
from ...protocol.errors import ProxyError

MAX_WAIT: Final = 3600.0
"""No upstream header makes a key or a request wait longer than this at once (seconds)."""


class OutcomeKind(Enum):
    """The kinds of outcomes, by what may follow."""

    OK = "ok"
    FINAL = "final"  # an answer for the client, whatever its status
    RETRY = "retry"  # 408, 409, 5xx, an error as first stream event: again, after a pause
    RATE_LIMITED = "rate_limited"  # this key cools; another key at once
    QUOTA = "quota"  # insufficient_quota: this key is exhausted
    UNAUTHORIZED = "unauthorized"  # 401
    FORBIDDEN = "forbidden"  # 403: (key, model)
    MODEL_MISSING = "model_missing"  # 404 model_not_found, DeploymentNotFound: (key, model)
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
        OutcomeKind.MODEL_MISSING,
        OutcomeKind.ORGANIZATION,
        OutcomeKind.TOO_LARGE,
    }
)
"""Outcomes that are the key's, not the request's: another key may do better, the same one will not."""

Dimension = Literal["requests", "tokens"]
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


@dataclass(frozen=True, slots=True)
class ErrorInfo:
    """The parts of an OpenAI-shaped error that decide: `code` and `type` as strings, "" if absent.

    limit: the dimension that a rate limit names. too_large: the request alone is more than that limit.
    """

    code: str = ""
    type: str = ""
    limit: Dimension | None = None
    too_large: bool = False


NO_ERROR_INFO: Final = ErrorInfo()

_DIMENSION: Final = re.compile(
    r"\b(?:requests|tokens) per (?:min|day)|\b(?:call|request|token) rate limit", re.IGNORECASE
)
"""OpenAI's words, and Azure's."""
_REQUESTED: Final = re.compile(r"\bLimit:? (\d{1,15}),.{0,64}?\bRequested:? (\d{1,15})\b", re.ASCII)


def error_info(body: bytes) -> ErrorInfo:
    """Return what a body says of its error; empty for anything that is not an error of OpenAI's shape."""
    try:
        document = orjson.loads(body)
    except orjson.JSONDecodeError:
        return ErrorInfo()
    return _info(document.get("error") if isinstance(document, dict) else None)


def _info(error: object) -> ErrorInfo:
    if not isinstance(error, dict):
        return ErrorInfo()
    code, type_ = _word(error.get("code")), _word(error.get("type"))
    message = error.get("message")
    said = message[:1024] if isinstance(message, str) else ""
    found = _DIMENSION.search(said)
    limit: Dimension | None = None
    if type_ in ("requests", "tokens"):
        limit = "requests" if type_ == "requests" else "tokens"
    elif found is not None:
        limit = "tokens" if found[0].lower().startswith("token") else "requests"
    return ErrorInfo(code, type_, limit, _beyond(said))


def _beyond(message: str) -> bool:
    """Whether a rate limit's message says that the request alone is more than the limit: `Request too large for …`,
    `Limit 30000, Requested 40000`.
    """
    numbers = _REQUESTED.search(message)
    if numbers is not None:
        return int(numbers[2]) > int(numbers[1])
    return message.startswith("Request too large for ")


def _word(value: object) -> str:
    return value[:128] if isinstance(value, str) else str(value) if isinstance(value, int) else ""


_ORGANIZATION: Final = frozenset({"mismatched_organization", "mismatched_project", "invalid_organization"})


def classify(status: int, error: ErrorInfo, should_retry: str | None) -> OutcomeKind:
    """Return the kind of a response.

    should_retry: the upstream's `x-should-retry`, obeyed if the key is not at fault.
    """
    if status < 400:
        return OutcomeKind.OK
    names = (error.code, error.type)
    if status == 429:
        if "insufficient_quota" in names or "billing_hard_limit_reached" in names:
            return OutcomeKind.QUOTA
        if error.too_large:
            return OutcomeKind.TOO_LARGE
        return OutcomeKind.FINAL if should_retry == "false" else OutcomeKind.RATE_LIMITED
    if status == 401:
        return OutcomeKind.ORGANIZATION if _ORGANIZATION & set(names) else OutcomeKind.UNAUTHORIZED
    if status == 403:
        return OutcomeKind.FORBIDDEN
    if status == 404 and ("model_not_found" in names or "DeploymentNotFound" in names):
        return OutcomeKind.MODEL_MISSING
    if should_retry == "true":
        return OutcomeKind.RETRY
    if should_retry != "false" and (status in (408, 409) or status >= 500):
        return OutcomeKind.RETRY
    return OutcomeKind.FINAL


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
    proxy's own limits refuse it. error: as in receipts: a code of the proxy's, or `upstream_STATUS`.
    """
    if error in ("keys_cooling", "no_usable_key", "circuit_open"):
        return True
    return error.startswith("upstream_") and (status >= 500 or status == 429)


def stream_error(data: bytes) -> tuple[int, ErrorInfo] | None:
    """Return the status to act on and the error, if the data of a stream's first event is one; else None."""
    if b'"error"' not in data:
        return None
    try:
        document = orjson.loads(data)
    except orjson.JSONDecodeError:
        return None
    if not isinstance(document, dict):
        return None
    error: Any = document.get("error")
    if document.get("type") == "error" and error is None:  # the Responses API's own error event
        error = document
    if not error:
        return None
    info = _info(error)
    status = 500
    if "insufficient_quota" in (info.code, info.type) or info.code in ("429", "rate_limit_exceeded"):
        status = 429
    elif info.code.isascii() and info.code.isdigit() and 400 <= int(info.code) < 600:
        status = int(info.code)
    elif info.type == "invalid_request_error":
        status = 400
    return status, info


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
    for dimension in ("requests", "tokens"):
        remaining = headers.get(f"x-ratelimit-remaining-{dimension}")
        if read_number(remaining) == 0 or (remaining is None and dimension == named):
            waits.append(read_reset(headers.get(f"x-ratelimit-reset-{dimension}")) or 0.0)
    return _clamp(max(waits)) if any(waits) else None


def dimension_of(headers: Mapping[str, str], error: ErrorInfo) -> Dimension | None:
    """Return the limit that a 429 is about: as the body says, else the dimension with nothing left; None: unknown."""
    if error.limit is not None:
        return error.limit
    requests, tokens = (read_number(headers.get(f"x-ratelimit-remaining-{of}")) for of in ("requests", "tokens"))
    if (requests == 0) == (tokens == 0):
        return None
    return "requests" if requests == 0 else "tokens"


def read_reset(text: str | None) -> float | None:
    """Return the seconds of an `x-ratelimit-reset-*` (`6m0s`, or Azure's number), at most `MAX_WAIT`.

    It is None for nonsense and for 0, which says nothing.
    """
    if text is None:
        return None
    seconds = parse_composite(text)
    if seconds is None:
        seconds = read_number(text)
    return _clamp(seconds) if seconds else None


def read_number(text: str | None) -> float | None:
    """Return a finite number of at least 0; None for anything else."""
    if text is None or len(text) > 32 or not text.isascii() or "_" in text:
        return None
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) and number >= 0 else None


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
