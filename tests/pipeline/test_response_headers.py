"""The headers the proxy adds, letter by letter (docs/headers.md; RFC 9211; RFC 8941)."""

from __future__ import annotations

import re
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.cost.pricing import Cost
from proxy.cost.usage import Usage
from proxy.pipeline.response_headers import (
    Timing,
    cache_status,
    cost_comment,
    cost_headers,
    lines_of,
    token,
    usage_headers,
)

USAGE = Usage(100, 200, 300, cached_tokens=40)
TOKEN_LINES = (
    "X-Proxy-Prompt-Tokens: 100\r\nX-Proxy-Cached-Tokens: 40\r\n"
    "X-Proxy-Completion-Tokens: 200\r\nX-Proxy-Total-Tokens: 300\r\n"
)


def test_token_headers() -> None:
    assert lines_of(usage_headers(USAGE)) == TOKEN_LINES
    assert lines_of(usage_headers(None)) == ""


@pytest.mark.parametrize("status", ["exact", "estimated"])
def test_headers_of_a_known_cost(status: str) -> None:
    cost = Cost(Decimal("0.002250"), status)  # type: ignore[arg-type]
    expected = f"X-Proxy-Cost-USD: 0.002250\r\nX-Proxy-Cost-Status: {status}\r\n"
    assert lines_of(cost_headers(cost, USAGE)) == expected + TOKEN_LINES


def test_an_unknown_cost_has_no_number() -> None:
    assert lines_of(cost_headers(None, USAGE)) == "X-Proxy-Cost-Status: unknown\r\n" + TOKEN_LINES
    assert lines_of(cost_headers(None, None)) == "X-Proxy-Cost-Status: unknown\r\n"


def test_a_tiny_cost_is_not_rounded_to_zero() -> None:
    assert "X-Proxy-Cost-USD: 0.00000002\r\n" in lines_of(cost_headers(Cost(Decimal("2E-8"), "exact"), None))


def test_the_cost_comment_is_one_line() -> None:
    expected = b": x-proxy-cost-usd=0.002250 x-proxy-prompt-tokens=100 x-proxy-completion-tokens=200\n"
    assert cost_comment(Cost(Decimal("0.00225"), "exact"), USAGE) == expected
    assert cost_comment(None, None).startswith(b": ")
    assert b"cost-usd" not in cost_comment(None, USAGE)
    for comment in (cost_comment(None, None), cost_comment(None, USAGE)):
        assert comment.count(b"\n") == 1
        assert comment.endswith(b"\n")


@pytest.mark.parametrize(
    ("forward", "detail", "stored", "line"),
    [
        ("uri-miss", "", True, "openai-proxy; fwd=uri-miss; stored"),
        ("uri-miss", "", False, "openai-proxy; fwd=uri-miss"),
        ("bypass", "no-store", False, "openai-proxy; fwd=bypass; detail=no-store"),
        ("bypass", "uncacheable: store=true", False, 'openai-proxy; fwd=bypass; detail="uncacheable: store=true"'),
        ("stale", "", True, "openai-proxy; fwd=stale; stored"),
        ("request", "max-age", True, "openai-proxy; fwd=request; stored; detail=max-age"),
    ],
)
def test_cache_status_header(forward: str, detail: str, stored: bool, line: str) -> None:
    assert cache_status(forward, detail, stored) == line


@pytest.mark.parametrize(
    ("text", "written"),
    [
        ("sampled", "sampled"),
        ("a-b_c.d:e/f1", "a-b_c.d:e/f1"),
        ("", '""'),
        ("two words", '"two words"'),
        ("1st", '"1st"'),
        ('say "no"', '"say \\"no\\""'),
        ("back\\slash", '"back\\\\slash"'),
        ("a=b", '"a=b"'),
    ],
)
def test_structured_fields_are_tokens_or_strings(text: str, written: str) -> None:
    assert token(text) == written


@given(st.text())
def test_any_text_becomes_a_structured_field_item(text: str) -> None:
    """Neither a line break nor anything else that RFC 8941 does not allow can get into the header."""
    sf_token = r"[A-Za-z*][!#$%&'*+\-.^_`|~0-9A-Za-z:/]*"
    sf_string = r'"(?:[\x20-\x21\x23-\x5b\x5d-\x7e]|\\["\\])*"'
    assert re.fullmatch(f"{sf_token}|{sf_string}", token(text))


def test_server_timing_header() -> None:
    line = Timing(queue=1.24, upstream=200.0, total=205.5).header()
    assert line == "queue;dur=1.2, upstream;dur=200.0, proxy;dur=4.3"
    assert Timing(queue=5, upstream=5, total=9).header().endswith("proxy;dur=0.0")  # clocks never make it negative
    assert Timing().header() == "queue;dur=0.0, upstream;dur=0.0, proxy;dur=0.0"
