"""A named run as a user of the SDKs has it: a base URL, and nothing else changed."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests import upstream_answers
from tests.scripted_upstream import ScriptedUpstream
from tests.sdk.conftest import Caller

CHAT = "/v1/chat/completions"


def test_three_requests_of_a_run_get_three_responses_and_a_retry_keeps_its_number(
    caller: Caller, upstream: ScriptedUpstream
) -> None:
    if caller.sdk.kind.name == "python-1.3.0":
        pytest.skip("it does not say when it asks again")

    def texts(run: str) -> list[str]:
        """What three calls of the same request say. retries=0: it is the SDK that asks again."""
        mine = replace(caller, address=f"{caller.address}/_/run={run}-{caller.name};retries=0")
        return [mine.chat(temperature=1).message["content"] for _ in range(3)]

    upstream.queue(
        CHAT,
        upstream_answers.chat("one"),
        upstream_answers.server_error(500),
        upstream_answers.chat("two"),
        upstream_answers.chat("three"),
    )
    assert texts("first") == ["one", "two", "three"]
    assert texts("again") == ["one", "two", "three"]
    assert upstream.count == 4
    result = [{name.lower(): value for name, value in request.headers} for request in upstream.requests]
    assert [headers["x-stainless-retry-count"] for headers in result] == ["0", "0", "1", "0"]


def test_max_cost_exceeded_is_an_error_that_the_sdk_does_not_retry(caller: Caller, upstream: ScriptedUpstream) -> None:
    mine = replace(caller, address=f"{caller.address}/_/run={caller.name};max-cost=0.000001")
    assert mine.chat("a").value
    error = mine.chat("b").error
    assert (error["type"], error["status"], error["code"]) == ("RateLimitError", 429, "budget_exceeded")
    assert upstream.count == 1
