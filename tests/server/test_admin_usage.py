"""What the server records in the ledger, and `GET /_proxy/usage`; tests/accounting/ledger tests the file."""

from __future__ import annotations

from typing import Any

import pytest

from proxy.config.settings import ClientKeySettings, ServerSettings
from tests.pipeline.fixture import ask, settings
from tests.pipeline.script import error, says
from tests.server.kit import RunningProxy, running_proxy

pytestmark = pytest.mark.slow


async def sums(server: RunningProxy) -> dict[str, Any]:
    answer = await server.ask("GET", "/_proxy/usage?by=model,client&by=day&since=7d&until=2100-01-01")
    assert answer.status == 200, answer.body
    found: dict[str, Any] = answer.json()["since_start"]
    return found


async def test_every_request_is_counted_once() -> None:
    async with running_proxy(says(), error(404), says()) as server:
        for _ in range(3):
            await server.ask(body=ask())
        await server.ask(body=ask("other"))
        await server.ask("GET", "/v1/models")
        await server.ask(body=b"{")
        await server.ask("GET", "/nowhere")
        found = await sums(server)
        assert (found["requests"], found["hits"], found["errors"]) == (7, 2, 3)
        assert (await sums(server))["requests"] == 7  # the operators' own pages are not counted


async def test_a_hit_has_the_tags_of_its_request_and_not_of_the_stored_one() -> None:
    async with running_proxy(says()) as server:
        await server.ask(body=ask(), headers=[("X-Proxy-Tag", "team:a")])
        hits = [
            await server.ask(body=ask(), headers=[("X-Proxy-Tag", "team:b")]),
            await server.ask(target="/_/tag=team:c/v1/chat/completions", body=ask()),
            await server.ask(target="/_/tag=team:c/v1/chat/completions", body=ask()),  # the fast lane
            await server.ask(body=ask()),
        ]
        assert [hit.get("X-Proxy-Cache") for hit in hits] == ["hit"] * 4
        receipts = [await server.ask("GET", f"/_proxy/requests/{hit.get('X-Proxy-Request-Id')}") for hit in hits]
        assert [receipt.json()["tags"] for receipt in receipts] == [["team:b"], ["team:c"], ["team:c"], []]
        assert sorted(one.tags for one in server.ledger._hits.values()) == [(), ("team:b",), ("team:c",)]


async def test_refused_client_keys_do_not_fill_the_ledger() -> None:
    config = settings(server=ServerSettings(client_keys=(ClientKeySettings("anna", b"x" * 32),)))
    async with running_proxy(config=config) as server:
        for number in range(20):
            got = await server.ask(body=ask(), headers=[("Authorization", f"Bearer stranger-{number}")])
            assert got.status == 401
            await server.ask("GET", f"/nowhere/{number}", headers=[("Host", f"evil-{number}")])
        assert len(server.ledger._refused) == 2
        assert sum(server.ledger._refused.values()) == 40


async def test_the_usage_page_needs_operator_access() -> None:
    async with running_proxy(
        config=settings(server=ServerSettings(client_keys=(ClientKeySettings("anna", b"x" * 32),)))
    ) as server:
        assert (await server.ask("GET", "/_proxy/usage", headers=[("Host", "evil")])).status == 421
        assert (await server.ask("POST", "/_proxy/usage", body={})).status == 405
