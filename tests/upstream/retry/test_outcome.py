"""Every status, code and hint is classified; every form of `Retry-After` is understood (docs/keys-and-limits.md)."""

from __future__ import annotations

import json
from email.utils import formatdate
from itertools import product
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.upstream.retry.error_body import ErrorInfo, error_info, stream_error
from proxy.upstream.retry.limit_headers import MAX_WAIT
from proxy.upstream.retry.outcome import (
    KEY_TROUBLE,
    NO_ANSWER,
    OutcomeKind,
    TransportFailure,
    breaker_failure,
    classify,
    dimension_of,
    retry_after,
)

NOTHING = ErrorInfo()
QUOTA = ErrorInfo("insufficient_quota", "insufficient_quota")
OTHERS = [
    NOTHING,
    ErrorInfo("rate_limit_exceeded", "requests"),
    ErrorInfo("context_length_exceeded", "invalid_request_error"),
    ErrorInfo("invalid_api_key", "invalid_request_error"),
    ErrorInfo("", "server_error"),
    ErrorInfo("429", ""),
    ErrorInfo("content_filter", ""),
]
MISSING = [
    ErrorInfo("model_not_found", "invalid_request_error"),
    ErrorInfo("DeploymentNotFound", ""),
    ErrorInfo("", "model_not_found"),
]
HINTS = [None, "", "true", "false", "maybe"]


# --- answers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [200, 201, 204, 206, 301, 302, 307, 399])
def test_statuses_below_400_are_ok(status: int) -> None:
    for error, hint in product([NOTHING, QUOTA, *MISSING], HINTS):
        assert classify(status, error, hint) is OutcomeKind.OK


RETRIED = {408, 409, *range(500, 600)}
NAMED_IN_403 = {
    ErrorInfo("invalid_api_key", "invalid_request_error"): OutcomeKind.FORBIDDEN,
    ErrorInfo("content_filter", ""): OutcomeKind.REFUSED,
}


@pytest.mark.parametrize("status", range(400, 600))
def test_every_error_status(status: int) -> None:
    """Retried: 408, 409, 429, 5xx. Once only: other 4xx, but for what is the key's fault. The hint is obeyed."""
    for error, hint in product([*OTHERS, *MISSING, QUOTA], HINTS):
        got = classify(status, error, hint)
        if status < 500 and error is QUOTA:
            assert got is OutcomeKind.QUOTA
        elif status == 401:
            assert got is OutcomeKind.UNAUTHORIZED
        elif status in (400, 403, 404, 422) and error in MISSING:
            assert got is OutcomeKind.MODEL_MISSING
        elif status == 403:
            assert got is NAMED_IN_403.get(error, OutcomeKind.DOUBTFUL)
        elif status == 404 and hint != "true":
            assert got is OutcomeKind.REFUSED
        elif hint == "false":
            assert got is OutcomeKind.FINAL
        elif status == 429:
            assert got is OutcomeKind.RATE_LIMITED
        elif hint == "true" or status in RETRIED:
            assert got is OutcomeKind.RETRY
        else:
            assert got is OutcomeKind.FINAL


@pytest.mark.parametrize(
    "error",
    [
        ErrorInfo("insufficient_quota", ""),
        ErrorInfo("", "insufficient_quota"),
        ErrorInfo("billing_hard_limit_reached", "insufficient_quota"),
        ErrorInfo("billing_hard_limit_reached", "invalid_request_error"),
    ],
)
def test_insufficient_quota_is_not_a_rate_limit(error: ErrorInfo) -> None:
    assert classify(429, error, None) is OutcomeKind.QUOTA
    assert classify(429, error, "true") is OutcomeKind.QUOTA
    assert OutcomeKind.QUOTA in KEY_TROUBLE


@pytest.mark.parametrize("kind", ["unreached", "stale", "ambiguous", "timeout", "invalid"])
def test_a_transport_failure_is_an_outcome(kind: Any) -> None:
    failure = TransportFailure(kind, "what happened")
    assert failure.outcome is OutcomeKind(kind)
    assert failure.outcome not in KEY_TROUBLE
    assert str(failure) == failure.detail == "what happened"


# --- error bodies -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("document", "info"),
    [
        ({"error": {"code": "a", "type": "b"}}, ErrorInfo("a", "b")),
        ({"error": {"code": None, "type": "b", "message": "m", "param": None}}, ErrorInfo("", "b")),
        ({"error": {"code": 429}}, ErrorInfo("429", "")),
        ({"error": {"code": ["x"], "type": {"y": 1}}}, NOTHING),
        ({"error": {"code": "x" * 5000}}, ErrorInfo("x" * 128, "")),
        ({"error": "text"}, NOTHING),
        ({"error": None}, NOTHING),
        ({"error": []}, NOTHING),
        ({"message": "no error object"}, NOTHING),
        ([], NOTHING),
        ("error", NOTHING),
        (None, NOTHING),
    ],
)
def test_the_parts_of_an_error_body_that_decide(document: Any, info: ErrorInfo) -> None:
    assert error_info(json.dumps(document).encode()) == info


SAID = "Rate limit reached for gpt-4o in organization org-x on {}: Limit {}, Used {}, Requested {}. Please try again."


@pytest.mark.parametrize(
    ("error", "limit", "too_large"),
    [
        ({"message": SAID.format("tokens per min (TPM)", 30000, 29000, 2000), "type": "tokens"}, "tokens", False),
        ({"message": SAID.format("requests per min (RPM)", 3, 3, 1), "type": "requests"}, "requests", False),
        ({"message": SAID.format("tokens per day (TPD)", 9, 9, 1)}, "tokens", False),
        ({"message": SAID.format("requests per day (RPD)", 9, 9, 1)}, "requests", False),
        ({"message": "… have exceeded token rate limit of your current OpenAI S0 pricing tier."}, "tokens", False),
        ({"message": "… have exceeded call rate limit of your current OpenAI S0 pricing tier."}, "requests", False),
        ({"message": "Request too large for gpt-4o: Limit 30000, Requested 40000."}, None, True),
        ({"message": "Request too large for gpt-4o (TPM): Limit: 30000, Requested: 40000."}, None, True),
        ({"message": "Request too large for gpt-4o."}, None, True),
        ({"message": "Request too large for gpt-4o: Limit 40000, Requested 30000."}, None, False),
        ({"message": "Limit " + "9" * 40 + ", Requested 1"}, None, False),
        ({"message": 7, "type": "tokens"}, "tokens", False),
        ({"message": "slow down"}, None, False),
    ],
)
def test_the_limit_of_a_429(error: dict[str, Any], limit: str | None, too_large: bool) -> None:
    info = error_info(json.dumps({"error": error}).encode())
    assert (info.limit, info.too_large) == (limit, too_large)
    assert classify(429, info, None) is (OutcomeKind.TOO_LARGE if too_large else OutcomeKind.RATE_LIMITED)
    assert classify(400, info, None) is OutcomeKind.FINAL
    assert classify(500, info, None) is OutcomeKind.RETRY


@pytest.mark.parametrize(
    ("requests", "tokens", "limit"),
    [("0", "500", "requests"), ("3", "0", "tokens"), ("0", "0", None), (None, None, None), ("-1", "-1", None)],
)
def test_the_headers_decide_if_the_body_does_not(requests: Any, tokens: Any, limit: Any) -> None:
    result = {"requests": requests, "tokens": tokens}
    headers = {f"x-ratelimit-remaining-{of}": left for of, left in result.items() if left is not None}
    assert dimension_of(headers, NOTHING) == limit
    assert dimension_of(headers, ErrorInfo(limit="tokens")) == "tokens"


def test_the_named_limit_decides_the_wait() -> None:
    headers = {"x-ratelimit-reset-requests": "1s", "x-ratelimit-reset-tokens": "6m0s"}
    assert retry_after(headers, 0.0) is None
    assert retry_after(headers, 0.0, ErrorInfo(limit="tokens")) == 360.0
    assert retry_after(headers, 0.0, ErrorInfo(limit="requests")) == 1.0
    assert retry_after(headers | {"x-ratelimit-remaining-tokens": "500"}, 0.0, ErrorInfo(limit="tokens")) is None


@pytest.mark.parametrize("code", ["mismatched_organization", "mismatched_project", "invalid_organization"])
def test_a_mismatched_organization_is_not_a_bad_key(code: str) -> None:
    assert classify(401, ErrorInfo(code, "invalid_request_error"), None) is OutcomeKind.ORGANIZATION


@pytest.mark.parametrize(
    ("outcome", "status", "sick"),
    [
        (OutcomeKind.RETRY, 500, 500),
        (OutcomeKind.FINAL, 503, 503),  # x-should-retry: false
        (OutcomeKind.RETRY, 200, 200),  # an error as the first event of a stream
        (OutcomeKind.RETRY, 408, None),
        (OutcomeKind.RATE_LIMITED, 429, None),
        (OutcomeKind.UNAUTHORIZED, 401, None),
        (OutcomeKind.OK, 200, None),
        (OutcomeKind.UNREACHED, None, NO_ANSWER),
        (OutcomeKind.AMBIGUOUS, None, NO_ANSWER),
        (OutcomeKind.TIMEOUT, None, NO_ANSWER),
        (OutcomeKind.STALE, None, None),
    ],
)
def test_outcomes_that_count_against_an_upstream(outcome: OutcomeKind, status: int | None, sick: int | None) -> None:
    assert breaker_failure(outcome, None if status is None else (status, {"date": "now"})) == sick


@pytest.mark.parametrize("header", ["retry-after", "retry-after-ms"])
def test_a_response_with_retry_after_does_not_count_against_an_upstream(header: str) -> None:
    assert breaker_failure(OutcomeKind.RETRY, (503, {header: "1"})) is None


DEEP = b'{"error":{"code":"503","a":' + b"[" * 400 + b"]" * 400 + b"}}"
DEEPER = b'{"error":' + b"[" * 100_000


@pytest.mark.parametrize("body", [b"", b"<html>502 Bad Gateway</html>", b"{", b"\xff\xfe", b'{"error":', DEEPER])
def test_an_error_body_without_information(body: bytes) -> None:
    assert error_info(body) == NOTHING


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["code", "type", "error"]), inner),
    max_leaves=8,
)


@given(st.binary(max_size=80) | st.builds(lambda error: json.dumps({"error": error, "type": "error"}).encode(), JSON))
def test_no_error_body_raises(body: bytes) -> None:
    info = error_info(body)
    assert isinstance(info.code, str)
    assert isinstance(info.type, str)
    found = stream_error(body)
    assert found is None or 400 <= found[0] < 600


# --- the first event of a stream --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("event", "status", "outcome"),
    [
        ({"error": {"message": "boom", "type": "server_error", "code": None}}, 500, OutcomeKind.RETRY),
        ({"error": {"message": "slow down", "code": "rate_limit_exceeded"}}, 429, OutcomeKind.RATE_LIMITED),
        ({"error": {"message": "slow down", "code": "429"}}, 429, OutcomeKind.RATE_LIMITED),
        ({"error": {"message": "slow down", "code": 429}}, 429, OutcomeKind.RATE_LIMITED),
        ({"error": {"message": "pay", "code": "insufficient_quota"}}, 429, OutcomeKind.QUOTA),
        ({"error": {"message": "pay", "type": "insufficient_quota", "code": None}}, 429, OutcomeKind.QUOTA),
        ({"error": {"message": "overloaded", "code": "503"}}, 503, OutcomeKind.RETRY),
        ({"error": {"message": "overloaded", "code": 503}}, 503, OutcomeKind.RETRY),
        ({"error": {"message": "key", "code": "401"}}, 401, OutcomeKind.UNAUTHORIZED),
        ({"error": {"message": "bad", "code": "400"}}, 400, OutcomeKind.FINAL),
        ({"error": {"message": "bad", "type": "invalid_request_error", "code": "x"}}, 400, OutcomeKind.FINAL),
        ({"error": {"message": "odd", "code": "200"}}, 500, OutcomeKind.RETRY),
        ({"error": {"message": "odd", "code": "600"}}, 500, OutcomeKind.RETRY),
        ({"error": {"message": "odd", "code": "²"}}, 500, OutcomeKind.RETRY),
        ({"error": {"message": "odd", "code": "٤٢٩"}}, 500, OutcomeKind.RETRY),
        ({"error": "overloaded"}, 500, OutcomeKind.RETRY),
        ({"error": True}, 500, OutcomeKind.RETRY),
        (
            {"type": "error", "code": "rate_limit_exceeded", "message": "m", "param": None},
            429,
            OutcomeKind.RATE_LIMITED,
        ),
        ({"type": "error", "code": "server_error", "message": "m"}, 500, OutcomeKind.RETRY),
        ({"type": "error", "error": {"type": "invalid_request_error"}}, 400, OutcomeKind.FINAL),
    ],
)
def test_an_error_as_first_event(event: dict[str, Any], status: int, outcome: OutcomeKind) -> None:
    found = stream_error(json.dumps(event).encode())
    assert found is not None
    assert found[0] == status
    assert classify(*found, None) is outcome


def test_an_error_event_however_deep() -> None:
    assert stream_error(DEEP) == (503, ErrorInfo("503", ""))


NO_ERRORS: list[Any] = [
    {"choices": [{"delta": {"content": 'the word "error"'}}]},
    {"choices": [], "error": None},
    {"choices": [{"delta": {}}], "error": {}},
    {"choices": [], "error": ""},
    {"type": "response.created", "response": {"error": None}},
    ["error"],
    "error",
]


@pytest.mark.parametrize("event", NO_ERRORS)
def test_an_ordinary_first_event(event: Any) -> None:
    assert stream_error(json.dumps(event).encode()) is None


@pytest.mark.parametrize("data", [b"", b"[DONE]", b'{"error"', b'"error"', b'{"error": NaN, ', b"\xff"])
def test_a_first_event_that_is_not_json(data: bytes) -> None:
    assert stream_error(data) is None


# --- Retry-After ------------------------------------------------------------------------------------------------------

NOW = 1_700_000_000.0
"""Unix seconds: Tue, 14 Nov 2023 22:13:20 GMT."""

SECONDS = [
    ("0", 0.0),
    ("1", 1.0),
    ("30", 30.0),
    ("1.5", 1.5),
    ("0.25", 0.25),
    (" 20 ", 20.0),
    ("6m0s", 360.0),
    ("1h", 3600.0),
    ("500ms", 0.5),
    ("1m30.5s", 90.5),
    (formatdate(NOW + 60, usegmt=True), 60.0),
    ("Tue, 14 Nov 2023 22:14:20 GMT", 60.0),
    ("Tuesday, 14-Nov-23 22:14:20 GMT", 60.0),
    ("Tue Nov 14 22:14:20 2023", 60.0),
    ("Tue, 14 Nov 2023 22:14:20 -0000", 60.0),
    ("Tue, 14 Nov 2023 22:14:20", 60.0),
    ("Tue, 14 Nov 2023 23:14:20 +0100", 60.0),
    ("Mon, 13 Nov 2023 00:00:00 GMT", 0.0),
    ("Thu, 01 Jan 1970 00:00:00 GMT", 0.0),
    ("Sat, 01 Jan 0001 00:00:00 +2359", 0.0),
]


@pytest.mark.parametrize(("text", "seconds"), SECONDS)
def test_every_form_of_retry_after(text: str, seconds: float) -> None:
    assert retry_after({"retry-after": text}, NOW) == pytest.approx(seconds)


NONSENSE = ["", "-1", "-0.5", "nan", "inf", "-inf", "Infinity", "1e400", "soon", "6m0", "m", "1,5", "1_000", "0x10"]
NONSENSE += ["9" * 400, "Tue, 99 Nov 2023 22:14:20 GMT", "Tue, 14 Nov 2023 22:14:20 +9999", "٣", "null", "-6m0s"]


@pytest.mark.parametrize("text", NONSENSE)
def test_invalid_retry_after_is_ignored(text: str) -> None:
    assert retry_after({"retry-after": text}, NOW) is None
    assert retry_after({"retry-after-ms": text}, NOW) is None


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("0", 0.0), ("1", 0.001), ("1500", 1.5), ("250.5", 0.2505), ("60000", 60.0)],
)
def test_retry_after_in_milliseconds(text: str, seconds: float) -> None:
    assert retry_after({"retry-after-ms": text}, NOW) == pytest.approx(seconds)
    assert retry_after({"retry-after-ms": text, "retry-after": "77"}, NOW) == pytest.approx(seconds)


def test_invalid_retry_after_in_milliseconds_is_ignored() -> None:
    assert retry_after({"retry-after-ms": "-1", "retry-after": "20"}, NOW) == 20.0
    assert retry_after({"retry-after-ms": "x", "retry-after": "6m0s"}, NOW) == 360.0


@pytest.mark.parametrize("seconds", [60, 3599, 3600])
def test_a_wait_of_up_to_an_hour_is_kept_whole(seconds: int) -> None:
    for headers in (
        {"retry-after": str(seconds)},
        {"retry-after": f"{seconds}s"},
        {"retry-after-ms": str(seconds * 1000)},
        {"retry-after": formatdate(NOW + seconds, usegmt=True)},
        {"x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-requests": f"{seconds}s"},
    ):
        assert retry_after(headers, NOW) == seconds, headers


@pytest.mark.parametrize("text", ["999999999", "1e30", "9" * 30, "99999999h", "Fri, 31 Dec 9999 23:59:59 GMT"])
def test_an_absurd_wait_is_bounded(text: str) -> None:
    assert retry_after({"retry-after": text}, NOW) == MAX_WAIT
    assert MAX_WAIT == 3600


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, None),
        ({"x-ratelimit-reset-requests": "8.64s", "x-ratelimit-remaining-requests": "3"}, None),
        ({"x-ratelimit-reset-requests": "8.64s", "x-ratelimit-remaining-requests": "0"}, 8.64),
        ({"x-ratelimit-reset-tokens": "6m0s", "x-ratelimit-remaining-tokens": "0"}, 360.0),
        ({"x-ratelimit-reset-tokens": "12", "x-ratelimit-remaining-tokens": "0"}, 12.0),
        ({"x-ratelimit-remaining-tokens": "0"}, None),
        (
            {
                "x-ratelimit-remaining-requests": "0",
                "x-ratelimit-reset-requests": "2s",
                "x-ratelimit-remaining-tokens": "0",
                "x-ratelimit-reset-tokens": "30s",
            },
            30.0,
        ),
        (
            {
                "x-ratelimit-remaining-requests": "0",
                "x-ratelimit-reset-requests": "2s",
                "x-ratelimit-remaining-tokens": "900",
                "x-ratelimit-reset-tokens": "30s",
            },
            2.0,
        ),
        ({"retry-after": "1", "x-ratelimit-reset-tokens": "6m0s", "x-ratelimit-remaining-tokens": "0"}, 1.0),
        ({"retry-after": "soon", "x-ratelimit-reset-tokens": "6m0s", "x-ratelimit-remaining-tokens": "0"}, 360.0),
        # Azure sends -1, and 0 for a reset that is not known.
        ({"x-ratelimit-remaining-requests": "-1", "x-ratelimit-reset-requests": "-1"}, None),
        ({"x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-requests": "-1"}, None),
        ({"x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-requests": "0"}, None),
        ({"x-ratelimit-remaining-tokens": "-1", "x-ratelimit-reset-tokens": "60"}, None),
    ],
)
def test_without_retry_after_the_exhausted_limits_reset_is_used(headers: dict[str, str], seconds: float | None) -> None:
    assert retry_after(headers, NOW) == (None if seconds is None else pytest.approx(seconds))


@given(
    st.dictionaries(
        st.sampled_from(
            [
                "retry-after",
                "retry-after-ms",
                "x-ratelimit-remaining-requests",
                "x-ratelimit-reset-requests",
                "x-ratelimit-remaining-tokens",
                "x-ratelimit-reset-tokens",
            ]
        ),
        st.text(st.characters(max_codepoint=255), max_size=40) | st.floats().map(str) | st.integers().map(str),
    ),
    st.floats(0, 4e9),
)
def test_any_headers_give_a_bounded_wait_or_none(headers: dict[str, str], wall: float) -> None:
    wait = retry_after(headers, wall)
    assert wait is None or 0 <= wait <= MAX_WAIT


@given(st.datetimes().map(lambda moment: moment.strftime("%a, %d %b %Y %H:%M:%S GMT")), st.floats(0, 4e9))
def test_any_date_is_understood(date: str, wall: float) -> None:
    wait = retry_after({"retry-after": date}, wall)
    assert wait is not None
    assert 0 <= wait <= MAX_WAIT
