"""Stored objects on routes that are passed through: the key that made them, and the client they belong to."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Callable, Iterable
from dataclasses import replace
from hashlib import sha256
from typing import Any

import brotli
import orjson
import pytest
from backports import zstd

from proxy.config.settings import CacheSettings, ClientKeySettings, ServerSettings
from tests.pipeline.fixture import settings
from tests.pipeline.script import JSON, SSE, Responds, error, event, says
from tests.server.kit import RunningProxy, running_proxy
from tests.server.objects import maker, remember
from tests.server.test_passthrough import LISTED, TWO, carried

pytestmark = pytest.mark.slow

JSON_BODY = [("Content-Type", "application/json")]


def made(id_: str, **fields: Any) -> Responds:
    return says({"id": id_, "object": "file", **fields})


# --- the key ----------------------------------------------------------------------------------------------------------


async def test_a_stored_object_is_requested_with_the_key_that_made_it() -> None:
    async with running_proxy(config=TWO) as server:
        remember(server, "resp_1", "k2")  # by one of the five endpoints
        assert await carried(server, "/v1/responses/resp_1", made("resp_1")) == ["k2"]
        assert await carried(server, "/v1/responses/resp_1/input_items", made("x")) == ["k2"]
        assert await carried(server, "/v1/responses/resp_2", made("resp_2")) == ["k1"]
        assert await carried(server, "/v1/responses/resp_1", error(401)) == ["k2"]  # no other key could see it
        assert await carried(server, "/v1/files?after=resp_1", LISTED) == ["k2"]
        assert await carried(server, "/v1/responses/resp%5F1", LISTED) in (["k2"], [])


async def test_a_route_without_state_follows_the_objects_in_its_body() -> None:
    async with running_proxy(*[LISTED] * 2, config=TWO) as server:
        remember(server, "file-1", "k2")
        for _ in range(2):
            body = {"model": "gpt-image-1", "images": [{"file_id": "file-1"}]}
            await server.ask("POST", "/v1/images/edits", orjson.dumps(body), JSON_BODY)
        assert server.transport.keys == ["k2", "k2"]


async def test_large_or_broken_bodies_are_not_parsed() -> None:
    async with running_proxy(config=TWO) as server:
        remember(server, "file-1", "k2")
        for body in (b'{"file_ids": ["file-1"], "x": "' + b"x" * 1_100_000 + b'"}', b'{"file_ids": ["file-1"], '):
            server.transport.queue[:] = [LISTED]
            await server.ask("POST", "/v1/vector_stores", body, JSON_BODY)
            assert server.transport.keys.pop() == "k1"
            assert server.transport.sent[-1].body == body


# --- responses --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [(), (("Content-Length", "38"),)])
async def test_objects_in_forwarded_responses_are_remembered(length: Iterable[tuple[str, str]]) -> None:
    body = b'{"id":"vs_1", "object":"vector_store"}'
    answer = Responds(200, (JSON, *length), (body[:9], body[9:]))
    async with running_proxy(config=TWO) as server:
        remember(server, "file-1", "k2")
        server.transport.queue[:] = [answer, LISTED]
        made = await server.ask("POST", "/v1/vector_stores", {"file_ids": ["file-1"]})
        assert (made.body, server.transport.keys) == (body, ["k2"])  # where its file is
        assert await maker(server, "vs_1") == "k2"
        assert server.transport.sent[0].json() == {"file_ids": ["file-1"]}


BODY = orjson.dumps({"id": "vs_1", "object": "vector_store"})
PACKED = {
    "gzip": gzip.compress(BODY),
    "deflate": zlib.compress(BODY),
    "zstd": zstd.compress(BODY),
    "br": brotli.compress(BODY),
}


@pytest.mark.parametrize("encoding", PACKED)
async def test_objects_in_compressed_responses_are_remembered(encoding: str) -> None:
    packed = PACKED[encoding]
    answer = Responds(200, (JSON, ("Content-Encoding", encoding)), (packed[:7], packed[7:]))
    async with running_proxy(config=TWO) as server:
        remember(server, "file-1", "k2")
        server.transport.queue[:] = [answer]
        reply = await server.ask("POST", "/v1/vector_stores", {"file_ids": ["file-1"]})
        assert (reply.body, reply.get("Content-Encoding")) == (packed, encoding)
        assert await maker(server, "vs_1") == "k2"


async def test_objects_in_forwarded_streams_are_remembered() -> None:
    run = event({"id": "run_1", "object": "thread.run", "thread_id": "thread_1"})
    item = event({"type": "response.output_item.done", "item": {"id": "msg_1", "type": "message"}})
    async with running_proxy(config=TWO) as server:
        remember(server, "asst_1", "k2")
        server.transport.queue[:] = [Responds(200, (SSE,), (run, item))]
        await server.ask("POST", "/v1/threads/runs", {"assistant_id": "asst_1", "stream": True})
        assert [await maker(server, id_) for id_ in ("run_1", "thread_1", "msg_1", "x")] == ["k2", "k2", "k2", ""]


async def test_an_object_that_only_location_names_is_remembered() -> None:
    """As that of a call: its body is a session description."""
    answer = Responds(
        201, (("Content-Type", "application/sdp"), ("Location", "/v1/realtime/calls/rtc_1?x=y")), (b"v=0",)
    )
    async with running_proxy(config=TWO) as server:
        remember(server, "asst_1", "k2")
        server.transport.queue[:] = [answer]
        await server.ask("POST", "/v1/realtime/calls?assistant_id=asst_1", b"v=0")
        assert (await maker(server, "rtc_1"), await maker(server, "y")) == ("k2", "")


async def test_failures_and_deletions_bring_no_objects() -> None:
    async with running_proxy(config=TWO) as server:
        remember(server, "asst_1", "k2")
        server.transport.queue[:] = [made("file-1"), error(404)]
        await server.ask("DELETE", "/v1/files/file-1")
        await server.ask("POST", "/v1/assistants/asst_1", {"x": 1})
        assert await maker(server, "file-1") == ""


# --- clients ----------------------------------------------------------------------------------------------------------

NAMES = ("anna", "ben", "cleo", "dora")
SPACES = {"cleo": "team", "dora": "team"}


def clients(shared: bool = False) -> Any:
    keys = tuple(
        ClientKeySettings(name, sha256(f"key-of-{name}".encode()).digest(), SPACES.get(name)) for name in NAMES
    )
    return settings(server=ServerSettings(client_keys=keys), cache=CacheSettings(shared=shared))


def auth(name: str) -> list[tuple[str, str]]:
    return [("Authorization", f"Bearer key-of-{name}")]


async def statuses(server: RunningProxy, method: str, target: str, body: Any = b"") -> dict[str, int]:
    """What each client gets."""
    found = {}
    for name in NAMES:
        server.transport.queue[:] = [LISTED]
        found[name] = (await server.ask(method, target, body, auth(name))).status
    return found


ALL, OWNERS_ONLY = dict.fromkeys(NAMES, 200), {"anna": 200, "ben": 404, "cleo": 404, "dora": 404}


@pytest.mark.parametrize(
    ("method", "target", "body"),
    [
        ("GET", "/v1/files/file-1", None),
        ("DELETE", "/v1/files/file-1", None),
        ("GET", "/v1/files/file-1/content", None),
        ("GET", "/v1/files?after=file-1", None),
        ("POST", "/v1/batches", {"input_file_id": "file-1"}),
        ("POST", "/v1/vector_stores", {"file_ids": ["file-1"]}),
        ("POST", "/v1/images/edits", {"images": [{"file_id": "file-1"}]}),
    ],
)
async def test_an_object_belongs_to_the_client_that_made_it(method: str, target: str, body: Any) -> None:
    async with running_proxy(config=clients()) as server:
        server.transport.queue[:] = [made("file-1")]
        assert (await server.ask("POST", "/v1/files", b"x", auth("anna"))).status == 200
        assert await statuses(server, method, target, body) == OWNERS_ONLY
        assert await statuses(server, "GET", "/v1/files") == ALL


async def test_an_object_of_another_client_is_missing_as_at_openai() -> None:
    async with running_proxy(config=clients()) as server:
        remember(server, "file-1", "k1", "anna")
        answer = await server.ask("GET", "/v1/files/file-1", None, auth("ben"))
        assert (answer.status, answer.error, answer.get("X-Should-Retry")) == (404, "object_not_found", "false")
        told = answer.json()["error"]
        assert (told["type"], told["param"]) == ("invalid_request_error", "id")
        assert "file-1" in told["message"]
        assert server.transport.sent == []
        assert server.receipts[-1].error == "object_not_found"


@pytest.mark.parametrize("padding", [0, 1_200_000])
@pytest.mark.parametrize("kind", ["application/json", "text/plain", "application/x-www-form-urlencoded", None])
async def test_no_size_and_no_type_of_a_body_hides_an_object(padding: int, kind: str | None) -> None:
    body = orjson.dumps({"file_ids": ["file-1"], "name": "x" * padding})
    headers = [*auth("ben"), *([("Content-Type", kind)] if kind is not None else [])]
    async with running_proxy(config=clients()) as server:
        remember(server, "file-1", "k1", "anna")
        assert (await server.ask("POST", "/v1/vector_stores", body, headers)).status == 404
        assert server.transport.sent == []


@pytest.mark.parametrize(
    ("encoding", "pack"), [("gzip", gzip.compress), ("zstd", zstd.compress), ("br", brotli.compress)]
)
async def test_no_coding_of_a_body_hides_an_object(encoding: str, pack: Callable[[bytes], bytes]) -> None:
    body = pack(orjson.dumps({"file_ids": ["file-1"]}))
    headers = [*JSON_BODY, ("Content-Encoding", encoding)]
    async with running_proxy(LISTED, config=clients()) as server:
        remember(server, "file-1", "k1", "anna")
        assert (await server.ask("POST", "/v1/vector_stores", body, [*headers, *auth("ben")])).status == 404
        assert server.transport.sent == []
        assert (await server.ask("POST", "/v1/vector_stores", body, [*headers, *auth("anna")])).status == 200
        assert server.transport.sent[0].body == body


async def test_clients_that_share_a_cache_share_their_objects() -> None:
    async with running_proxy(config=clients()) as server:
        server.transport.queue[:] = [made("file-1")]
        await server.ask("POST", "/v1/files", b"x", auth("cleo"))
        assert await statuses(server, "GET", "/v1/files/file-1") == {"anna": 404, "ben": 404, "cleo": 200, "dora": 200}
    async with running_proxy(config=clients(shared=True)) as server:
        server.transport.queue[:] = [made("file-1")]
        await server.ask("POST", "/v1/files", b"x", auth("anna"))
        assert await statuses(server, "GET", "/v1/files/file-1") == ALL


async def test_what_came_of_an_object_belongs_to_its_client() -> None:
    """The file that a batch has written is in no request; it is seen when the batch is asked for."""
    async with running_proxy(config=clients()) as server:
        remember(server, "batch_1", "k1", "anna")
        batch = {"id": "batch_1", "object": "batch", "output_file_id": "file-9", "input_file_id": "file-1"}
        server.transport.queue[:] = [says(batch)]
        await server.ask("GET", "/v1/batches/batch_1", None, auth("anna"))
        assert await statuses(server, "GET", "/v1/files/file-9/content") == OWNERS_ONLY


async def test_what_is_only_listed_or_named_belongs_to_nobody() -> None:
    async with running_proxy(config=clients()) as server:
        remember(server, "file-2", "k1", "ben")
        files = {"object": "list", "data": [{"id": "file-1", "object": "file"}, {"id": "file-2", "object": "file"}]}
        server.transport.queue[:] = [says(files)]
        await server.ask("GET", "/v1/files", None, auth("anna"))
        store = {"id": "vs_1", "object": "vector_store", "file_ids": ["file-1"]}
        server.transport.queue[:] = [says(store)]
        await server.ask("POST", "/v1/vector_stores", {"file_ids": ["file-1"]}, auth("anna"))
        assert await statuses(server, "GET", "/v1/files/file-1") == ALL
        assert await statuses(server, "GET", "/v1/files/file-2") == {"anna": 404, "ben": 200, "cleo": 404, "dora": 404}
        assert await statuses(server, "GET", "/v1/vector_stores/vs_1") == OWNERS_ONLY


HANDSHAKE = [
    ("Connection", "Upgrade"),
    ("Upgrade", "websocket"),
    ("Sec-WebSocket-Key", "dGhlIHNhbXBsZSBub25jZQ=="),
    ("Sec-WebSocket-Version", "13"),
]


async def test_a_websocket_joins_a_call_with_the_key_and_the_client_that_began_it() -> None:
    target = "/v1/realtime?call_id=rtc_1"
    async with running_proxy(config=replace(TWO, server=clients().server)) as server:
        remember(server, "rtc_1", "k2", "anna")
        for name, status, keys in (("ben", 404, []), ("anna", 426, ["k2"])):  # 426: this upstream knows no WebSocket
            server.transport.queue[:] = [LISTED]
            assert (await server.ask("GET", target, None, [*HANDSHAKE, *auth(name)])).status == status
            assert server.transport.keys == keys
