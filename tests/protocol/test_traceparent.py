"""Which `traceparent` is one (W3C Trace Context, section 3.2.2)."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.protocol.headers import Raw, upstream_headers
from proxy.protocol.traceparent import traceparent

GOOD = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


def of(*values: str | bytes, name: bytes = b"traceparent") -> str:
    return traceparent([(name, value.encode("latin-1") if isinstance(value, str) else value) for value in values])


@pytest.mark.parametrize(
    "value",
    [
        GOOD,
        f"00-{TRACE}-{PARENT}-00",
        f"00-{TRACE}-{PARENT}-ff",
        f"01-{TRACE}-{PARENT}-01",
        f"cc-{TRACE}-{PARENT}-01-more",
    ],
)
def test_valid_traceparents(value: str) -> None:
    assert of(value) == of(value, name=b"TraceParent") == of(f" {value}\t") == value


@pytest.mark.parametrize(
    "value",
    [
        "",
        "x",
        GOOD.upper(),
        GOOD[:-1],
        GOOD + "-more",
        GOOD + "0",
        GOOD + "\n",
        GOOD + "\r\nx: y",
        f"ff-{TRACE}-{PARENT}-01",
        f"00-{'0' * 32}-{PARENT}-01",
        f"00-{TRACE}-{'0' * 16}-01",
        f"00-{TRACE[:-1]}g-{PARENT}-01",
        f"01-{TRACE}-{PARENT}-01-\x1b[31m",
        f"01-{TRACE}-{PARENT}-01-{'x' * 200}",
        f"0-{TRACE}-{PARENT}-01",
    ],
)
def test_invalid_traceparents(value: str) -> None:
    assert of(value) == ""
    assert upstream_headers([(b"traceparent", value.encode())], pooled=True) == [("traceparent", value)]


def test_two_traceparents_are_ignored() -> None:
    assert of(GOOD, GOOD) == of() == traceparent([(b"traceparen2", GOOD.encode())]) == ""


@given(st.lists(st.tuples(st.binary(), st.binary() | st.just(GOOD.encode()))))
def test_any_header_bytes_are_accepted(raw: list[Raw]) -> None:
    result = traceparent([(b"traceparent", value) for _, value in raw]) + traceparent(raw)
    assert result.isascii()
    assert result == "" or result.isprintable()
