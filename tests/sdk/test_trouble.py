"""What goes wrong, in every SDK: each failure is the exception that the SDK has for it, and nothing is multiplied."""

from __future__ import annotations

import pytest

from tests import upstream_answers
from tests.scripted_upstream import ScriptedUpstream, cut, send, sleep
from tests.sdk.conftest import Caller


@pytest.mark.parametrize("stream", [False, True], ids=["plain", "stream"])
def test_the_sdk_adds_no_attempts_to_the_proxys(caller: Caller, upstream: ScriptedUpstream, stream: bool) -> None:
    upstream.always(upstream_answers.server_error(503))
    error = caller.chat(stream=stream).error
    assert (error["type"], error["status"]) == ("InternalServerError", 503)
    assert upstream.count == 2  # the call and our retry, not three times that


def test_one_failure_is_retried_by_the_proxy(caller: Caller, upstream: ScriptedUpstream) -> None:
    upstream.queue("/v1/chat/completions", upstream_answers.server_error(500))
    answer = caller.chat(raw=True)
    assert caller.name in answer.message["content"]
    assert answer.headers["x-proxy-attempts"] == "2"


def test_a_stream_is_complete_at_done(caller: Caller, upstream: ScriptedUpstream) -> None:
    """Most SDKs hang up at `[DONE]`, and do not wait for the body's last chunk."""
    events = [send(upstream_answers.chunked(event)) for event in upstream_answers.chat_events()]
    upstream.always(send(upstream_answers.stream_head()), *events, sleep(0.2), send(upstream_answers.LAST_CHUNK))
    first, second = (caller.chat(raw=True, stream=True) for _ in range(2))
    assert (first.cache, second.cache) == ("miss", "hit")
    assert first.value == second.value
    assert upstream.count == 1


@pytest.mark.parametrize("within", [False, True], ids=["between-events", "within-an-event"])
def test_a_cut_stream_raises_and_is_not_stored(caller: Caller, upstream: ScriptedUpstream, within: bool) -> None:
    events = upstream_answers.chat_events()[:4]
    pieces = [*events[:-1], events[-1][:-9]] if within else events
    upstream.always(*upstream_answers.stream(pieces, end=False), sleep(0.05), cut())
    for count in (1, 2):
        answer = caller.chat(stream=True)
        assert answer.error, answer
        assert answer.text == ("Hello " if within else "Hello wörld 🌍")
        assert upstream.count == count


def test_an_error_in_a_stream_raises(caller: Caller, upstream: ScriptedUpstream) -> None:
    failure = upstream_answers.event(upstream_answers.error_body("The server had an error.", None, "server_error"))
    upstream.always(*upstream_answers.stream([*upstream_answers.chat_events()[:3], failure]))
    answer = caller.chat(stream=True)
    assert answer.error["type"] == "APIError"
    assert answer.text == "Hello "


def test_a_rejected_key_is_an_authentication_error(caller: Caller, upstream: ScriptedUpstream) -> None:
    upstream.always(upstream_answers.unauthorized())
    error = caller.chat(model=f"rejected-{caller.name}").error
    assert (error["type"], error["status"], error["code"]) == ("AuthenticationError", 401, "invalid_api_key")
    assert upstream.count == 1


def test_a_limit_of_the_proxy_is_a_rate_limit_error(caller: Caller, upstream: ScriptedUpstream) -> None:
    model = f"throttled-{caller.name}"
    assert caller.chat("first", model=model).value
    error = caller.chat("second", model=model, max_retries=0).error
    assert (error["type"], error["status"], error["code"]) == ("RateLimitError", 429, "throttled")
    assert upstream.count == 1
    assert caller.chat("first", model=model, raw=True).cache == "hit"  # hits are free


ERRORS = {
    400: "BadRequestError",
    403: "PermissionDeniedError",
    404: "NotFoundError",
    422: "UnprocessableEntityError",
}


@pytest.mark.parametrize("status", ERRORS)
def test_an_error_of_the_api_is_passed_on(caller: Caller, upstream: ScriptedUpstream, status: int) -> None:
    upstream.always(upstream_answers.error(status, "a message of the API", "a_code"))
    error = caller.chat(model=f"gpt-{status}-{caller.name}").error
    assert (error["type"], error["status"], error["code"]) == (ERRORS[status], status, "a_code")
    assert "a message of the API" in error["message"]
    assert upstream.count == 1
