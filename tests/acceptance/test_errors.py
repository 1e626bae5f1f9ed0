"""The proxy's own errors: OpenAI's form, a code, and whether to try again (docs/routes-and-errors.md)."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from tests.client import Client, Reply, ask, raw, raw_request, status_of
from tests.launch import Launch, ProxyProcess, settings
from tests.scripted_upstream import ScriptedUpstream


def assert_ours(answer: Reply, status: int, code: str) -> None:
    assert (answer.status, answer.error) == (status, code)
    error = answer.json()["error"]
    assert isinstance(error["message"], str)
    assert error["message"]
    assert isinstance(error["type"], str)
    assert answer.headers["X-Should-Retry"] == "false"
    assert answer.headers["X-Proxy-Request-Id"]


@pytest.mark.parametrize("body", [b"{", b"", b'{"model": "gpt-4o",}', b"\xff\xfe{}", b"hello", b'{"a": 1} x'])
async def test_invalid_json(proxy: ProxyProcess, upstream: ScriptedUpstream, client: Client, body: bytes) -> None:
    assert_ours(await client.send(proxy, body), 400, "invalid_json")
    assert upstream.count == 0


@pytest.mark.parametrize("body", [b"[]", b"null", b'"text"', b"7"])
async def test_json_that_is_no_object_is_no_crash(proxy: ProxyProcess, client: Client, body: bytes) -> None:
    """The proxy may refuse it, or leave that to the upstream."""
    assert (await client.send(proxy, body)).status in (200, 400, 422)


@pytest.mark.parametrize(
    "body",
    [b'{"model": 7, "messages": 3}', b'{"messages": []}', b'{"model": null}', b'{"stream": "yes"}', b"{}"],
)
async def test_fields_of_wrong_types_are_sent_upstream(proxy: ProxyProcess, client: Client, body: bytes) -> None:
    answer = await client.send(proxy, body, path="/v1/moderations")
    assert answer.status < 500


OPTIONS = {
    "X-Proxy-Cache-TTL": "soon",
    "X-Proxy-Sample": "first",
    "X-Proxy-Max-Wait": "a while",
    "X-Proxy-Timeout": "-1",
    "X-Proxy-Max-Retries": "11",
    "X-Proxy-Tag": "nocolon",
    "X-Proxy-Stream-Cost": "please",
}


@pytest.mark.parametrize("header", OPTIONS)
async def test_a_malformed_option_header_is_named(
    proxy: ProxyProcess, upstream: ScriptedUpstream, client: Client, header: str
) -> None:
    answer = await client.send(proxy, ask(), {header: OPTIONS[header]})
    assert_ours(answer, 400, "invalid_option")
    assert header.lower() in answer.json()["error"]["message"].lower()
    assert upstream.count == 0


@pytest.mark.parametrize("option", ["ttl=soon", "sample=x", "retries=99", "max-wait=x", "nobody=knows", "cache=maybe"])
async def test_a_malformed_option_in_the_base_url_is_named(
    proxy: ProxyProcess, upstream: ScriptedUpstream, client: Client, option: str
) -> None:
    answer = await client.send(proxy, ask(), path=f"/_/{option}/v1/chat/completions")
    assert_ours(answer, 400, "invalid_option")
    assert option.partition("=")[0] in answer.json()["error"]["message"]
    assert upstream.count == 0


@pytest.mark.parametrize("value", ["0", "1s", "500ms", "2m", "1.5"])
async def test_well_formed_waits_are_taken(proxy: ProxyProcess, client: Client, value: str) -> None:
    assert (await client.send(proxy, ask(), {"X-Proxy-Max-Wait": value})).status == 200


@pytest.mark.parametrize("path", ["/", "/nope", "/v2/models", "/V1/models", "/_proxy/nope", "/admin/models", "/_/v1"])
async def test_unknown_routes(proxy: ProxyProcess, upstream: ScriptedUpstream, client: Client, path: str) -> None:
    answer = await client.get(proxy, path)
    if path == "/_/v1":  # options without a path behind them: a bad option, or no route
        assert answer.status in (400, 404)
    else:
        assert_ours(answer, 404, "unknown_route")
    assert upstream.count == 0


async def test_a_wrong_method_on_the_proxys_own_routes(
    proxy: ProxyProcess, upstream: ScriptedUpstream, client: Client
) -> None:
    for path in ("/healthz", "/metrics", "/_proxy/status"):
        answer = await client.send(proxy, None, {}, path, "DELETE")
        assert_ours(answer, 405, "method_not_allowed")
    assert upstream.count == 0


@pytest.mark.parametrize("chunked", [False, True])
async def test_a_body_beyond_max_body(
    launch: Launch, upstream: ScriptedUpstream, client: Client, chunked: bool
) -> None:
    proxy = launch(settings(upstream.port, server={"max_body": "100KiB", "max_upload": "100KiB"}))

    async def pieces() -> AsyncIterator[bytes]:
        for _ in range(20):
            yield b" " * 10_240

    for path, kind in (("/v1/chat/completions", "application/json"), ("/v1/files", "text/csv")):
        body = pieces() if chunked else b" " * 204_800
        answer = await client.send(proxy, body, {"Content-Type": kind}, path)
        if path == "/v1/files" and chunked and answer.error is None:
            continue  # what is streamed up may already have gone; then the upstream answers
        assert_ours(answer, 413, "request_too_large")
    assert (await client.send(proxy, ask("x" * 90_000))).status == 200


async def test_an_upload_announced_too_large_is_refused_before_its_body(
    launch: Launch, upstream: ScriptedUpstream
) -> None:
    proxy = launch(settings(upstream.port, server={"max_body": "1KiB"}))
    head = {"Content-Type": "application/json", "Content-Length": "999999999"}
    assert status_of(await raw(proxy, raw_request("POST", "/v1/chat/completions", head))) == 413
    assert upstream.count == 0


async def test_a_request_that_is_not_http_gets_400(proxy: ProxyProcess, upstream: ScriptedUpstream) -> None:
    for junk in (
        b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n",
        b"GET\r\n\r\n",
        b"GET /v1/models HTTP/1.1\r\nbad header\r\n\r\n",
    ):
        assert status_of(await raw(proxy, junk, 2, eof=True)) in (0, 400)
    assert upstream.count == 0


async def test_a_model_that_no_upstream_serves(launch: Launch, upstream: ScriptedUpstream, client: Client) -> None:
    """The documents leave open which code is used here."""
    config = settings(upstream.port)
    config["upstreams"][0]["models"] = ["gpt-*"]
    answer = await client.send(launch(config), ask(model="claude-3"))
    assert answer.error is not None
    assert answer.headers["X-Should-Retry"] == "false"
    assert upstream.count == 0


async def test_no_other_request_is_disturbed(proxy: ProxyProcess, upstream: ScriptedUpstream, client: Client) -> None:
    """Bad input on a kept-alive connection, then good input on the same one."""
    for bad in (b"{", b""):
        await client.send(proxy, bad)
        assert (await client.send(proxy, ask())).status == 200
