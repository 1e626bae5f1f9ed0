"""WebSockets through the proxy, with a real client library and a scripted upstream (docs/routes-and-errors.md)."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from http import HTTPStatus
from typing import Any

import openai
import orjson
import pytest
import websockets
from aiohttp.web import ServerRunner, SockSite
from websockets.asyncio.client import ClientConnection, connect
from websockets.asyncio.server import ServerConnection, serve
from websockets.datastructures import Headers
from websockets.http11 import Request, Response
from websockets.typing import Subprotocol

from proxy.accounting.receipt import Receipt
from proxy.app import App
from proxy.config.limits import Limits
from proxy.config.secret import Secret
from proxy.config.settings import (
    BreakerSettings,
    ClientKeySettings,
    KeySettings,
    RetrySettings,
    ServerSettings,
    Settings,
    UpstreamSettings,
)
from proxy.lifecycle import _drain
from proxy.server.connections import ListeningServer
from proxy.server.listeners import bind
from tests.pipeline.fixture import settings
from tests.pipeline.script import Responds, says
from tests.server.kit import TEST_TIMEOUT, raw_connection, raw_upstream, request, running_proxy, until

pytestmark = pytest.mark.slow

Talk = Callable[[ServerConnection], Awaitable[None]]
Judge = Callable[[Request], int | None]
HANDSHAKE = [
    ("Connection", "Upgrade"),
    ("Upgrade", "websocket"),
    ("Sec-WebSocket-Key", "dGhlIHNhbXBsZSBub25jZQ=="),
    ("Sec-WebSocket-Version", "13"),
]
ACCEPT = "s3pPLMBiTxaQ9kYGzzhZRbK+xOo="
"""The answer to that key (RFC 6455 section 1.3)."""


async def echo(connection: ServerConnection) -> None:
    async for message in connection:
        await connection.send(message)


class Upstream:
    """A WebSocket server. talk: what it does with a connection; judge: a status in place of the handshake, or None."""

    def __init__(self, talk: Talk = echo, judge: Judge = lambda _: None) -> None:
        self.talk = talk
        self.judge = judge
        self.requests: list[Request] = []
        self.closed: list[tuple[int | None, str | None]] = []
        self.port = 0

    async def handle(self, connection: ServerConnection) -> None:
        with suppress(websockets.ConnectionClosed):
            await self.talk(connection)
        await connection.wait_closed()
        self.closed.append((connection.close_code, connection.close_reason))

    def process(self, connection: ServerConnection, request: Request) -> Response | None:
        self.requests.append(request)
        status = self.judge(request)
        if status is None:
            return None
        body = b'{"error": {"message": "No.", "type": "t", "param": null, "code": "no"}}' if status != 204 else b""
        headers = Headers({"Content-Type": "application/json", "Content-Length": str(len(body))})
        return Response(status, HTTPStatus(status).phrase, headers, body)

    def keys(self) -> list[str]:
        return [one.headers.get("Authorization", "").removeprefix("Bearer sk-") for one in self.requests]


class Stage:
    """A proxy before an upstream, both on real sockets."""

    def __init__(self, app: App, server: ListeningServer, upstream: Upstream, port: int) -> None:
        self.app = app
        self.server = server
        self.upstream = upstream
        self.port = port

    def connect(self, target: str = "/v1/realtime?model=gpt-realtime", **more: Any) -> connect:
        more.setdefault("additional_headers", {"Authorization": "Bearer mine"})
        return connect(f"ws://127.0.0.1:{self.port}{target}", max_size=None, open_timeout=TEST_TIMEOUT, **more)

    async def receipt(self) -> Receipt:
        """The newest receipt, after everything has ended."""
        receipts = self.app.services.receipts
        await until(lambda: not self.app.in_flight.requests and receipts._by_id)
        receipt = receipts.get(next(reversed(receipts._by_id)))
        assert receipt is not None
        return receipt


def configured(port: int, *keys: str, **sections: Any) -> Settings:
    pool = tuple(KeySettings(name, Secret(f"sk-{name}"), quota=name) for name in keys)
    upstream = UpstreamSettings(base_url=f"http://127.0.0.1:{port}/v1", keys=pool)
    sections.setdefault("retry", RetrySettings(base_delay=0.01, jitter=0.0))
    return settings(upstream, **sections)


@asynccontextmanager
async def stage(
    upstream: Upstream | None = None,
    keys: Sequence[str] = ("k1",),
    subprotocols: Sequence[str] = (),
    adapt: Callable[[Settings], Settings] = lambda one: one,
    **sections: Any,
) -> AsyncIterator[Stage]:
    """A proxy before a WebSocket server."""
    upstream = upstream or Upstream()
    chosen = [Subprotocol(name) for name in subprotocols] or None
    async with serve(
        upstream.handle, "127.0.0.1", 0, process_request=upstream.process, subprotocols=chosen, max_size=None
    ) as listening:
        upstream.port = listening.sockets[0].getsockname()[1]
        async with before(upstream, adapt(configured(upstream.port, *keys, **sections))) as scene:
            yield scene


@asynccontextmanager
async def before(upstream: Upstream, config: Settings) -> AsyncIterator[Stage]:
    """A proxy with these settings. At the end nothing may be held any more."""
    app = App(config)
    server = ListeningServer(app.handle)
    runner = ServerRunner(server, handle_signals=False, shutdown_timeout=0.1)
    await runner.setup()
    socket = bind("127.0.0.1", 0)
    await SockSite(runner, socket).start()
    try:
        yield Stage(app, server, upstream, socket.getsockname()[1])
        await until(lambda: not app.in_flight.requests)
        assert app.in_flight.streams == {}
    finally:
        await runner.cleanup()
        await app.transport.close()


# Through.


async def test_a_thousand_messages_pass_both_ways() -> None:
    async with stage() as scene, scene.connect() as client:

        async def send() -> None:
            for number in range(1000):
                await client.send(f"message {number}" if number % 2 else number.to_bytes(4, "big"))

        sending = asyncio.create_task(send())
        for number in range(1000):
            expected = f"message {number}" if number % 2 else number.to_bytes(4, "big")
            assert await client.recv() == expected
        await sending
    async with stage() as scene:
        async with scene.connect() as client:
            await client.send("x")
            await client.recv()
        receipt = await scene.receipt()
    assert (receipt.status, receipt.error, receipt.endpoint, receipt.model) == (101, "", "realtime", "gpt-realtime")
    assert (receipt.upstream, receipt.key, receipt.attempts, receipt.cache) == ("openai", "k1", 1, "bypass")
    assert receipt.reason == "uncacheable: websocket"


async def test_messages_of_16_mb_pass_both_ways() -> None:
    message = bytes(range(256)) * 65536
    async with stage() as scene, scene.connect(compression=None) as client:
        await client.send(message)
        assert await client.recv() == message


async def test_a_reader_that_does_not_read_holds_back_the_sender() -> None:
    """Memory is bounded: what the proxy holds is a write buffer, not the message."""
    sent = 0

    async def flood(connection: ServerConnection) -> None:
        nonlocal sent
        for _ in range(400):
            await connection.send(b"x" * 262_144)
            sent += 1

    async with stage(Upstream(flood)) as scene, raw_connection(scene.port) as client:
        client.send(request("GET", "/v1/realtime?model=m", headers=HANDSHAKE))
        await until(lambda: scene.app.in_flight.streams)
        before = -1
        while before != sent:
            before = sent
            await asyncio.sleep(0.2)
        assert sent < 100, "tens of megabytes are held somewhere"
        held = [one.transport.get_write_buffer_size() for one in scene.server.connections if one.transport]
        assert max(held) < 1 << 20
        await client.gone()


async def test_pings_reach_the_other_side_and_pongs_come_back() -> None:
    async with stage() as scene, scene.connect(ping_interval=None) as client:
        assert await (await client.ping(b"are you there")) >= 0


async def test_compression_is_agreed_by_the_two_ends() -> None:
    async with stage() as scene, scene.connect(compression="deflate") as client:
        assert [extension.name for extension in client.protocol.extensions] == ["permessage-deflate"]
        await client.send("a" * 10_000)
        assert await client.recv() == "a" * 10_000
        assert "permessage-deflate" in scene.upstream.requests[0].headers["Sec-WebSocket-Extensions"]


async def test_a_close_by_the_client_reaches_the_upstream_with_its_code() -> None:
    async with stage() as scene:
        client = await scene.connect()
        await client.close(4001, "had enough")
        assert client.close_code == 4001
        await until(lambda: scene.upstream.closed)
        assert scene.upstream.closed == [(4001, "had enough")]
        assert (await scene.receipt()).error == ""


async def test_a_close_by_the_upstream_reaches_the_client_with_its_code() -> None:
    async def leave(connection: ServerConnection) -> None:
        await connection.send("last words")
        await connection.close(1013, "busy")

    async with stage(Upstream(leave)) as scene:
        async with scene.connect() as client:
            assert await client.recv() == "last words"
            with pytest.raises(websockets.ConnectionClosedError):
                await client.recv()
            assert (client.close_code, client.close_reason) == (1013, "busy")
        assert (await scene.receipt()).error == ""


async def test_an_upstream_that_is_cut_off_is_told_to_the_client_and_the_receipt() -> None:
    async def cut(connection: ServerConnection) -> None:
        await connection.recv()
        connection.transport.abort()

    async with stage(Upstream(cut)) as scene:
        async with scene.connect() as client:
            await client.send("go")
            with pytest.raises(websockets.ConnectionClosedError):
                await client.recv()
            assert client.close_code == 1006
        await until(lambda: not scene.app.in_flight.requests)


async def test_a_client_that_vanishes_ends_the_upstream_within_a_second() -> None:
    async with stage() as scene:
        client = await scene.connect()
        client.transport.abort()
        async with asyncio.timeout(1):
            await until(lambda: scene.upstream.closed)


async def test_the_first_frame_may_come_with_the_head() -> None:
    """From either side: what follows a head in the same packet is not lost."""
    received = []

    async def turn(up: Any, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await up.read_request(reader)
        writer.write(
            b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            b"Sec-WebSocket-Accept: " + ACCEPT.encode() + b"\r\n\r\n\x81\x05hello"
        )
        received.append(await reader.readexactly(8))
        writer.write(b"\x88\x00")
        await reader.read()

    frame = b"\x81\x82\0\0\0\0hi"
    async with (
        raw_upstream(turn) as up,
        before(Upstream(), configured(up.port, "k1")) as scene,
        raw_connection(scene.port) as client,
    ):
        client.send(request("GET", "/v1/realtime?model=m", headers=HANDSHAKE) + frame)
        assert (await client.reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 101 ")
        assert await client.reader.readexactly(9) == b"\x81\x05hello\x88\x00"
        client.writer.write_eof()
        assert await client.ended() == b""
    assert received == [frame]


SDK = pytest.mark.skipif(not hasattr(openai.AsyncOpenAI, "realtime"), reason="this SDK is older than the Realtime API")


async def answer_events(connection: ServerConnection) -> None:
    async for message in connection:
        kind = orjson.loads(message)["type"]
        session = {"type": "session.updated", "event_id": "e", "session": {"type": "realtime"}}
        created = {"type": "response.created", "sequence_number": 0, "response": {"id": "resp_1", "output": []}}
        await connection.send(orjson.dumps(session if kind == "session.update" else created).decode())


@SDK
@pytest.mark.parametrize("prefix", ["", "/v1", "/openai/v1", "/_/tag=a:b/v1"])
async def test_the_official_sdk_connects(prefix: str) -> None:
    async with stage(Upstream(answer_events)) as scene:
        client = openai.AsyncOpenAI(api_key="mine", base_url=f"http://127.0.0.1:{scene.port}{prefix}")
        async with client.realtime.connect(model="gpt-realtime") as realtime:
            await realtime.session.update(session={"type": "realtime"})
            assert (await realtime.recv()).type == "session.updated"
        async with client.responses.connect() as responses:
            await responses.send({"type": "response.create", "model": "gpt-4o", "input": "x"})
            assert (await responses.recv()).type == "response.created"
        assert scene.upstream.keys() == ["k1", "k1"]
        await client.close()


@SDK
async def test_the_official_sdk_for_azure_connects() -> None:
    async with stage(Upstream(answer_events)) as scene:
        address = f"127.0.0.1:{scene.port}"
        client = openai.AsyncAzureOpenAI(
            api_key="mine",
            azure_endpoint=f"http://{address}",
            websocket_base_url=f"ws://{address}/openai",
            api_version="2024-10-01-preview",
        )
        async with client.realtime.connect(model="dep") as realtime:
            await realtime.session.update(session={"type": "realtime"})
            assert (await realtime.recv()).type == "session.updated"
        assert [one.path for one in scene.upstream.requests] == ["/v1/realtime?model=dep"]
        await client.close()


async def test_a_close_without_a_code_has_none_on_the_other_side() -> None:
    async def leave(connection: ServerConnection) -> None:
        connection.transport.write(b"\x88\x00")
        await connection.wait_closed()

    async with stage(Upstream(leave)) as scene, scene.connect() as client:
        with pytest.raises(websockets.ConnectionClosed):
            await client.recv()
        assert client.close_code == 1005


async def test_connections_one_after_another_and_at_once() -> None:
    async with stage() as scene:
        for _ in range(20):
            async with scene.connect("/v1/responses") as client:
                await client.send("x")
                assert await client.recv() == "x"
        clients = await asyncio.gather(*[scene.connect() for _ in range(20)])
        await asyncio.gather(*[client.send("x" * 100_000) for client in clients])
        assert [len(await client.recv()) for client in clients] == [100_000] * 20
        await asyncio.gather(*[client.close() for client in clients])


# The handshake.


async def test_the_key_is_the_pools_and_the_handshake_the_clients() -> None:
    async with stage() as scene:
        headers = {
            "Authorization": "Bearer mine",
            "OpenAI-Beta": "realtime=v1",
            "OpenAI-Organization": "org-mine",
            "Cookie": "a=b",
            "X-Proxy-Tag": "team:search",
        }
        async with scene.connect("/v1/realtime?model=gpt-realtime&x=1", additional_headers=headers) as client:
            answer = client.response
            assert answer is not None
            assert answer.headers["X-Proxy-Key"] == "k1"
            assert answer.headers["X-Proxy-Cache"] == "bypass"
            assert "sk-k1" not in str(answer.headers)
        [sent] = scene.upstream.requests
    assert sent.path == "/v1/realtime?model=gpt-realtime&x=1"
    assert sent.headers["Authorization"] == "Bearer sk-k1"
    assert sent.headers["OpenAI-Beta"] == "realtime=v1"
    assert sent.headers["Sec-WebSocket-Version"] == "13"
    for name in ("OpenAI-Organization", "Cookie", "X-Proxy-Tag", "Origin"):
        assert name not in sent.headers


async def test_the_accept_header_is_the_upstreams() -> None:
    async with stage() as scene, raw_connection(scene.port) as client:
        client.send(request("GET", "/v1/responses", headers=HANDSHAKE))
        head = (await client.reader.readuntil(b"\r\n\r\n")).decode().lower()
        assert head.startswith("http/1.1 101 ")
        assert f"sec-websocket-accept: {ACCEPT.lower()}\r\n" in head
        assert "\r\nupgrade: websocket\r\n" in head
        assert "\r\nconnection: upgrade\r\n" in head
        assert "content-length" not in head
        assert "transfer-encoding" not in head


@pytest.mark.parametrize(
    ("target", "sent"),
    [
        ("/v1/realtime?model=m", "/v1/realtime?model=m"),
        ("/realtime?model=m", "/v1/realtime?model=m"),
        ("/v1/responses", "/v1/responses"),
        ("/responses", "/v1/responses"),
        ("/_/tag=a:b/v1/realtime?model=m", "/v1/realtime?model=m"),
        ("/openai/realtime?api-version=2024-10-01-preview&deployment=d", "/v1/realtime?model=d"),
        ("/openai/v1/realtime?model=m", "/v1/realtime?model=m"),
        ("/openai/deployments/d/realtime?api-version=2024-10-01-preview", "/v1/realtime?model=d"),
        ("/openai/v1/responses", "/v1/responses"),
    ],
)
async def test_every_shape_of_the_routes_is_carried(target: str, sent: str) -> None:
    async with stage() as scene:
        async with scene.connect(target) as client:
            await client.send("x")
            assert await client.recv() == "x"
        assert [one.path for one in scene.upstream.requests] == [sent]


@pytest.mark.parametrize(
    ("version", "target", "sent"),
    [
        (None, "/v1/realtime?model=gpt-realtime", "/openai/v1/realtime?model=dep"),
        ("v9", "/v1/realtime?model=gpt-realtime", "/openai/realtime?deployment=dep&api-version=v9"),
        ("v9", "/openai/realtime?api-version=v1&deployment=dep", "/openai/realtime?api-version=v1&deployment=dep"),
    ],
)
async def test_azure_is_asked_in_its_own_shape(version: str | None, target: str, sent: str) -> None:
    def azure(one: Settings) -> Settings:
        [spec] = one.upstreams
        base = spec.base_url.removesuffix("/v1")
        changed = replace(spec, kind="azure", base_url=base, api_version=version, deployments={"gpt-realtime": "dep"})
        return replace(one, upstreams=(changed,))

    async with stage(adapt=azure) as scene:
        async with scene.connect(target):
            pass
        [got] = scene.upstream.requests
        assert got.path == sent
        assert got.headers["api-key"] == "sk-k1"
        assert (await scene.receipt()).model == "gpt-realtime"


def browser(*more: str) -> dict[str, Any]:
    """A client that can set no header: its key is a subprotocol."""
    names = ["realtime", *more, "openai-beta.realtime-v1"]
    return {"additional_headers": {}, "subprotocols": [Subprotocol(name) for name in names]}


async def test_a_key_among_the_subprotocols_is_replaced() -> None:
    async with stage(subprotocols=("realtime",)) as scene:
        async with scene.connect(**browser("openai-insecure-api-key.sk-mine", "openai-project.p")) as client:
            assert client.subprotocol == "realtime"
        [sent] = scene.upstream.requests
    assert sent.headers["Sec-WebSocket-Protocol"].split(", ") == [
        "realtime",
        "openai-beta.realtime-v1",
        "openai-insecure-api-key.sk-k1",
    ]
    assert sent.headers["Authorization"] == "Bearer sk-k1"


async def test_a_key_that_the_upstream_chooses_as_subprotocol_is_not_shown() -> None:
    stages = stage(subprotocols=("openai-insecure-api-key.sk-k1",))
    async with stages as scene, scene.connect(**browser("openai-insecure-api-key.sk-mine")) as client:
        assert client.response is not None
        assert "sk-" not in str(client.response.headers)
        assert client.subprotocol is None


def client_keys(*names: str, **fields: Any) -> ServerSettings:
    """Clients whose keys are `client-NAME`."""
    digests = {name: hashlib.sha256(f"client-{name}".encode()).digest() for name in names}
    return ServerSettings(client_keys=tuple(ClientKeySettings(name, digests[name], **fields) for name in names))


async def test_a_key_among_the_subprotocols_is_the_clients_credential() -> None:
    async with stage(server=client_keys("ann")) as scene:
        async with scene.connect(**browser("openai-insecure-api-key.client-ann")):
            pass
        assert (await scene.receipt()).client == "ann"
        with pytest.raises(websockets.InvalidStatus) as refused:
            async with scene.connect(**browser("openai-insecure-api-key.client-bob")):
                pass
        assert refused.value.response.status_code == 401
        assert len(scene.upstream.requests) == 1


async def test_in_pass_through_the_clients_key_goes_up() -> None:
    async with stage(keys=()) as scene:
        async with scene.connect(**browser("openai-insecure-api-key.sk-mine")):
            pass
        [sent] = scene.upstream.requests
        assert sent.headers["Authorization"] == "Bearer sk-mine"
        assert "openai-insecure-api-key.sk-mine" in sent.headers["Sec-WebSocket-Protocol"]


@pytest.mark.parametrize("status", [401, 403, 429, 500, 503])
async def test_a_key_that_is_refused_at_the_handshake_is_followed_by_the_next(status: int) -> None:
    upstream = Upstream()
    upstream.judge = lambda one: status if one.headers["Authorization"] == f"Bearer sk-{upstream.keys()[0]}" else None
    async with stage(upstream, keys=("k1", "k2")) as scene:
        async with scene.connect() as client:
            await client.send("x")
            assert await client.recv() == "x"
        receipt = await scene.receipt()
    if status < 500:
        assert len(set(upstream.keys())) == 2
        assert receipt.attempts == 2
    assert receipt.status == 101


async def test_the_last_refusal_is_the_clients_when_no_key_is_left() -> None:
    async with stage(Upstream(judge=lambda _: 401), keys=("k1", "k2")) as scene:
        with pytest.raises(websockets.InvalidStatus) as refused:
            async with scene.connect():
                pass
        answer = refused.value.response
        assert answer.status_code == 401
        assert answer.headers["X-Proxy-Error"] == "no_usable_key"
        assert sorted(scene.upstream.keys()) == ["k1", "k2"]


# No WebSocket to be had.


@pytest.mark.parametrize("status", [200, 204, 302, 400, 404, 405, 426, 501])
async def test_an_upstream_without_websockets_is_426_at_once(status: int) -> None:
    breaker = BreakerSettings(failures=1)
    async with stage(Upstream(judge=lambda _: status), keys=("k1", "k2"), breaker=breaker) as scene:
        async with raw_connection(scene.port) as client:
            for _ in range(2):  # the connection stays, for the HTTP request that follows
                client.send(request("GET", "/v1/responses", headers=HANDSHAKE))
                answer = await client.answer()
                assert (answer.status, answer.error) == (426, "upgrade_required")
                assert answer.get("Upgrade") == "HTTP/1.1"
                assert answer.get("X-Should-Retry") == "false"
        assert len(scene.upstream.requests) == 2
        receipt = await scene.receipt()
        assert (receipt.status, receipt.error, receipt.attempts) == (426, "upgrade_required", 1)


ROUTES = ["/v1/chat/completions", "/v1/models", "/v1/files/f/content", "/v1/realtime/sessions", "/openai/v1/models"]


@pytest.mark.parametrize("target", ROUTES)
async def test_other_routes_are_426_and_nothing_goes_up(target: str) -> None:
    async with running_proxy() as home:
        answer = await home.ask("GET", target, headers=HANDSHAKE)
        assert (answer.status, answer.error, answer.get("Upgrade")) == (426, "upgrade_required", "HTTP/1.1")
        assert home.transport.sent == []


@pytest.mark.parametrize("missing", ["Connection", "Upgrade", "Sec-WebSocket-Key"])
async def test_half_a_handshake_is_426(missing: str) -> None:
    """Something in front that takes a header away is no reason to keep a client waiting for its fallback."""
    headers = [pair for pair in HANDSHAKE if pair[0] != missing]
    async with running_proxy() as home:
        answer = await home.ask("GET", "/v1/responses", headers=headers)
        assert (answer.status, answer.error) == (426, "upgrade_required")
        assert home.transport.sent == []


async def test_replay_is_426() -> None:
    base = settings()
    async with running_proxy(config=replace(base, cache=replace(base.cache, mode="replay"))) as home:
        answer = await home.ask("GET", "/v1/responses", headers=HANDSHAKE)
        assert (answer.status, answer.error) == (426, "upgrade_required")


async def test_another_protocol_is_not_asked_for_by_post() -> None:
    """`Upgrade` may be ignored (RFC 9110 section 7.8): Java's client sends `h2c` with every first request."""
    async with running_proxy(says()) as home:
        headers = [("Connection", "Upgrade, HTTP2-Settings"), ("Upgrade", "h2c"), ("HTTP2-Settings", "AAMA")]
        body = {"model": "gpt-4o", "messages": [{"role": "user", "content": "x"}]}
        answer = await home.ask(body=body, headers=headers)
        assert answer.status == 200


async def test_a_101_that_nobody_asked_for_is_502() -> None:
    async with running_proxy(Responds(101, (("Upgrade", "websocket"),), ())) as home:
        answer = await home.ask("GET", "/v1/models")
        assert (answer.status, answer.error) == (502, "upstream_invalid_response")


async def test_a_101_for_another_protocol_is_502() -> None:
    async with running_proxy(Responds(101, (("Upgrade", "irc"),), ())) as home:
        answer = await home.ask("GET", "/v1/responses", headers=HANDSHAKE)
        assert (answer.status, answer.error) == (502, "upstream_invalid_response")


# Rules.


async def test_a_client_may_use_its_models_only() -> None:
    server = client_keys("ann", models=("gpt-realtime*",))
    async with stage(server=server) as scene:
        ann = {"Authorization": "Bearer client-ann"}
        async with scene.connect("/v1/realtime?model=gpt-realtime", additional_headers=ann):
            pass
        for target in (
            "/v1/realtime?model=other",
            "/v1/realtime?model=gpt-realtime&model=other",
            "/v1/realtime?mod%65l=other",
            "/v1/realtime",
            "/v1/responses",
            "/openai/realtime?api-version=v&deployment=other&model=gpt-realtime",
        ):
            with pytest.raises(websockets.InvalidStatus) as refused:
                async with scene.connect(target, additional_headers=ann):
                    pass
            assert refused.value.response.status_code == 403, target
        assert len(scene.upstream.requests) == 1


async def test_a_websocket_counts_in_the_clients_limits() -> None:
    server = client_keys("ann", limits=Limits(rpm=1))
    async with stage(server=server) as scene:
        ann = {"Authorization": "Bearer client-ann"}
        async with scene.connect(additional_headers=ann):
            with pytest.raises(websockets.InvalidStatus) as refused:
                async with scene.connect(additional_headers=ann):
                    pass
        assert refused.value.response.status_code == 429
        assert refused.value.response.headers["X-Proxy-Error"] == "client_limit"


async def test_an_open_websocket_counts_as_in_flight() -> None:
    async with stage(server=ServerSettings(max_in_flight=1)) as scene, scene.connect():
        with pytest.raises(websockets.InvalidStatus) as refused:
            async with scene.connect():
                pass
        assert refused.value.response.status_code == 503
        assert refused.value.response.headers["X-Proxy-Error"] == "overloaded"


async def test_the_deadline_ends_with_the_handshake() -> None:
    async with stage() as scene:
        headers = {"Authorization": "Bearer mine", "X-Proxy-Timeout": "300ms"}
        async with scene.connect(additional_headers=headers) as client:
            await asyncio.sleep(0.6)
            await client.send("still here")
            assert await client.recv() == "still here"


async def test_an_idle_websocket_outlives_the_idle_timeout() -> None:
    async with stage() as scene:
        scene.app.transport.apply_settings(1.0, 0.2, {})
        async with scene.connect(ping_interval=None) as client:
            await asyncio.sleep(0.5)
            await client.send("still here")
            assert await client.recv() == "still here"


# The drain.


async def drained(scene: Stage) -> None:
    scene.server.pre_shutdown()
    await _drain(scene.app, scene.server, asyncio.Event())


def quick_drain(seconds: float) -> ServerSettings:
    return ServerSettings(drain_timeout=seconds)


async def test_the_drain_ends_a_websocket_with_1001_on_both_sides() -> None:
    async with stage(server=quick_drain(0.1)) as scene:
        async with scene.connect() as client:
            await client.send("x")
            assert await client.recv() == "x"
            await drained(scene)
            with pytest.raises(websockets.ConnectionClosedOK):
                await client.recv()
            assert client.close_code == 1001
        await until(lambda: scene.upstream.closed)
        assert scene.upstream.closed[0][0] == 1001
        assert (await scene.receipt()).error == "draining"


async def test_frames_still_pass_while_the_proxy_drains() -> None:
    async with stage(server=quick_drain(TEST_TIMEOUT)) as scene:
        client: ClientConnection = await scene.connect()
        draining = asyncio.create_task(drained(scene))
        await until(lambda: scene.app.in_flight.closing)
        for _ in range(3):
            await client.send("x")
            assert await client.recv() == "x"
        await client.close()
        await draining
        assert scene.upstream.closed == [(1000, "")]


async def test_the_drain_puts_no_frame_into_another_one() -> None:
    async def half(connection: ServerConnection) -> None:
        connection.transport.write(b"\x82\x7e\x01\x00" + b"x" * 100)  # 100 of 256 bytes
        await connection.wait_closed()

    async with stage(Upstream(half), server=quick_drain(0.1)) as scene, raw_connection(scene.port) as client:
        client.send(request("GET", "/v1/realtime?model=m", headers=HANDSHAKE))
        await client.reader.readuntil(b"\r\n\r\n")
        assert len(await client.reader.readexactly(104)) == 104
        await drained(scene)
        assert await client.ended() == b""
