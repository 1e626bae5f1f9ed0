"""Browsers, request targets, client keys and secrets (docs/security.md)."""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path

import aiohttp
import pytest

from tests import upstream_answers
from tests.client import Client, ask, raw, raw_request, status_of
from tests.launch import CANARY, Config, Launch, ProxyProcess, run_command, secret, settings
from tests.scripted_upstream import ScriptedUpstream

BODY = b'{"model":"gpt-4o","messages":[{"role":"user","content":"raw"}]}'
JSON = {"Content-Type": "application/json"}


def assert_no_cors(headers: object) -> None:
    assert "access-control" not in str(headers).lower()


# Browsers.


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8484", "127.0.0.1.evil.example", "127.0.0.1@evil.example"]
)
async def test_a_foreign_host_is_421(proxy: ProxyProcess, upstream: ScriptedUpstream, host: str) -> None:
    for target, body in (("/v1/chat/completions", BODY), ("/_proxy/status", b""), ("/metrics", b"")):
        answer = await raw(proxy, raw_request("POST" if body else "GET", target, JSON if body else {}, body, host))
        assert status_of(answer) == 421, answer
        assert b"host_not_allowed" in answer
        assert b"server.allowed_hosts" in answer
        assert_no_cors(answer)
    assert upstream.count == 0


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "[::1]"])
async def test_loopback_host_names_are_accepted_with_any_port(proxy: ProxyProcess, client: Client, host: str) -> None:
    for name in (host, f"{host}:{proxy.port}"):
        assert (await client.get(proxy, "/v1/models", Host=name)).status == 200


async def test_no_host_or_two_are_refused(proxy: ProxyProcess, upstream: ScriptedUpstream) -> None:
    for head in (b"", b"Host: 127.0.0.1\r\nHost: evil.example\r\n"):
        answer = await raw(proxy, b"GET /v1/models HTTP/1.1\r\n" + head + b"\r\n")
        assert status_of(answer) in (0, 400, 421)
    assert upstream.count == 0


async def test_extra_hosts_can_be_allowed(launch: Launch, upstream: ScriptedUpstream, client: Client) -> None:
    proxy = launch(settings(upstream.port, server={"allowed_hosts": ["proxy.internal"]}))
    assert (await client.get(proxy, "/v1/models", Host="proxy.internal:8484")).status == 200
    assert (await client.get(proxy, "/v1/models", Host="other.internal")).error == "host_not_allowed"


FOREIGN = [
    {"Origin": "https://evil.example"},
    {"Origin": "null"},
    {"Origin": "http://localhost.evil.example"},
    {"Sec-Fetch-Site": "cross-site"},
]


@pytest.mark.parametrize("headers", FOREIGN, ids=str)
async def test_a_foreign_page_is_403(
    proxy: ProxyProcess, upstream: ScriptedUpstream, client: Client, headers: dict[str, str]
) -> None:
    for answer in (
        await client.send(proxy, ask(), headers),
        await client.get(proxy, "/v1/models", **headers),
    ):
        assert (answer.status, answer.error) == (403, "origin_not_allowed")
        assert_no_cors(answer.headers)
    preflight = headers | {"Access-Control-Request-Method": "POST"}
    answer = await client.send(proxy, None, preflight, method="OPTIONS")
    assert answer.status == 403
    assert_no_cors(answer.headers)
    assert upstream.count == 0


async def test_not_every_sec_fetch_header_is_a_foreign_page(proxy: ProxyProcess, client: Client) -> None:
    """Node's fetch sends `sec-fetch-mode: cors`."""
    headers = {"sec-fetch-mode": "cors", "accept-language": "*"}
    assert (await client.send(proxy, ask(), headers)).status == 200


async def test_an_allowed_origin_gets_cors(launch: Launch, upstream: ScriptedUpstream, client: Client) -> None:
    origin = "https://app.example"
    proxy = launch(settings(upstream.port, server={"allowed_origins": [origin]}))
    ask_first = {
        "Origin": origin,
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "x-a",
    }
    preflight = await client.send(proxy, None, ask_first, method="OPTIONS")
    assert preflight.status in (200, 204)
    assert preflight.headers["Access-Control-Allow-Origin"] == origin
    assert "POST" in preflight.headers["Access-Control-Allow-Methods"]
    assert upstream.count == 0
    question = ask()
    for _ in range(2):
        answer = await client.send(proxy, question, {"Origin": origin, "Sec-Fetch-Site": "cross-site"})
        assert answer.status == 200
        assert answer.headers.getall("Access-Control-Allow-Origin") == [origin]
        assert "origin" in answer.headers["Vary"].lower()
        assert "X-Proxy-Cache" in answer.headers["Access-Control-Expose-Headers"]
    assert (await client.send(proxy, ask(), {"Origin": "https://evil.example"})).status == 403


async def test_no_answer_has_cors_headers(proxy: ProxyProcess, client: Client) -> None:
    question = ask()
    answers = [await client.send(proxy, question) for _ in range(2)]
    answers += [
        await client.get(proxy, "/nope"),
        await client.send(proxy, b"{"),
        await client.get(proxy, "/healthz"),
    ]
    for answer in answers:
        assert_no_cors(answer.headers)


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=b"])
async def test_simple_requests_of_browsers_are_refused(
    proxy: ProxyProcess, upstream: ScriptedUpstream, client: Client, kind: str
) -> None:
    """Pages may send these types without a preflight: their origin gives them away, and a form holds no JSON."""
    answer = await client.send(proxy, BODY, {"Content-Type": kind, "Origin": "https://evil.test"})
    assert (answer.status, answer.error) == (403, "origin_not_allowed")
    answer = await client.send(proxy, b"a=b", {"Content-Type": kind})
    assert (answer.status, answer.error) == (415, "unsupported_media_type")
    assert answer.headers["X-Should-Retry"] == "false"
    assert upstream.count == 0


async def test_json_with_a_charset_is_json(proxy: ProxyProcess, client: Client) -> None:
    answer = await client.send(proxy, ask(), {"Content-Type": "application/json; charset=utf-8"})
    assert answer.status == 200


# Targets.

BAD_PATHS = [
    "/v1/../admin",
    "/v1/files/..",
    "/../v1/models",
    "/v1//models",
    "//v1/models",
    "//evil.example/v1/models",
    "/v1/%2e%2e/models",
    "/v1/%2E%2E/models",
    "/v1/.%2e/models",
    "/v1/files/a%2fb",
    "/v1/files/a%2Fb",
    "/v1/files/a\\b",
    "/v1/files/a%5cb",
    "/v1/files/a%5Cb",
    "/openai/deployments/..%2f..%2fx/chat/completions?api-version=1",
    "/_/ttl=1h/v1/../models",
    "/_/ttl=1h//v1/models",
]


@pytest.mark.parametrize("path", BAD_PATHS)
async def test_paths_that_would_leave_the_base_url_are_refused(
    proxy: ProxyProcess, upstream: ScriptedUpstream, path: str
) -> None:
    for request in (raw_request("GET", path), raw_request("POST", path, JSON, BODY)):
        assert 400 <= status_of(await raw(proxy, request)) < 500
    assert upstream.count == 0


async def test_the_query_may_hold_anything(proxy: ProxyProcess, upstream: ScriptedUpstream) -> None:
    target = "/v1/files?after=../x//y&z=%2f%2e%5c"
    assert status_of(await raw(proxy, raw_request("GET", target))) == 200
    assert upstream.last.target == target


@pytest.mark.parametrize("authority", ["evil.example", "127.0.0.1:{port}", "user@evil.example:80"])
async def test_absolute_form_is_refused(proxy: ProxyProcess, upstream: ScriptedUpstream, authority: str) -> None:
    target = f"http://{authority.format(port=proxy.port)}/v1/models"
    assert 400 <= status_of(await raw(proxy, raw_request("GET", target))) < 500
    assert upstream.count == 0


@pytest.mark.parametrize(("method", "target"), [("TRACE", "/v1/models"), ("TRACE", "/healthz"), ("CONNECT", "a.b:443")])
async def test_trace_and_connect_are_405(
    proxy: ProxyProcess, upstream: ScriptedUpstream, method: str, target: str
) -> None:
    assert status_of(await raw(proxy, raw_request(method, target))) == 405
    assert upstream.count == 0


async def test_a_request_with_two_lengths_is_refused(proxy: ProxyProcess, upstream: ScriptedUpstream) -> None:
    inner = b"POST /v1/files HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 0\r\n\r\n"
    both = {"Transfer-Encoding": "chunked", "Content-Length": "4", "Content-Type": "text/csv"}
    answer = await raw(proxy, raw_request("POST", "/v1/files", both) + b"0\r\n\r\n" + inner)
    assert status_of(answer) in (0, 400)
    twice = b"POST /v1/files HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab"
    assert status_of(await raw(proxy, twice)) in (0, 400)
    assert upstream.count == 0


async def test_line_breaks_in_options_are_refused(proxy: ProxyProcess, upstream: ScriptedUpstream) -> None:
    path = "/_/tag=a:b%0d%0aX-Injected:1/v1/models"
    answer = await raw(proxy, raw_request("GET", path))
    assert 400 <= status_of(answer) < 500
    assert b"\r\nX-Injected" not in answer
    assert upstream.count == 0


# Client keys.


def guarded(port: int, **server: object) -> Config:
    return settings(port, server={"client_keys": [{"name": "anna", "key": secret("anna")}], **server})


WRONG: dict[str, dict[str, str]] = {
    "none": {},
    "wrong": {"Authorization": f"Bearer {secret('other')}"},
    "other case": {"Authorization": f"Bearer {secret('anna').upper()}"},
    "prefix": {"Authorization": f"Bearer {secret('anna')[:-1]}"},
    "empty": {"Authorization": "Bearer "},
    "another scheme": {"Authorization": f"Token {secret('anna')}"},
    "wrong api-key": {"api-key": "nope"},
    "the pool's": {"Authorization": f"Bearer {secret('k1')}"},
    "not ASCII": {"Authorization": "Bearer ключ"},
}


async def test_every_bad_client_key_gets_the_same_401(
    launch: Launch, upstream: ScriptedUpstream, client: Client
) -> None:
    proxy, question = launch(guarded(upstream.port)), ask()
    good = {"Authorization": f"Bearer {secret('anna')}"}
    assert (await client.send(proxy, question, good)).status == 200
    bodies = set()
    for name, headers in WRONG.items():
        answer = await client.send(proxy, question, headers)  # also where the cache could answer
        assert (answer.status, answer.error) == (401, "invalid_client_key"), name
        assert answer.headers["X-Should-Retry"] == "false"
        bodies.add(answer.body)
        for path in ("/v1/models", "/openai/v1/models"):
            assert (await client.send(proxy, None, headers, path)).status in (401, 403), (name, path)
    assert len(bodies) == 1
    assert upstream.count == 1


async def test_a_client_key_opens_and_stays_here(launch: Launch, upstream: ScriptedUpstream, client: Client) -> None:
    proxy = launch(guarded(upstream.port))
    for headers in ({"Authorization": f"Bearer {secret('anna')}"}, {"api-key": secret("anna")}):
        assert (await client.send(proxy, ask(), headers)).status == 200
        assert upstream.last.all("authorization") == [f"Bearer {secret('k1')}"]
        assert upstream.last.header("api-key") is None
    for path in ("/healthz", "/readyz"):
        assert (await client.get(proxy, path)).status == 200


async def test_client_keys_by_digest_and_environment(
    launch: Launch, upstream: ScriptedUpstream, client: Client
) -> None:
    digest = hashlib.sha256(secret("anna").encode()).hexdigest()
    config = settings(upstream.port, server={"client_keys": [{"name": "anna", "key_sha256": digest}]})
    by_digest = launch(config)
    by_env = launch(settings(upstream.port), {"PROXY_CLIENT_KEYS": f"anna:{secret('anna')},ben:{secret('ben')}"})
    for proxy in (by_digest, by_env):
        assert (await client.send(proxy, ask(), {"api-key": secret("anna")})).status == 200
        assert (await client.send(proxy, ask())).error == "invalid_client_key"
    assert (await client.send(by_env, ask(), {"api-key": secret("ben")})).status == 200


async def test_two_credentials_are_not_a_choice(launch: Launch, upstream: ScriptedUpstream) -> None:
    proxy = launch(guarded(upstream.port))
    lines = f"Authorization: Bearer {secret('anna')}\r\nAuthorization: Bearer nope\r\n"
    head = f"GET /v1/models HTTP/1.1\r\nHost: 127.0.0.1\r\n{lines}\r\n"
    assert status_of(await raw(proxy, head.encode())) in (0, 400, 401)
    assert upstream.count == 0


async def test_an_admin_key_guards_metrics_and_admin(
    launch: Launch, upstream: ScriptedUpstream, client: Client
) -> None:
    proxy = launch(settings(upstream.port, server={"admin_key": secret("admin")}))
    basic = base64.b64encode(f"prometheus:{secret('admin')}".encode()).decode()
    good = [{"Authorization": f"Bearer {secret('admin')}"}, {"Authorization": f"Basic {basic}"}]
    for path in ("/metrics", "/_proxy/status", "/_proxy/keys"):
        assert [(await client.send(proxy, None, h, path)).status for h in good] == [200, 200]
        for headers in ({}, {"Authorization": "Bearer nope"}, {"Authorization": "Basic nope"}):
            assert (await client.send(proxy, None, headers, path)).status in (401, 403)
    assert (await client.send(proxy, ask())).status == 200


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_another_address_without_client_keys_is_refused(tmp_path: Path, host: str) -> None:
    done = run_command(tmp_path, ["serve", "--host", host, "--port", "0"], settings(1))
    assert done.returncode == 2
    assert "client_keys" in done.stderr


# Secrets.


async def test_a_pool_key_in_an_upstream_answer_is_masked(
    launch: Launch, upstream: ScriptedUpstream, client: Client
) -> None:
    proxy, key = launch(settings(upstream.port, ("k1", "k2"))), secret("k1")
    cases = [
        upstream_answers.error(400, f"Bad request with {key}.", "bad"),
        upstream_answers.unauthorized(key),
        upstream_answers.chat(f"see {key}"),
    ]
    cases.append(upstream_answers.reply(200, upstream_answers.completion(), {"X-Echo": key, "x-request-id": key}))
    for step in cases:
        upstream.always(step)
        question = ask()
        for _ in range(2):
            answer = await client.send(proxy, question, {"X-Proxy-Max-Retries": "0"})
            assert key not in answer.body.decode() + str(answer.headers)
            assert answer.cache != "hit"


async def test_keys_are_on_no_page(launch: Launch, upstream: ScriptedUpstream, client: Client) -> None:
    """The log is searched after every test, at level debug."""
    proxy = launch(guarded(upstream.port, admin_key=secret("admin")))
    mine, admin = {"api-key": secret("anna")}, {"Authorization": f"Bearer {secret('admin')}"}
    upstream.queue("/v1/chat/completions", upstream_answers.unauthorized(), upstream_answers.server_error())
    pages = [await client.send(proxy, ask(), mine) for _ in range(3)]
    pages += [await client.send(proxy, ask(), {"api-key": secret("wrong")})]
    pages += [await client.send(proxy, None, admin, path) for path in ("/metrics", "/_proxy/status", "/_proxy/keys")]
    request_id = pages[1].headers["X-Proxy-Request-Id"]
    pages.append(await client.send(proxy, None, mine, f"/_proxy/requests/{request_id}"))
    for page in pages:
        assert CANARY.search(page.body.decode() + str(page.headers)) is None


async def test_a_receipt_is_shown_to_the_client_that_made_the_request(
    launch: Launch, upstream: ScriptedUpstream, client: Client
) -> None:
    keys = [{"name": name, "key": secret(name)} for name in ("anna", "ben")]
    proxy = launch(settings(upstream.port, server={"client_keys": keys, "admin_key": secret("admin")}))
    anna, ben = ({"api-key": secret(name)} for name in ("anna", "ben"))
    answer = await client.send(proxy, ask(), anna)
    request_id = answer.headers["X-Proxy-Request-Id"]
    assert (await client.receipt(proxy, request_id, anna))["id"] == request_id
    assert (await client.send(proxy, None, ben, f"/_proxy/requests/{request_id}")).status in (401, 403, 404)


async def test_a_refused_upload_does_not_break_the_connection_for_the_next(
    proxy: ProxyProcess, upstream: ScriptedUpstream
) -> None:
    """An unread body must not be taken for the next request."""
    refused = raw_request(
        "POST", "/v1/chat/completions", {"Content-Type": "text/plain"}, b"GET /v1/x HTTP/1.1\r\n" * 50
    )
    answer = await raw(proxy, refused + raw_request("GET", "/v1/models"))
    assert status_of(answer) == 415
    assert all(request.target != "/v1/x" for request in upstream.requests)
    async with aiohttp.ClientSession() as session, session.get(proxy.address + "/v1/models") as fresh:
        assert fresh.status == 200
