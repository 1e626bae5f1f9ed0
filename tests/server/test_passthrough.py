"""All other routes: passed through both ways, sent once, never parsed and never cached (docs/routes-and-errors.md)."""

from __future__ import annotations

import asyncio
import gzip
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import pytest

import proxy.server.request_body
from proxy.config.limits import Limits
from proxy.config.settings import (
    BreakerSettings,
    RetrySettings,
    ServerSettings,
    ThrottleSettings,
    TimeoutSettings,
    UpstreamSettings,
)
from proxy.upstream.retry.outcome import TransportFailure
from tests.pipeline.fixture import pool, settings
from tests.pipeline.script import HANG, JSON, Fails, Move, Responds, Step, error, rate_limited, says
from tests.server.kit import TEST_TIMEOUT, Answer, RunningProxy, chunked, raw_connection, request, running_proxy
from tests.server.objects import remember

pytestmark = pytest.mark.slow

FILES, MODELS = "/v1/files", "/v1/models"
CUT = TransportFailure("invalid", "cut")
QUICK = RetrySettings(base_delay=0.01, jitter=0.0)
ONE, TWO = settings(retry=QUICK), settings(pool("k1", "k2"), retry=QUICK)
LISTED = Responds(200, (JSON, ("Content-Length", "9")), (b'{"data"', b":1"))


def our(answer: Answer) -> dict[str, str]:
    return {name: value for name, value in answer.headers if name.startswith(("X-Proxy", "Cache-Status", "X-Should"))}


# --- forwarding -------------------------------------------------------------------------------------------------------


async def test_headers_of_every_forwarded_response() -> None:
    async with running_proxy(
        Responds(200, (("Content-Type", "text/x"), ("Content-Length", "3")), (b"ab", b"c"))
    ) as server:
        answer = await server.ask("GET", MODELS)
        assert (answer.status, answer.reason, answer.body) == (200, "As You Like It", b"abc")
        assert (answer.framing, answer.get("Content-Type")) == ("length", "text/x")
        shown = our(answer)
        assert len(shown.pop("X-Proxy-Request-Id")) == 32
        assert shown == {
            "X-Proxy-Cache": "bypass",
            "X-Proxy-Cache-Reason": "uncacheable: route",
            "Cache-Status": 'openai-proxy; fwd=bypass; detail="uncacheable: route"',
            "X-Proxy-Upstream": "openai",
            "X-Proxy-Key": "k1",
            "X-Proxy-Attempts": "1",
            "X-Proxy-Cost-Status": "unknown",
        }
        assert "upstream;dur=" in (answer.get("Server-Timing") or "")
        [receipt] = server.receipts
        assert server.services.receipts.get(answer.get("X-Proxy-Request-Id") or "") is receipt
        assert (receipt.endpoint, receipt.status, receipt.cache, receipt.attempts) == ("models", 200, "bypass", 1)


@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "PATCH", "DELETE"])
@pytest.mark.parametrize("target", ["/v1/files/f-1/content?a=%2F&b", "/files/f-1/content?a=%2F&b", "/v1/x/y"])
async def test_methods_targets_and_bodies_are_sent_unchanged(method: str, target: str) -> None:
    async with running_proxy(LISTED) as server:
        body = None if method == "GET" else bytes(range(256))
        headers = [("Content-Type", "application/octet-stream"), ("Accept-Encoding", "br"), ("Cookie", "a=b")]
        assert (await server.ask(method, target, body, headers)).status == 200
        [sent] = server.transport.sent
        assert (sent.method, sent.url) == (method, "http://up.test/v1/" + target.removeprefix("/v1").removeprefix("/"))
        assert sent.body == body
        assert sent.headers.getall("Authorization") == ["Bearer sk-k1"]
        assert (sent.headers["Accept-Encoding"], sent.headers.get("Cookie")) == ("br", None)
        assert sent.headers.get("Content-Length") == (None if body is None else "256")


async def test_an_upload_of_unknown_length_is_streamed() -> None:
    async with running_proxy(LISTED) as server, raw_connection(server.port) as line:
        line.send(request("POST", FILES, headers=[("Transfer-Encoding", "chunked")]) + chunked(b"ab", b"cd"))
        assert (await line.answer()).status == 200
        assert server.transport.sent[0].body == b"abcd"
        assert "Content-Length" not in server.transport.sent[0].headers


async def test_a_response_to_head_has_no_body() -> None:
    async with running_proxy(Responds(200, (("Content-Length", "12345"),))) as server:
        answer = await server.ask("HEAD", MODELS)
        assert (answer.status, answer.get("Content-Length")) == (200, "12345")


@pytest.mark.parametrize("status", [200, 204, 206, 301, 304, 307])
async def test_any_status_below_400_is_forwarded(status: int) -> None:
    """Redirects are not followed and are no errors either."""
    moved = Responds(status, (("Location", "/v1/elsewhere"), ("Content-Range", "bytes 0-1/9")))
    async with running_proxy(moved) as server:
        answer = await server.ask("GET", FILES)
        assert (answer.status, answer.get("Location")) == (status, "/v1/elsewhere")
        assert answer.get("Content-Range") == "bytes 0-1/9"


@pytest.mark.parametrize("target", ["/v1/files", "/files", "/_/tag=a:b/v1/files"])
async def test_a_location_is_a_path_of_the_proxy_or_goes(target: str) -> None:
    """Upstreams name their own hosts, which may be internal."""
    made = (("Location", "http://up.test/v1/files/f"), ("Content-Location", "http://10.0.0.7/v1/files/f"), JSON)
    async with running_proxy(Responds(201, made, (b"{}",))) as server:
        answer = await server.ask("POST", target, {})
        assert answer.get("Location") == target + "/f"
        assert answer.get("Content-Location") is None
        assert not [value for _, value in answer.headers if "up.test" in value or "10.0.0.7" in value]


async def test_a_redirect_to_another_host_is_passed_on_without_it() -> None:
    moved = Responds(302, (("Location", "http://minio.internal:9000/bucket/f?sig=1"),), ())
    async with running_proxy(moved) as server:
        answer = await server.ask("GET", "/v1/files/f/content")
        assert (answer.status, answer.get("Location")) == (302, None)


async def test_a_location_of_a_cached_endpoint_goes() -> None:
    named = says(headers=[("Location", "http://up.test/v1/chat/completions/c")])
    async with running_proxy(named) as server:
        for _ in range(2):
            answer = await server.ask(body={"model": "gpt-4o", "messages": []})
            assert (answer.status, answer.get("Location")) == (200, None)


async def test_a_response_without_a_length_is_chunked_by_read() -> None:
    async with running_proxy(Responds(200, (), (b"ab", b"cd"))) as server:
        answer = await server.ask("GET", FILES)
        assert (answer.chunks, answer.whole) == ([b"ab", b"cd"], True)


async def test_compressed_responses_are_not_decoded() -> None:
    packed = gzip.compress(b"abc")
    async with running_proxy(Responds(200, (("Content-Encoding", "gzip"),), (packed,))) as server:
        answer = await server.ask("GET", FILES)
        assert (answer.get("Content-Encoding"), answer.body) == ("gzip", packed)


async def test_each_read_is_forwarded_at_once() -> None:
    async with running_proxy(Responds(200, (), (b"first", HANG))) as server, raw_connection(server.port) as line:
        line.send(request("GET", FILES))
        async with asyncio.timeout(TEST_TIMEOUT):
            assert b"first" in await line.reader.readuntil(b"first")


async def test_forwarded_responses_are_never_stored() -> None:
    async with running_proxy(LISTED, LISTED) as server:
        for _ in range(2):
            assert (await server.ask("GET", MODELS)).get("X-Proxy-Cache") == "bypass"
        answer = await server.ask("GET", MODELS, headers=[("Cache-Control", "only-if-cached")])
        assert (answer.status, answer.error) == (504, "not_cached")


async def test_pass_through_sends_the_clients_own_credential() -> None:
    async with running_proxy(LISTED, config=settings(UpstreamSettings(base_url="http://up.test/v1"))) as server:
        headers = [("Authorization", "Bearer mine"), ("OpenAI-Organization", "org-1")]
        answer = await server.ask("GET", MODELS, headers=headers)
        sent = server.transport.sent[0].headers
        assert (sent["Authorization"], sent["OpenAI-Organization"]) == ("Bearer mine", "org-1")
        assert answer.get("X-Proxy-Key") == "client"


async def test_a_client_without_a_credential_sends_none() -> None:
    async with running_proxy(LISTED, config=settings(UpstreamSettings(base_url="http://up.test/v1"))) as server:
        await server.ask("GET", MODELS)
        assert "Authorization" not in server.transport.sent[0].headers


# --- selection of keys ------------------------------------------------------------------------------------------------


async def carried(server: RunningProxy, route: str, *moves: Move, method: str = "GET") -> list[str]:
    server.transport.queue[:] = moves
    server.transport.sent.clear()
    await server.ask(method, route, b"x" if method == "POST" else None)
    return server.transport.keys


async def test_stateful_routes_use_the_first_usable_key_and_others_any_ready_key() -> None:
    async with running_proxy(config=TWO) as server:
        for _ in range(3):
            assert await carried(server, "/v1/files", LISTED) == ["k1"]
        assert await carried(server, "/v1/files", rate_limited("0"), LISTED) == ["k1", "k1"]  # k2 has other files
        assert await carried(server, "/v1/models", error(401), LISTED) == ["k2", "k1"]
        assert await carried(server, "/v1/files", error(401)) == ["k1"]  # nothing else is left


async def test_stateful_routes_go_on_with_the_next_key_when_one_is_found_unusable() -> None:
    async with running_proxy(config=TWO) as server:
        assert await carried(server, "/v1/files", error(401), LISTED) == ["k1", "k2"]
        assert server.receipts[-1].error == ""
        for method in ("GET", "POST"):
            assert await carried(server, "/v1/files", LISTED, method=method) == ["k2"]
    async with running_proxy(config=TWO) as server:
        assert await carried(server, "/v1/batches", error(401), method="POST") == ["k1"]  # it is sent once
        assert await carried(server, "/v1/batches", LISTED, method="POST") == ["k2"]
        assert await carried(server, "/v1/files/file-1", error(404)) == ["k2"]  # about this file


async def test_stateful_routes_go_to_an_upstream_that_has_them() -> None:
    """A server without a key has no account, and an upstream that answers 404 to a list does not have the route."""
    keyless = UpstreamSettings("local", base_url="http://local.test/v1", models=("llama*",))
    async with running_proxy(config=settings(keyless, replace(pool("k1"), models=("gpt-*",)))) as server:
        assert await carried(server, "/v1/files", LISTED) == ["k1"]
        assert await carried(server, "/v1/batches", LISTED, method="POST") == ["k1"]
    config = settings(replace(pool("k0"), name="local", base_url="http://local.test/v1"), pool("k1"))
    async with running_proxy(config=config) as server:
        assert await carried(server, "/v1/files", error(404), LISTED) == ["k0", "k1"]
        assert await carried(server, "/v1/files", LISTED) == ["k1"]
        assert await carried(server, "/v1/batches", LISTED, method="POST") == ["k1"]


@pytest.mark.parametrize("bad", [error(401), error(403), error(429, "insufficient_quota"), rate_limited("99")])
async def test_a_bad_key_is_replaced_by_the_next(bad: Responds) -> None:
    async with running_proxy(bad, LISTED, config=TWO) as server:
        answer = await server.ask("GET", MODELS)
        assert (answer.status, answer.get("X-Proxy-Key"), answer.get("X-Proxy-Attempts")) == (200, "k2", "2")
        assert answer.error is None


async def test_if_every_key_is_bad_the_last_response_is_returned() -> None:
    async with running_proxy(error(401), error(401, message="for sk-k2"), config=TWO) as server:
        answer = await server.ask("GET", MODELS)
        assert (answer.status, answer.json()["error"]["message"]) == (401, "for ***")
        assert answer.get("X-Proxy-Error") == "no_usable_key"
        assert answer.get("X-Should-Retry") == "false"
        assert server.receipts[0].error == "no_usable_key"


async def test_in_pass_through_a_401_is_returned_as_is() -> None:
    async with running_proxy(error(401), config=settings(UpstreamSettings(base_url="http://up.test/v1"))) as server:
        answer = await server.ask("GET", MODELS)
        assert (answer.status, answer.get("X-Proxy-Error")) == (401, None)


async def test_the_circuit_opens_after_repeated_failures() -> None:
    async with running_proxy(*[error(500)] * 3, config=replace(ONE, breaker=BreakerSettings(failures=3))) as server:
        for _ in range(3):
            assert (await server.ask("POST", FILES, b"x")).status == 500
        answer = await server.ask("POST", FILES, b"x")
        assert (answer.status, answer.error) == (503, "circuit_open")
        assert answer.get("Retry-After") == "15"
        state = (await server.ask("GET", "/_proxy/keys")).json()["upstreams"]
        assert [(row["name"], row["state"]) for row in state] == [("openai", "open")]


async def test_azure_paths_prefer_an_azure_upstream() -> None:
    azure = UpstreamSettings("azure", "azure", "https://res.test", keys=pool("k2").keys, api_version="2024-10-21")
    async with running_proxy(LISTED, config=settings(pool("k1"), azure)) as server:
        await server.ask("GET", "/openai/files?api-version=2024-06-01")
        [sent] = server.transport.sent
        assert (sent.key, sent.url) == ("k2", "https://res.test/openai/files?api-version=2024-06-01")


# --- retries ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trouble", [error(500), error(429), Fails("ambiguous"), Fails("stale"), Fails("timeout")])
async def test_a_sent_post_is_not_retried(trouble: Move) -> None:
    """An upload, a batch or a fine-tuning job must not be created twice."""
    async with running_proxy(trouble, config=TWO) as server:
        answer = await server.ask("POST", FILES, b"x")
        assert answer.status in (500, 429, 502, 504)
        assert answer.get("X-Proxy-Attempts") == "1"
        assert len(server.receipts) == 1


async def test_requests_that_may_not_be_resent_use_new_connections() -> None:
    async with running_proxy(LISTED, LISTED) as server:
        await server.ask("POST", FILES, b"x")
        await server.ask("GET", FILES)
        assert [sent.connection.fresh for sent in server.transport.sent] == [True, False]


async def test_a_request_that_was_not_sent_is_retried() -> None:
    async with running_proxy(Fails("unreached"), LISTED, config=ONE) as server:
        answer = await server.ask("POST", FILES, b"hello")
        assert (answer.status, answer.get("X-Proxy-Attempts")) == (200, "2")
        assert server.transport.sent[1].body == b"hello"


@pytest.mark.parametrize(
    "trouble", [error(500), error(503), Fails("ambiguous"), Fails("unreached"), rate_limited("0.01")]
)
@pytest.mark.parametrize("method", ["GET", "HEAD"])
async def test_get_and_head_are_retried(trouble: Move, method: str) -> None:
    async with running_proxy(trouble, LISTED, config=ONE) as server:
        answer = await server.ask(method, MODELS)
        assert (answer.status, answer.get("X-Proxy-Attempts")) == (200, "2")


async def test_a_get_with_a_body_is_not_retried() -> None:
    async with running_proxy(error(500), config=ONE) as server:
        assert (await server.ask("GET", MODELS, b"x")).status == 500


async def test_a_stale_connection_is_replaced_by_a_new_one() -> None:
    async with running_proxy(Fails("stale"), LISTED, config=ONE) as server:
        assert (await server.ask("GET", MODELS)).status == 200
        assert [sent.connection.fresh for sent in server.transport.sent] == [False, True]


async def test_after_the_last_retry_x_should_retry_is_false() -> None:
    async with running_proxy(*[error(500, headers=[("x-should-retry", "true")])] * 4, config=ONE) as server:
        answer = await server.ask("GET", MODELS)
        assert (answer.status, answer.get("X-Proxy-Attempts"), answer.get("X-Should-Retry")) == (500, "4", "false")
    async with running_proxy(*[Fails("unreached")] * 2, config=ONE) as server:
        answer = await server.ask("GET", MODELS, headers=[("X-Proxy-Max-Retries", "1")])
        assert (answer.status, answer.error, answer.get("X-Should-Retry")) == (502, "upstream_unreachable", "false")
        assert server.receipts[0].error == "upstream_unreachable"


@pytest.mark.parametrize(
    ("slow", "timeout"),
    [(Fails("hang"), "50ms"), (Responds(500, body=(b"{", HANG)), "50ms"), (Responds(wait=9.0), "0.05")],
)
async def test_the_clients_timeout_is_the_deadline(slow: Move, timeout: str) -> None:
    async with running_proxy(slow) as server:
        answer = await server.ask("GET", MODELS, headers=[("X-Proxy-Timeout", timeout)])
        assert (answer.status, answer.error) == (504, "upstream_timeout")
        assert server.receipts[0].error == "upstream_timeout"


async def test_the_first_byte_has_its_own_timeout() -> None:
    async with running_proxy(Fails("hang"), config=settings(timeouts=TimeoutSettings(first_byte=0.05))) as server:
        headers = [("X-Proxy-Max-Retries", "0")]
        assert (await server.ask("GET", MODELS, headers=headers)).error == "upstream_timeout"


# --- errors and cut responses -----------------------------------------------------------------------------------------


async def test_an_error_is_forwarded_with_keys_masked() -> None:
    bad = error(400, "bad", [("x-debug", "sk-k1"), ("Set-Cookie", "a=b")], message="sk-k1 is not yours")
    async with running_proxy(bad) as server:
        answer = await server.ask("POST", FILES, b"x")
        assert (answer.status, answer.json()["error"]["message"]) == (400, "*** is not yours")
        assert (answer.get("x-debug"), answer.get("Set-Cookie")) == ("***", None)
        assert server.receipts[0].error == "upstream_400"


async def test_a_compressed_error_is_decoded_and_a_cut_one_is_502() -> None:
    packed = gzip.compress(b'{"error":{"message":"sk-k1"}}')
    headers = (JSON, ("Content-Encoding", "gzip"))
    async with running_proxy(Responds(400, headers, (packed,)), Responds(400, headers, (packed[:-5],))) as server:
        answer = await server.ask("POST", FILES, b"x")
        assert (answer.body, answer.get("Content-Encoding")) == (b'{"error":{"message":"***"}}', None)
        assert (await server.ask("POST", FILES, b"x")).error == "upstream_invalid_response"


@pytest.mark.parametrize("cut", [CUT, None], ids=["reset", "closed"])
@pytest.mark.parametrize("version", ["1.0", "1.1"])
async def test_a_compressed_download_that_is_cut_is_seen_as_cut(version: str, cut: TransportFailure | None) -> None:
    """Without a length only the compressed data shows that it is not whole."""
    data = gzip.compress(bytes(range(256)) * 100)
    whole = (("Content-Type", "text/csv"), ("Content-Encoding", "gzip"))
    body: tuple[Step, ...] = (data[:50], cut) if cut is not None else (data[:50],)
    async with running_proxy(Responds(200, whole, body), Responds(200, whole, (data,))) as server:
        for intact in (False, True):
            async with raw_connection(server.port) as line:
                line.send(request("GET", "/v1/files/file-1/content", version=version))
                answer = await line.answer()
                assert (answer.status, answer.whole) == (200, intact)


@pytest.mark.parametrize("body", [(b"{", CUT), (b" " * 5_000_000, b" " * 5_000_000)], ids=["cut", "far too large"])
async def test_a_broken_error_body_is_502_and_its_connection_closed(body: tuple[Any, ...]) -> None:
    async with running_proxy(Responds(400, (JSON,), body)) as server:
        answer = await server.ask("POST", FILES, b"x")
        assert (answer.status, answer.error) == (502, "upstream_invalid_response")
        assert server.transport.replies[0].given_back


@pytest.mark.parametrize("length", [(), (("Content-Length", "9"),)])
async def test_a_response_that_breaks_in_the_middle_has_no_clean_end(length: Iterable[tuple[str, str]]) -> None:
    async with running_proxy(Responds(200, tuple(length), (b"abc", CUT))) as server:
        answer = await server.ask("GET", FILES)
        assert (answer.status, answer.body, answer.whole) == (200, b"abc", False)
        assert (server.receipts[0].status, server.receipts[0].error) == (200, "upstream_invalid_response")


@pytest.mark.parametrize(("kind", "status"), [("invalid", 502), ("timeout", 504)])
async def test_a_response_that_breaks_before_its_first_byte_is_an_error(kind: Any, status: int) -> None:
    """No byte has been sent to the client, so it gets an error, and the receipt has the same."""
    async with running_proxy(Responds(200, (), (TransportFailure(kind, "cut"),))) as server:
        answer = await server.ask("GET", FILES)
        assert answer.status == status
        [receipt] = server.receipts
        assert (receipt.status, receipt.error) == (status, answer.error)
        assert answer.get("X-Proxy-Request-Id") == receipt.id


async def test_the_upstream_is_closed_when_the_client_leaves() -> None:
    async with running_proxy(Responds(200, (), (b"abc", HANG))) as server:
        async with raw_connection(server.port) as line:
            line.send(request("GET", FILES))
            await line.reader.readuntil(b"abc")
            await line.gone()
        async with asyncio.timeout(TEST_TIMEOUT):
            await server.settled()
        assert server.transport.replies[0].closed
        assert (server.receipts[0].status, server.receipts[0].error) == (499, "client_gone")


@pytest.mark.parametrize("slow", [Fails("hang"), Responds(400, (JSON,), (b"{", HANG))])
async def test_the_upstream_is_closed_when_the_client_leaves_before_the_response(slow: Move) -> None:
    async with running_proxy(slow) as server:
        async with raw_connection(server.port) as line:
            line.send(request("GET", FILES))
            await asyncio.sleep(0.05)
            await line.gone()
        async with asyncio.timeout(TEST_TIMEOUT):
            await server.settled()
        assert (server.receipts[0].status, server.receipts[0].error) == (499, "client_gone")


# --- uploads that are too large, slow or aborted ----------------------------------------------------------------------

SMALL = replace(settings(), server=ServerSettings(max_body=10, max_upload=1000))


async def test_an_upload_announced_too_large_is_413() -> None:
    async with running_proxy(config=SMALL) as server, raw_connection(server.port) as line:
        line.send(request("POST", FILES, headers=[("Content-Length", "1001"), ("Expect", "100-continue")]))
        answer = await line.answer()
        assert (answer.status, answer.error, answer.get("Connection")) == (413, "request_too_large", "close")
        assert server.transport.sent == []


async def test_an_upload_of_unknown_length_beyond_the_limit_is_413() -> None:
    async with running_proxy(LISTED, config=SMALL) as server, raw_connection(server.port) as line:
        line.send(request("POST", FILES, headers=[("Transfer-Encoding", "chunked")]) + chunked(b"x" * 600, b"x" * 600))
        answer = await line.answer()
        assert (answer.status, answer.error) == (413, "request_too_large")
        assert [(receipt.status, receipt.error) for receipt in server.receipts] == [(413, "request_too_large")]


async def test_an_upload_waits_for_100_continue() -> None:
    async with running_proxy(LISTED) as server, raw_connection(server.port) as line:
        line.send(request("POST", FILES, headers=[("Content-Length", "5"), ("Expect", "100-continue")]))
        assert (await line.answer()).status == 100
        line.send(b"hello")
        assert (await line.answer()).status == 200
        assert server.transport.sent[0].body == b"hello"


async def test_an_upload_sent_too_slowly_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proxy.server.request_body, "BODY_TIMEOUT", 0.1)
    async with running_proxy(LISTED) as server, raw_connection(server.port) as line:
        line.send(request("POST", FILES, headers=[("Content-Length", "5")]) + b"he")
        assert await line.ended() == b""
        await server.settled()
        assert len(server.receipts) == 1


async def test_an_upload_that_the_client_breaks_off() -> None:
    async with running_proxy(LISTED) as server:
        async with raw_connection(server.port) as line:
            line.send(request("POST", FILES, headers=[("Content-Length", "5")]) + b"he")
            await asyncio.sleep(0.05)
            await line.gone()
        await server.settled()
        assert [receipt.status for receipt in server.receipts] == [499]


async def test_upstream_responses_are_closed_after_every_outcome() -> None:
    """Of twenty responses of all kinds, half of the clients disconnect; no connection stays open."""
    moves = [LISTED, error(500), Responds(200, (), (b"a", 0.05, b"b")), Responds(400, (JSON,), (b"{", CUT))] * 5
    async with running_proxy(*moves, *[LISTED] * 40, config=ONE) as server:

        async def one(n: int) -> None:
            async with raw_connection(server.port) as line:
                line.send(request("GET" if n % 2 else "POST", FILES, None if n % 2 else b"x"))
                if n % 4 < 2:
                    await asyncio.sleep(0.001 * n)
                    await line.gone()
                else:
                    await line.answer()

        await asyncio.gather(*[one(n) for n in range(20)])
        await server.settled()
        assert len(server.receipts) <= 20


# --- rules of all routes ----------------------------------------------------------------------------------------------


async def test_forwarded_requests_count_in_the_retry_budget() -> None:
    """A budget of one retry for each request allows one retry of each request."""
    config = settings(retry=RetrySettings(max_retries=1, base_delay=0.0, jitter=0.0, budget=1.0))
    async with running_proxy(*[error(500), LISTED] * 15, config=config) as server:
        answers = [await server.ask("GET", MODELS) for _ in range(15)]
        assert [(answer.status, answer.get("X-Proxy-Attempts")) for answer in answers] == [(200, "2")] * 15


async def test_a_wait_named_only_in_the_body_of_a_429_is_obeyed() -> None:
    """The reset time of a limit counts if the error says that this limit was reached."""
    limited = Responds(
        429,
        (JSON, ("x-ratelimit-reset-tokens", "99s")),
        (b'{"error": {"type": "tokens", "code": "rate_limit_exceeded", "message": "x"}}',),
    )
    async with running_proxy(limited, LISTED, config=ONE) as server:
        answer = await server.ask("GET", MODELS, headers=[("X-Proxy-Timeout", "5s")])
        assert (answer.status, answer.get("X-Proxy-Attempts")) == (429, "1")


async def test_keys_are_used_by_priority() -> None:
    config = settings(
        replace(pool("k2"), name="second", priority=1),
        replace(pool("k1"), name="first"),
        retry=RetrySettings(max_retries=1, base_delay=0.0, jitter=0.0),
    )
    async with running_proxy(config=config) as server:
        voices = "/v1/audio/voices"
        assert await carried(server, voices, LISTED) == ["k1"]
        assert await carried(server, voices, LISTED) == ["k1"]
        assert await carried(server, voices, error(500), error(500), LISTED) == ["k1", "k1", "k2"]


async def test_weights_apply_to_forwarded_requests() -> None:
    config = settings(pool("k1", "k2"), selection="weighted")
    heavy, light = config.upstreams[0].keys
    config = settings(replace(config.upstreams[0], keys=(replace(heavy, weight=3.0), light)), selection="weighted")
    async with running_proxy(config=config) as server:
        used = [(await carried(server, MODELS, LISTED))[0] for _ in range(8)]
        assert (used.count("k1"), used.count("k2")) == (6, 2)


async def test_if_every_key_is_rejected_one_request_in_a_second_is_sent() -> None:
    async with running_proxy(*[error(401)] * 4, config=TWO) as server:
        for sent in (2, 4):
            assert (await server.ask("GET", MODELS)).status == 401
            assert len(server.transport.sent) == sent
        answer = await server.ask("GET", MODELS)
        assert (answer.error, len(server.transport.sent)) == ("no_usable_key", 4)


async def test_a_key_without_the_right_to_list_models_serves_everything_else() -> None:
    missing = error(401, message="You have insufficient permissions for this operation. Missing scopes: model.read.")
    async with running_proxy(missing, missing, says(), config=TWO) as server:
        assert (await server.ask("GET", MODELS)).status == 401
        assert len(server.transport.sent) == 2
        assert (await server.ask("POST", "/v1/chat/completions", {"model": "gpt-4o"})).status == 200


async def test_key_states_learned_from_forwarded_responses() -> None:
    """A rejected key that works again is ready; such a response does not tell that a key has quota again."""
    async with running_proxy(config=TWO) as server:

        def state(label: str) -> str:
            state = server.services.pool.state(label, "gpt-4o", server.services.clock.monotonic())
            return "ready" if state is None else state.status.value

        assert await carried(server, MODELS, error(401), LISTED) == ["k1", "k2"]
        assert state("k1") == "rejected"
        remember(server, "file-1", "k1")
        assert await carried(server, f"{FILES}/file-1", LISTED) == ["k1"]
        assert state("k1") == "ready"
        assert await carried(server, MODELS, LISTED) == ["k2"]
        assert await carried(server, MODELS, error(429, "insufficient_quota"), LISTED) == ["k1", "k2"]
        assert await carried(server, f"{FILES}/file-1", LISTED) == ["k1"]
        assert state("k1") == "exhausted"
        for passing in (error(403), error(404, "model_not_found"), rate_limited("99")):
            await carried(server, FILES, passing)
        assert state("k2") == "ready"


async def test_model_limits_do_not_apply_without_a_model() -> None:
    config = settings(throttle=ThrottleSettings(limits={"*": Limits(rpm=1)}, max_wait=0.0))
    async with running_proxy(*[LISTED] * 3, config=config) as server:
        assert [(await server.ask("GET", MODELS)).status for _ in range(3)] == [200] * 3


async def test_a_model_filter_does_not_apply_without_a_model() -> None:
    async with running_proxy(LISTED, LISTED, config=settings(replace(pool("k1"), models=("gpt-*",)))) as server:
        assert (await server.ask("GET", "/v1/audio/voices")).status == 200
        assert (await server.ask("GET", FILES)).status == 200


async def test_retries_are_counted_by_cause() -> None:
    async with running_proxy(error(500), LISTED, config=ONE) as server:
        await server.ask("GET", MODELS)
        assert dict(server.services.counters.retries) == {("openai", "retry"): 1}
