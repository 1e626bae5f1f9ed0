"""The cost of a stream in trailer fields after its last chunk, for clients that accept them."""

from __future__ import annotations

import asyncio
import re

import pytest

from proxy.pipeline.response_headers import TRAILERS
from proxy.upstream.retry.outcome import TransportFailure
from tests.pipeline.fixture import ask
from tests.pipeline.script import Step, event, events, says, streams
from tests.server.kit import Answer, raw_connection, request, running_proxy

pytestmark = pytest.mark.slow

STREAM = ask(stream=True)
TE = [("TE", "trailers")]
BOUGHT = {
    "X-Proxy-Cost-USD": "0.002250",
    "X-Proxy-Cost-Status": "exact",
    "X-Proxy-Prompt-Tokens": "100",
    "X-Proxy-Cached-Tokens": "0",
    "X-Proxy-Completion-Tokens": "200",
    "X-Proxy-Total-Tokens": "300",
}


@pytest.mark.parametrize(
    "headers",
    [
        TE,
        [("TE", "trailers"), ("Connection", "TE")],
        [("te", "gzip;q=0.5, Trailers ")],
        [("TE", "deflate"), ("TE", "trailers")],
    ],
)
async def test_trailers_are_sent_if_asked_for(headers: list[tuple[str, str]]) -> None:
    async with running_proxy(streams()) as server:
        answer = await server.ask(body=STREAM, headers=headers)
        assert (answer.status, answer.framing, answer.whole) == (200, "chunked", True)
        assert answer.body == b"".join(events())
        assert answer.get("Trailer") == TRAILERS
        assert answer.trailers == BOUGHT
        assert "TE" not in server.transport.sent[0].headers
        assert answer.trailers["X-Proxy-Cost-USD"] == server.receipts[0].cost_usd


@pytest.mark.parametrize("headers", [[], [("TE", "")], [("TE", "gzip")], [("TE", "notrailers, trailersx")]])
async def test_trailers_are_not_sent_unless_asked_for(headers: list[tuple[str, str]]) -> None:
    async with running_proxy(streams()) as server:
        answer = await server.ask(body=STREAM, headers=headers)
        assert (answer.get("Trailer"), answer.trailers, answer.whole) == (None, {}, True)


async def test_http_1_0_gets_no_trailers() -> None:
    async with running_proxy(streams()) as server, raw_connection(server.port) as line:
        line.send(request(body=STREAM, headers=TE, version="1.0"))
        answer = await line.answer()
        assert (answer.framing, answer.get("Trailer")) == ("close", None)
        assert answer.body == b"".join(events())


async def test_the_connection_persists_after_trailers() -> None:
    async with running_proxy(streams(), says()) as server, raw_connection(server.port) as line:
        line.send(request(body=STREAM, headers=TE) + request(body=ask("other"), headers=TE) + request(body=STREAM))
        stream, plain, hit = [await line.answer() for _ in range(3)]
        assert stream.trailers == BOUGHT
        for one in (plain, hit):  # whose cost stands in front already
            assert (one.framing, one.get("Trailer"), one.trailers) == ("length", None, {})
            assert one.get("X-Proxy-Cost-Status") == "exact"


async def test_the_trailers_of_a_coalesced_stream_say_saved_instead_of_cost() -> None:
    first, *more = events(usage=True)
    async with running_proxy(streams([first, 0.1, *more])) as server:
        both = [asyncio.create_task(server.ask(body=STREAM, headers=TE)) for _ in range(2)]
        leader, follower = sorted([await one for one in both], key=lambda one: one.get("X-Proxy-Cache") or "")[::-1]
        assert (leader.get("X-Proxy-Cache"), follower.get("X-Proxy-Cache")) == ("miss", "coalesced")
        assert leader.trailers == BOUGHT
        free = {"X-Proxy-Cost-USD": "0.000000", "X-Proxy-Cost-Saved-USD": "0.002250"}
        assert follower.trailers == BOUGHT | free


async def test_unknown_values_are_left_out_of_the_trailers() -> None:
    async with running_proxy(streams()) as server:
        answer = await server.ask(body=STREAM | {"model": "mystery"}, headers=TE)
        result = answer.trailers
    async with running_proxy(
        streams([event({"model": "mystery", "choices": []}), *events(usage=True, model="mystery")])
    ) as server:
        answer = await server.ask(body=STREAM | {"model": "mystery"}, headers=TE)
        assert answer.trailers.get("X-Proxy-Cost-USD") is None
        assert answer.trailers["X-Proxy-Cost-Status"] == "unknown"
    assert result["X-Proxy-Cost-USD"] == "0.002250"  # by the model that answered


@pytest.mark.parametrize("cut", [[TransportFailure("invalid", "cut")], []])
async def test_a_broken_stream_has_no_trailers(cut: list[Step]) -> None:
    async with running_proxy(streams([*events()[:2], *cut])) as server:
        answer: Answer = await server.ask(body=STREAM, headers=TE)
        assert (answer.whole, answer.trailers) == (False, {})


async def test_other_routes_have_no_trailers() -> None:
    async with running_proxy(says()) as server:
        answer = await server.ask("GET", "/v1/models", headers=TE)
        assert (answer.framing, answer.get("Trailer"), answer.trailers) == ("chunked", None, {})
        assert "TE" not in server.transport.sent[0].headers


def test_every_possible_trailer_is_announced() -> None:
    names = set(TRAILERS.split(", "))
    assert set(BOUGHT) | {"X-Proxy-Cost-Saved-USD"} == names
    assert all(re.fullmatch(r"X-Proxy-[A-Za-z-]+", name) for name in names)
