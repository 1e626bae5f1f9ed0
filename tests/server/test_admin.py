"""The admin routes: probes, status, keys and receipts; who may see them, and that they contain no secret."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest
from aiohttp.web import BaseRequest

from proxy import __version__
from proxy.config.secret import Secret
from proxy.config.settings import CacheSettings, ClientKeySettings, ServerSettings, UpstreamSettings
from proxy.protocol.errors import ProxyError
from proxy.server.responses import error_response
from tests.pipeline.fixture import ask, pool, settings
from tests.pipeline.script import HANG, Responds, error, rate_limited, says, streams
from tests.server.kit import Answer, RunningProxy, raw_connection, request, running_proxy, served, until

pytestmark = pytest.mark.slow

GUARDED = ["/metrics", "/_proxy/status", "/_proxy/keys", "/_proxy/requests/x", "/_proxy/runs/x"]
ADMIN = [("Authorization", "Bearer the-admin-key")]


def client_key(name: str) -> ClientKeySettings:
    return ClientKeySettings(name, hashlib.sha256(f"key-of-{name}".encode()).digest())


def bearer(name: str) -> list[tuple[str, str]]:
    return [("Authorization", f"Bearer key-of-{name}")]


def server_config(**fields: Any) -> Any:
    return replace(settings(), server=ServerSettings(**fields))


# --- probes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/healthz", "/readyz"])
@pytest.mark.parametrize("host", ["127.0.0.1", "10.1.2.3:8484", "anything"])
async def test_probes_need_no_key_and_accept_any_host(path: str, host: str) -> None:
    async with running_proxy(config=server_config(client_keys=(client_key("a"),), admin_key=Secret("x"))) as server:
        answer = await server.ask("GET", path, headers=[("Host", host)])
        assert (answer.status, answer.get("Content-Type")) == (200, "application/json")
        assert answer.json() == {"status": "ok" if path == "/healthz" else "ready"}
        assert answer.get("Cache-Control") == "no-store"
        assert (await server.ask("HEAD", path)).status == 200
        assert server.transport.sent == []


async def test_while_draining_healthz_is_200_and_readyz_503() -> None:
    async with running_proxy() as server:
        server.in_flight.draining = True
        assert (await server.ask("GET", "/healthz")).status == 200
        answer = await server.ask("GET", "/readyz")
        assert (answer.status, answer.json()) == (503, {"status": "draining"})
        assert (await server.ask("GET", "/_proxy/status")).json()["state"] == "draining"


@pytest.mark.parametrize("path", ["/healthz", "/metrics", "/_proxy/status"])
@pytest.mark.parametrize("method", ["POST", "DELETE", "OPTIONS"])
async def test_admin_pages_allow_only_get_and_head(path: str, method: str) -> None:
    async with running_proxy() as server:
        answer = await server.ask(method, path)
        assert (answer.status, answer.error, answer.get("Allow")) == (405, "method_not_allowed", "GET, HEAD")


@pytest.mark.parametrize(
    "path", ["/_proxy/", "/_proxy/nothing", "/_proxy/requests", "/_proxy/requests/", "/_proxy/keys/"]
)
async def test_unknown_admin_routes_are_404(path: str) -> None:
    async with running_proxy() as server:
        assert (await server.ask("GET", f"/_proxy/{path}")).error == "unknown_route"


# --- access -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", GUARDED)
async def test_admin_pages_need_the_admin_key_if_one_is_set(path: str) -> None:
    async with running_proxy(config=server_config(admin_key=Secret("the-admin-key"))) as server:
        for headers in ([], [("Authorization", "Bearer wrong")], [("api-key", "the-admin-key")]):
            answer = await server.ask("GET", path, headers=headers)
            assert (answer.status, answer.error) == (401, "invalid_client_key")
            assert "the-admin-key" not in str(answer)
        answer = await server.ask("GET", path, headers=ADMIN)
        assert answer.status == (404 if path.endswith("/x") else 200)


@pytest.mark.parametrize("path", GUARDED)
async def test_admin_pages_refuse_foreign_hosts_and_origins(path: str) -> None:
    async with running_proxy() as server:
        assert (await server.ask("GET", path, headers=[("Host", "evil.test")])).error == "host_not_allowed"
        assert (await server.ask("GET", path, headers=[("Origin", "http://evil.test")])).error == "origin_not_allowed"
        assert (await server.ask("GET", path, headers=[("Sec-Fetch-Site", "cross-site")])).status == 403


# --- status and keys --------------------------------------------------------------------------------------------------


async def test_status_shows_the_state_without_secrets() -> None:
    config = settings(pool("k1", "k2"))
    config = replace(config, server=ServerSettings(admin_key=Secret("the-admin-key"), client_keys=(client_key("a"),)))
    async with running_proxy(rate_limited("60"), says(), config=config) as server:
        server.in_flight.address = "http://127.0.0.1:1"
        assert (await server.ask(body=ask(), headers=bearer("a"))).status == 200
        answer = await server.ask("GET", "/_proxy/status", headers=ADMIN)
        status = answer.json()
        assert (status["version"], status["address"], status["state"]) == (__version__, "http://127.0.0.1:1", "ready")
        assert (status["pass_through"], status["in_flight"], status["queue"]) == (False, 1, {"waiting": 0})
        assert status["keys"]["cooling"] == 1
        assert status["cache"]["entries"] == 1
        assert len(status["prices"]["as_of"]) == 10
        assert str(status["settings"]["server"]["port"]) == "8484"
        for secret in (b"sk-k1", b"sk-k2", b"the-admin-key", b"key-of-a", client_key("a").digest.hex().encode()):
            assert secret not in answer.body


async def test_status_without_a_cache_and_without_keys() -> None:
    config = replace(settings(UpstreamSettings(base_url="http://up.test/v1")), cache=CacheSettings(backend="off"))
    async with running_proxy(config=config) as server:
        status = (await server.ask("GET", "/_proxy/status")).json()
        assert (status["cache"], status["pass_through"]) == (None, True)


async def test_the_keys_page_shows_labels_and_states() -> None:
    async with running_proxy(error(401), rate_limited("60"), says(), config=settings(pool("k1", "k2", "k3"))) as server:
        assert (await server.ask(body=ask())).status == 200
        rows = {row["name"]: row for row in (await server.ask("GET", "/_proxy/keys")).json()["keys"]}
        assert [rows[name]["state"] for name in ("k1", "k2", "k3")] == ["rejected", "ready", "ready"]
        [cooling] = rows["k2"]["states"]
        assert (cooling["model"], cooling["state"]) == ("gpt-4o", "cooling")
        assert cooling["reason"] == "429 rate_limit_exceeded"
        assert 59 < cooling["until_s"] <= 60
        assert rows["k3"]["limits"]["gpt-4o"]["rpm"] == {"limit": 1000, "used": 1}
        assert "sk-" not in str(rows)


# --- receipts ---------------------------------------------------------------------------------------------------------


async def test_every_kind_of_response_has_a_receipt() -> None:
    async with running_proxy(says(), error(400), streams()) as server:

        async def told(answer: Answer) -> dict[str, Any]:
            id_ = answer.get("X-Proxy-Request-Id")
            receipt = (await server.ask("GET", f"/_proxy/requests/{id_}")).json()
            assert receipt["id"] == id_
            return dict(receipt)

        miss = await told(await server.ask(body=ask()))
        assert (miss["cache"], miss["cost_usd"], miss["saved_usd"]) == ("miss", "0.002250", "0.000000")
        assert (miss["prompt_tokens"], miss["completion_tokens"]) == (100, 200)
        hit = await told(await server.ask(body=ask()))
        assert (hit["cache"], hit["cost_usd"], hit["saved_usd"]) == ("hit", "0.000000", "0.002250")
        assert (hit["cost_status"], hit["model"], hit["attempts"]) == ("exact", "gpt-4o", 0)
        failed = await told(await server.ask(body=ask("b")))
        assert (failed["status"], failed["error"], failed["cost_usd"]) == (400, "upstream_400", None)
        stream = await told(await server.ask(body=ask("c", stream=True)))
        assert (stream["stream"], stream["cost_usd"], stream["cost_status"]) == (True, "0.002250", "exact")


async def test_a_receipt_is_shown_only_to_its_client() -> None:
    """Other clients get 404 instead of 403, so they do not learn that it exists."""
    keys = (client_key("a"), client_key("b"))
    config = server_config(client_keys=keys, admin_key=Secret("the-admin-key"))
    async with running_proxy(says(), config=config) as server:
        id_ = (await server.ask(body=ask(), headers=bearer("a"))).get("X-Proxy-Request-Id")
        target = f"/_proxy/requests/{id_}"
        assert (await server.ask("GET", target, headers=bearer("a"))).json()["client"] == "a"
        assert (await server.ask("GET", target, headers=ADMIN)).status == 200
        other = await server.ask("GET", target, headers=bearer("b"))
        none = await server.ask("GET", "/_proxy/requests/" + "0" * 32, headers=bearer("b"))
        assert (other.status, none.status) == (404, 404)
        assert (await server.ask("GET", target)).status == 401


async def test_in_pass_through_receipts_need_the_admin_key() -> None:
    """Clients have no names in pass-through, so no client owns a receipt."""
    config = replace(
        settings(UpstreamSettings(base_url="http://up.test/v1")),
        server=ServerSettings(admin_key=Secret("the-admin-key")),
    )
    async with running_proxy(says(), config=config) as server:
        id_ = (await server.ask(body=ask(), headers=[("Authorization", "Bearer mine")])).get("X-Proxy-Request-Id")
        assert (
            await server.ask("GET", f"/_proxy/requests/{id_}", headers=[("Authorization", "Bearer mine")])
        ).status == 401
        assert (await server.ask("GET", f"/_proxy/requests/{id_}", headers=ADMIN)).status == 200


async def test_a_receipt_with_a_model_that_is_not_utf_8() -> None:
    """A lone surrogate is valid in JSON but not in UTF-8; receipts and logs must not fail on it."""
    async with running_proxy(says()) as server:
        answer = await server.ask(body=b'{"model":"\\ud800","messages":[]}')
        assert answer.status == 200
        receipt = await server.ask("GET", f"/_proxy/requests/{answer.get('X-Proxy-Request-Id')}")
        assert receipt.status == 200
        assert receipt.json()["status"] == 200


async def test_a_response_with_a_model_that_is_not_utf_8() -> None:
    odd = b'{"model":"\\ud800","choices":[{"index":0,"message":{"content":"a"},"finish_reason":"stop"}]}'
    async with running_proxy(Responds(body=(odd,))) as server:
        for _ in range(2):
            answer = await server.ask(body=ask())
            assert answer.body == odd
            assert (await server.ask("GET", f"/_proxy/requests/{answer.get('X-Proxy-Request-Id')}")).status == 200


# --- the listener server.ops ------------------------------------------------------------------------------------------


@asynccontextmanager
async def probes(server: RunningProxy) -> AsyncIterator[int]:
    async def handle(request: BaseRequest) -> Any:
        try:
            return await server.admin.handle_probe(request, request.raw_path.partition("?")[0])
        except ProxyError as refusal:
            return error_response(request, refusal, "id", b"")

    async with served(handle) as port:
        yield port


async def test_the_ops_listener_serves_only_probes_and_metrics() -> None:
    async with (
        running_proxy(config=server_config(admin_key=Secret("x"))) as server,
        probes(server) as port,
        raw_connection(port) as line,
    ):

        async def get(target: str, method: str = "GET") -> Answer:
            line.send(request(method, target, headers=[("Host", "10.0.0.7")]))
            return await line.answer(head=method == "HEAD")

        assert (await get("/healthz")).json() == {"status": "ok"}
        assert (await get("/readyz?verbose")).json() == {"status": "ready"}
        metrics = await get("/metrics")
        assert (metrics.get("Content-Type") or "").startswith("text/plain; version=0.0.4")
        assert b"openai_proxy_in_flight 0.0" in metrics.body
        assert (await get("/healthz", "HEAD")).status == 200
        for target in ("/_proxy/status", "/_proxy/keys", "/v1/models", "/"):
            assert (await get(target)).error == "unknown_route"
        assert (await get("/healthz", "POST")).error == "method_not_allowed"


async def test_probes_are_answered_while_requests_are_in_flight() -> None:
    async with running_proxy(Responds(body=(b"{", HANG))) as server:
        task = asyncio.create_task(server.ask(body=ask()))
        await until(lambda: server.transport.sent)
        assert (await server.ask("GET", "/healthz")).status == 200
        assert (await server.ask("GET", "/_proxy/status")).json()["in_flight"] == 2
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
