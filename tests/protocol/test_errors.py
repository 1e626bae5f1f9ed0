"""The error codes against a table of their own, and the envelope."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.protocol.errors import CODES, ProxyError, envelope, error_event, retry_after_headers
from proxy.protocol.sse import Splitter, data_of

STATUS = {
    "invalid_json": 400,
    "invalid_option": 400,
    "invalid_client_key": 401,
    "model_not_allowed": 403,
    "origin_not_allowed": 403,
    "unknown_route": 404,
    "method_not_allowed": 405,
    "request_too_large": 413,
    "unsupported_media_type": 415,
    "host_not_allowed": 421,
    "throttled": 429,
    "queue_full": 429,
    "request_exceeds_limit": 429,
    "keys_cooling": 429,
    "client_limit": 429,
    "budget_exceeded": 429,
    "upstream_unreachable": 502,
    "upstream_invalid_response": 502,
    "no_usable_key": 502,
    "overloaded": 503,
    "draining": 503,
    "circuit_open": 503,
    "upstream_timeout": 504,
    "not_cached": 504,
}
"""The documented codes."""

OURS_TOO = {
    "object_not_found": 404,
    "upgrade_required": 426,
    "not_implemented": 501,
    "http_version_not_supported": 505,
    "bad_request": 400,
    "internal_error": 500,
}
"""Further codes: an object of another client, no WebSocket, bad or unknown HTTP, and a failure of the proxy itself."""

WORTH_WAITING = {"throttled", "queue_full", "keys_cooling", "client_limit"}
NEVER_RETRY = {"budget_exceeded", "not_cached", "request_exceeds_limit", "no_usable_key"}
NEVER_RETRY |= {"not_implemented", "http_version_not_supported"}


def test_every_code_has_its_status() -> None:
    assert {code: kind.status for code, kind in CODES.items()} == STATUS | OURS_TOO


@pytest.mark.parametrize("code", CODES)
def test_x_should_retry_of_every_code(code: str) -> None:
    """False on what cannot succeed: `NEVER_RETRY`, and every 4xx but a 429 worth waiting for."""
    kind = CODES[code]
    hopeless = code in NEVER_RETRY or (400 <= kind.status < 500 and code not in WORTH_WAITING)
    assert kind.should_retry is (False if hopeless else None)


@pytest.mark.parametrize("code", CODES)
def test_the_envelope_is_openais(code: str) -> None:
    document = json.loads(ProxyError(code, "why", param="model").body())
    assert set(document) == {"error"}
    error = document["error"]
    assert error == {"message": "why", "type": CODES[code].type, "param": "model", "code": code}
    assert error["type"]


def test_absent_param_is_null() -> None:
    assert json.loads(ProxyError("draining", "stopping").body())["error"]["param"] is None


def test_an_error_carries_status_and_headers() -> None:
    error = ProxyError("throttled", "later", retry_after=1.5, should_retry=False, headers=(("A", "b"),))
    assert (error.status, error.retry_after, error.should_retry) == (429, 1.5, False)
    assert error.headers == (("A", "b"),)
    assert str(error) == "later"
    assert error.proxy_headers == ()
    assert ProxyError("throttled", "later").should_retry is None
    assert ProxyError("invalid_json", "no").should_retry is False


def test_an_unknown_code_raises() -> None:
    with pytest.raises(KeyError):
        ProxyError("no_such_code", "")


@given(st.text(), st.none() | st.text())
def test_any_text_fits_the_envelope(message: str, param: str | None) -> None:
    error = json.loads(envelope(message, "t", param, "c"))["error"]
    assert (error["message"], error["param"]) == (message, param)


@given(st.text())
def test_the_error_event_is_one_event_an_sdk_raises_on(message: str) -> None:
    event = error_event("upstream_timeout", message)
    splitter = Splitter()
    assert splitter.feed(event) == [event]
    assert splitter.rest == b""
    data = data_of(event)
    assert data is not None
    assert json.loads(data)["error"] == {
        "message": message,
        "type": "server_error",
        "param": None,
        "code": "upstream_timeout",
    }


@pytest.mark.parametrize(
    ("seconds", "whole", "millis"),
    [
        (0.0, "1", "1"),
        (0.0001, "1", "1"),
        (0.25, "1", "250"),
        (1.0, "1", "1000"),
        (1.0001, "2", "1001"),
        (59.9995, "60", "60000"),
        (60.6, "61", "60600"),
        (86_400.0, "86400", "86400000"),
    ],
)
def test_retry_after(seconds: float, whole: str, millis: str) -> None:
    assert retry_after_headers(seconds) == (("Retry-After", whole), ("retry-after-ms", millis))


@given(st.floats(0, 1e7))
def test_retry_after_is_never_early(seconds: float) -> None:
    (_, whole), (_, millis) = retry_after_headers(seconds)
    assert int(millis) / 1000 >= seconds or math.isclose(int(millis) / 1000, seconds)
    assert int(millis) / 1000 < seconds + 0.002
    assert int(whole) * 1000 >= int(millis)
    assert int(whole) < seconds + 2
