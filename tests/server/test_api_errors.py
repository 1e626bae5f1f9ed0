"""Requests that the server refuses, in OpenAI's form; client keys and browsers (docs/routes-and-errors.md)."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import pytest

import proxy.system.threads
from proxy.config.settings import ClientKeySettings, ServerSettings, Settings
from proxy.upstream.retry.outcome import TransportFailure
from tests.pipeline.fixture import ask, settings
from tests.pipeline.script import dump, error, says, streams
from tests.server.kit import Answer, RunningProxy, raw_connection, request, running_proxy

pytestmark = pytest.mark.slow

CUT = TransportFailure("invalid", "cut")
CHAT = "/v1/chat/completions"
Headers = Iterable[tuple[str, str]]


def server_config(**fields: Any) -> Settings:
    return replace(settings(), server=ServerSettings(**fields))


# --- refusals ---------------------------------------------------------------------------------------------------------

REFUSED: dict[str, tuple[tuple[Any, ...], Headers, int, str]] = {
    # (method, target, body), headers -> status, code
    "no JSON": (("POST", CHAT, b"{nope"), (), 400, "invalid_json"),
    "nothing": (("POST", CHAT, b""), (), 400, "invalid_json"),
    "no object": (("POST", CHAT, b"[1]"), (), 400, "invalid_json"),
    "no text": (("POST", CHAT, b"\xff{}"), (), 400, "invalid_json"),
    "a bad option": (("POST", CHAT, b"{}"), [("X-Proxy-Sample", "x")], 400, "invalid_option"),
    "a bad option in the URL": (("POST", f"/_/ttl=soon{CHAT}", b"{}"), (), 400, "invalid_option"),
    "a bad option elsewhere": (("GET", "/v1/models", None), [("X-Proxy-Timeout", "0")], 400, "invalid_option"),
    "a limit of no run": (("POST", CHAT, b"{}"), [("X-Proxy-Max-Cost", "1")], 400, "invalid_option"),
    "no content type": (("POST", CHAT, b"a=b"), [("Content-Type", "")], 415, "unsupported_media_type"),
    "a form": (("POST", CHAT, b"a=b"), [("Content-Type", "text/plain")], 415, "unsupported_media_type"),
    "an unknown coding": (("POST", CHAT, b"{}"), [("Content-Encoding", "exi")], 415, "unsupported_media_type"),
    "compressed, it says": (("POST", CHAT, b"{}"), [("Content-Encoding", "gzip")], 400, "invalid_json"),
    "GET": (("GET", "/v1/embeddings", None), (), 405, "method_not_allowed"),
    "PUT": (("PUT", CHAT, b"{}"), (), 405, "method_not_allowed"),
    "DELETE": (("DELETE", "/v1/responses", None), (), 405, "method_not_allowed"),
    "TRACE": (("TRACE", "/v1/models", None), (), 405, "method_not_allowed"),
    "OPTIONS": (("OPTIONS", CHAT, None), (), 405, "method_not_allowed"),
    "another protocol's method": (("PROPFIND", "/v1/models", None), (), 405, "method_not_allowed"),
    "nowhere": (("GET", "/nowhere", None), (), 404, "unknown_route"),
    "the root": (("GET", "/", None), (), 404, "unknown_route"),
    "upwards": (("POST", "/v1/../admin", b"{}"), (), 404, "unknown_route"),
    "upwards in disguise": (("GET", "/v1/%2e%2e/admin", None), (), 404, "unknown_route"),
    "absolute": (("GET", "http://127.0.0.1/v1/models", None), (), 404, "unknown_route"),
    "a foreign Host": (("POST", CHAT, b"{}"), [("Host", "evil.test")], 421, "host_not_allowed"),
    "a foreign origin": (("POST", CHAT, b"{}"), [("Origin", "https://evil.test")], 403, "origin_not_allowed"),
    "another site": (("POST", CHAT, b"{}"), [("Sec-Fetch-Site", "cross-site")], 403, "origin_not_allowed"),
    "too large": (("POST", CHAT, b"x" * 101), (), 413, "request_too_large"),
}


@pytest.mark.parametrize(("what", "headers", "status", "code"), REFUSED.values(), ids=REFUSED.keys())
async def test_errors_have_openais_shape(
    what: tuple[str, str, Any], headers: Headers, status: int, code: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    async with running_proxy(config=server_config(max_body=100)) as server:
        answer = await server.ask(*what, headers)
        assert (answer.status, answer.error) == (status, code)
        assert answer.get("X-Should-Retry") == "false"
        assert len(answer.get("X-Proxy-Request-Id") or "") == 32
        assert answer.get("Date")
        assert answer.get("Access-Control-Allow-Origin") is None
        assert (answer.get("Allow") is not None) is (status == 405)
        assert server.transport.sent == []
        assert f'openai_proxy_errors_total{{code="{code}"}} 1.0' in server.metrics.render(server.services, 0).decode()
    assert "Traceback" not in caplog.text


async def test_http_1_0_without_a_host_is_refused() -> None:
    async with running_proxy() as server, raw_connection(server.port) as line:
        line.send(b"GET /v1/models HTTP/1.0\r\n\r\n")
        assert (await line.answer()).error == "host_not_allowed"


@pytest.mark.parametrize("target", ["evil.test:443", "*"])
async def test_targets_that_are_not_paths_are_refused(target: str) -> None:
    async with running_proxy() as server, raw_connection(server.port) as line:
        for method in ("CONNECT", "OPTIONS", "GET"):
            async with raw_connection(server.port) as line:
                line.send(request(method, target))
                assert (await line.answer()).status in (400, 404, 405)


async def test_connections_persist_after_errors() -> None:
    """A refusal keeps the connection, unless the body was refused unread."""
    async with running_proxy(says()) as server, raw_connection(server.port) as line:
        for body in (b"{nope", b"[]", dump(ask())):
            line.send(request(body=body))
            answer = await line.answer()
        assert answer.status == 200


async def test_an_internal_error_is_a_500_without_details(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(*_: object) -> None:
        raise RuntimeError("sk-k1 is broken")

    async with running_proxy(says()) as server:
        monkeypatch.setattr(server.api, "_check_in_flight", fails)
        answer = await server.ask(body=ask())
        assert (answer.status, answer.error) == (500, "internal_error")
        assert b"sk-k1" not in answer.body
        assert "RuntimeError" in caplog.text
        monkeypatch.undo()
        assert (await server.ask(body=ask())).status == 200


async def test_unusual_json_is_sent_unchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    """JSON media types, charsets and odd bodies that an upstream may accept are forwarded unchanged."""
    monkeypatch.setattr(proxy.system.threads, "LARGE", 50)
    bodies: list[tuple[str, bytes]] = [
        ("application/json; charset=utf-8", b'{"model":"gpt-4o","messages":[]}'),
        ("Application/JSON", b'{"model":"gpt-4o","messages":[],"a":1}'),
        ("application/vnd.api+json", b'{"model":"gpt-4o","messages":[],"b":1}'),
        ("application/json", b'{"model":"gpt-4o","x":NaN}'),
        ("application/json", b'{"model":"gpt-4o","x":"\\ud800"}'),
        ("application/json", b'{"model":"gpt-4o","x":' + b"9" * 100 + b"}"),
        ("application/json", b'{"a":' * 5000 + b"1" + b"}" * 5000),
        ("application/json", b'{"model":7,"messages":[]}'),
        ("application/json", b"{}"),
    ]
    async with running_proxy(*[says()] * len(bodies)) as server:
        for content_type, body in bodies:
            answer = await server.ask("POST", CHAT, body, [("Content-Type", content_type)])
            assert answer.status == 200, body[:100]
            assert server.transport.sent[-1].body == body


# --- clients ----------------------------------------------------------------------------------------------------------


def client_key(name: str) -> ClientKeySettings:
    return ClientKeySettings(name, hashlib.sha256(f"key-of-{name}".encode()).digest())


async def test_requests_need_a_client_key_if_one_is_set() -> None:
    config = server_config(client_keys=(client_key("a"), client_key("b")))
    async with running_proxy(says(), says(), config=config) as server:

        async def asked(*headers: tuple[str, str]) -> Answer:
            return await server.ask(body=ask(), headers=headers)

        nobody = await asked()
        assert (nobody.status, nobody.error, nobody.get("WWW-Authenticate")) == (401, "invalid_client_key", "Bearer")
        assert (await asked(("Authorization", "Bearer nope"))).status == 401
        mine = await asked(("Authorization", "Bearer key-of-a"))
        assert (mine.get("X-Proxy-Cache"), mine.get("X-Proxy-Cache-Key")) == ("miss", None)
        assert server.receipts[0].client == "a"
        theirs = await asked(("api-key", "key-of-b"))
        assert theirs.get("X-Proxy-Cache") == "miss"
        for _ in range(2):
            hit = await asked(("Authorization", "Bearer key-of-a"))
            assert (hit.get("X-Proxy-Cache"), hit.get("X-Proxy-Cache-Key")) == ("hit", None)
        receipt = server.services.receipts.get(hit.get("X-Proxy-Request-Id") or "")
        assert receipt is not None
        assert receipt.client == "a"


async def test_hits_need_a_client_key_too() -> None:
    async with running_proxy(says(), config=server_config(client_keys=(client_key("a"),))) as server:
        for _ in range(3):
            assert (await server.ask(body=ask(), headers=[("Authorization", "Bearer key-of-a")])).status == 200
        assert (await server.ask(body=ask())).status == 401


# --- browsers ---------------------------------------------------------------------------------------------------------

APP = "http://app.test"


async def browser(server: RunningProxy, method: str, *headers: tuple[str, str], body: Any = None) -> Answer:
    return await server.ask(method, CHAT, body, [("Origin", APP), *headers])


async def test_an_allowed_origin_gets_cors_headers() -> None:
    async with running_proxy(says(), error(400), streams(), config=server_config(allowed_origins=(APP,))) as server:
        answers = [await browser(server, "POST", body=ask()) for _ in range(3)]
        answers += [await browser(server, "POST", body=ask("b")), await browser(server, "POST", body=b"{nope")]
        answers += [await browser(server, "POST", body=ask(stream=True))]
        assert [answer.status for answer in answers] == [200, 200, 200, 400, 400, 200]
        for answer in answers:
            assert answer.get("Access-Control-Allow-Origin") == APP
            assert answer.get("Vary") == "Origin"
            assert "X-Proxy-Cost-USD" in (answer.get("Access-Control-Expose-Headers") or "")
            assert answer.get("Access-Control-Allow-Credentials") is None


async def test_what_sdks_retry_by_is_exposed() -> None:
    limited = error(429, "rate_limit_exceeded", [("Retry-After", "99"), ("x-ratelimit-remaining-tokens", "0")])
    async with running_proxy(limited, config=server_config(allowed_origins=(APP,))) as server:
        answer = await browser(server, "POST", ("X-Proxy-Max-Retries", "0"), body=ask())
        assert answer.status == 429
        exposed = [name.lower() for name in (answer.get("Access-Control-Expose-Headers") or "").split(", ")]
        read = ["retry-after", "retry-after-ms", "x-should-retry", "server-timing", "openai-processing-ms"]
        kinds = ("limit", "remaining", "reset")
        read += [f"x-ratelimit-{kind}-{unit}" for kind in kinds for unit in ("requests", "tokens")]
        assert set(read) <= set(exposed)
        assert {name.lower() for name, _ in answer.headers if name.startswith("X-")} <= set(exposed)


@pytest.mark.parametrize("origin", ["vscode-webview://1h4k0nb8jvq2", "null"])
async def test_editors_and_pages_without_an_origin_may_call_if_the_settings_say_so(origin: str) -> None:
    config = server_config(allowed_origins=("vscode-webview://*", "null"))
    async with running_proxy(says(), config=config) as server:
        headers = [("Origin", origin), ("Sec-Fetch-Site", "cross-site")]
        answer = await server.ask(body=ask(), headers=headers)
        assert (answer.status, answer.get("Access-Control-Allow-Origin")) == (200, origin)
        preflight = await server.ask("OPTIONS", CHAT, headers=[*headers, ("Access-Control-Request-Method", "POST")])
        assert (preflight.status, preflight.get("Access-Control-Allow-Origin")) == (204, origin)
        foreign = await server.ask(body=ask(), headers=[("Origin", "https://evil.test")])
        assert (foreign.status, foreign.get("Access-Control-Allow-Origin")) == (403, None)


async def test_a_page_may_call_a_proxy_in_its_private_network() -> None:
    async with running_proxy(config=server_config(allowed_origins=(APP,))) as server:
        asked = ("Access-Control-Request-Private-Network", "true")
        answer = await browser(server, "OPTIONS", asked)
        assert answer.get("Access-Control-Allow-Private-Network") == "true"
        assert (await browser(server, "OPTIONS")).get("Access-Control-Allow-Private-Network") is None


async def test_forwarded_responses_get_cors_headers() -> None:
    async with running_proxy(says(), config=server_config(allowed_origins=(APP,))) as server:
        answer = await server.ask("GET", "/v1/models", headers=[("Origin", APP)])
        assert answer.get("Access-Control-Allow-Origin") == APP


async def test_a_preflight_is_answered() -> None:
    async with running_proxy(config=server_config(allowed_origins=(APP,), client_keys=(client_key("a"),))) as server:
        wanted = ("Access-Control-Request-Headers", "authorization, content-type,, x y, <b>, x-stainless-os")
        answer = await browser(server, "OPTIONS", ("Access-Control-Request-Method", "POST"), wanted)
        assert (answer.status, answer.get("Access-Control-Allow-Origin")) == (204, APP)
        assert answer.get("Access-Control-Allow-Headers") == "authorization, content-type, x-stainless-os"
        assert "POST" in (answer.get("Access-Control-Allow-Methods") or "")
        assert answer.get("Access-Control-Max-Age") == "600"
        assert (await browser(server, "OPTIONS")).get("Access-Control-Allow-Headers") is None
        assert server.transport.sent == []


async def test_no_cors_headers_without_an_origin() -> None:
    async with running_proxy(
        says(headers=[("Access-Control-Allow-Origin", "*")]), config=server_config(allowed_origins=(APP,))
    ) as server:
        for _ in range(3):
            answer = await server.ask(body=ask())
            assert not [name for name, _ in answer.headers if name.lower().startswith("access-control")]
