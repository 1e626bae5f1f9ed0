"""Log lines of requests: one for each miss, refusal and error, a sample of the hits, and no key in any."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator
from typing import Any

import pytest

from proxy.cache.entry import Entry
from proxy.config.settings import ClientKeySettings, ServerSettings
from proxy.observability.logs import HitLog, JsonFormatter, TextFormatter, log_receipt
from proxy.protocol.masking import SecretMasker
from tests.pipeline.fixture import ask, pool, settings
from tests.pipeline.script import error, says, streams
from tests.server.kit import RunningProxy, running_proxy

pytestmark = pytest.mark.slow

TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
TRACED = [("traceparent", TRACE)]
SECRET = "client-key-of-alice"
AUTH = ("Authorization", f"Bearer {SECRET}")
CONFIG = settings(
    pool("k1"),
    server=ServerSettings(client_keys=(ClientKeySettings("alice", hashlib.sha256(SECRET.encode()).digest()),)),
)


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> Iterator[list[dict[str, Any]]]:
    """Yield the JSON lines logged so far, parsed, without their times."""
    caplog.set_level(logging.DEBUG, "proxy")
    found: list[dict[str, Any]] = []

    class Catch(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            line = json.loads(JsonFormatter(SecretMasker([])).format(record))
            assert SECRET not in str(line)
            assert "sk-k1" not in str(line)
            found.append({name: value for name, value in line.items() if name not in ("time", "logger")})

    handler = Catch()
    logging.getLogger("proxy.request").addHandler(handler)
    yield found
    logging.getLogger("proxy.request").removeHandler(handler)


def logged(server: RunningProxy) -> None:
    for receipt in server.receipts:
        log_receipt(receipt)


async def test_miss(lines: list[dict[str, Any]]) -> None:
    async with running_proxy(says(), config=CONFIG) as server:
        answer = await server.ask(body=ask(), headers=[*TRACED, AUTH])
        assert server.transport.sent[0].headers.getall("traceparent") == [TRACE]
        logged(server)
    [line] = lines
    times = {name: line.pop(name) for name in ("queue_ms", "total_ms")}
    assert all(0 <= ms < 5000 for ms in times.values())
    assert line == {
        "level": "info",
        "message": "chat gpt-4o -> 200",
        "endpoint": "chat",
        "model": "gpt-4o",
        "status": 200,
        "id": answer.get("X-Proxy-Request-Id"),
        "client": "alice",
        "cache": "miss",
        "reason": "new",
        "upstream": "openai",
        "key": "k1",
        "attempts": 1,
        "tokens": 300,
        "cost_usd": "0.002250",
        "traceparent": TRACE,
    }


async def test_line_of_a_stream_has_time_to_first_byte(lines: list[dict[str, Any]]) -> None:
    async with running_proxy(streams(), config=CONFIG) as server:
        await server.ask(body=ask(stream=True), headers=[AUTH])
        logged(server)
    assert lines[0]["first_byte_ms"] <= lines[0]["total_ms"]


async def test_lines_of_an_error_and_a_passed_through_request(lines: list[dict[str, Any]]) -> None:
    async with running_proxy(error(418), says(), config=CONFIG) as server:
        await server.ask(body=ask(), headers=[*TRACED, AUTH])
        await server.ask("GET", "/v1/models", headers=[*TRACED, AUTH])
        assert [sent.headers["traceparent"] for sent in server.transport.sent] == [TRACE, TRACE]
        logged(server)
    fields_logged = [[line.get(name) for name in ("status", "error", "key", "traceparent", "client")] for line in lines]
    assert fields_logged == [[418, "upstream_418", "k1", TRACE, "alice"], [200, None, "k1", TRACE, "alice"]]


async def test_refusals(lines: list[dict[str, Any]]) -> None:
    async with running_proxy(config=CONFIG) as server:
        one = await server.ask(body=ask(), headers=TRACED)
        two = await server.ask(body=b"{", headers=[AUTH])
        await server.ask("GET", "/nowhere", headers=[("traceparent", "00-nonsense")])
    common = {"level": "info", "status": 401, "error": "invalid_client_key", "traceparent": TRACE}
    message = "refused POST /v1/chat/completions: invalid_client_key"
    assert lines[0] == common | {"message": message, "id": one.get("X-Proxy-Request-Id")}
    assert (lines[1]["client"], lines[1]["error"], lines[1]["id"]) == (
        "alice",
        "invalid_json",
        two.get("X-Proxy-Request-Id"),
    )
    assert (lines[2]["error"], lines[2].get("traceparent")) == ("unknown_route", None)


@pytest.mark.parametrize("sent", ["", "x", "00-nonsense", TRACE.upper(), "00-\xe9", TRACE + "-x"])
async def test_invalid_traceparent_is_forwarded_and_not_logged(sent: str, lines: list[dict[str, Any]]) -> None:
    async with running_proxy(says(), config=CONFIG) as server:
        assert (await server.ask(body=ask(), headers=[("traceparent", sent), AUTH])).status == 200
        logged(server)
    assert "traceparent" not in lines[0]


def entry(model: str = "gpt-4o") -> Entry:
    return Entry("k", "json", 200, (), b"{}", None, 0.0, 60.0, "chat", model, None, None, "0.002250", "", (), False)


def test_one_hit_a_second_is_logged(lines: list[dict[str, Any]]) -> None:
    log = HitLog()
    for n, wall in enumerate([100.0, 100.2, 100.9, 101.0, 101.5, 105.0, 50.0, 50.5]):  # the clock is set back once
        log.hit(f"id-{n}", "alice", entry(), wall, [(b"traceparent", TRACE.encode())])
    assert [(line["id"], line["hits"]) for line in lines] == [("id-0", 1), ("id-3", 3), ("id-5", 2), ("id-6", 1)]
    assert lines[0] == {
        "level": "info",
        "message": "chat gpt-4o -> 200",
        "endpoint": "chat",
        "model": "gpt-4o",
        "status": 200,
        "id": "id-0",
        "client": "alice",
        "cache": "hit",
        "saved_usd": "0.002250",
        "hits": 1,
        "traceparent": TRACE,
    }


async def test_hit_is_logged_by_the_server(lines: list[dict[str, Any]]) -> None:
    async with running_proxy(says(), config=CONFIG) as server:
        answers = [await server.ask(body=ask(), headers=[AUTH]) for _ in range(3)]
    assert len(lines) == 1
    assert (lines[0]["id"], lines[0]["cache"]) == (answers[1].get("X-Proxy-Request-Id"), "hit")


def test_text_line_does_not_repeat_the_message(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "proxy.request")
    HitLog().hit("id-1", "", entry("a\nb" + "x" * 20_000), 1.0, [])
    [record] = caplog.records
    text = TextFormatter(SecretMasker([])).format(record)
    assert len(text) < 300
    assert text[8:].startswith(" info    chat a\\x0ab")
    assert text.endswith("x -> 200  id=id-1 cache=hit saved_usd=0.002250 hits=1")
