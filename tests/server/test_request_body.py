"""Request bodies as clients really send them: compressed, chunked, without a media type (docs/routes-and-errors.md)."""

from __future__ import annotations

import random
from dataclasses import replace

import orjson
import pytest

from proxy.config.settings import Settings
from tests.codings import CODINGS
from tests.pipeline.fixture import ask, settings
from tests.pipeline.script import says
from tests.server.kit import CHAT, Answer, RunningProxy, chunked, raw_connection, request, running_proxy

pytestmark = pytest.mark.slow

BODY = orjson.dumps(ask("compressed"))
KIB = 1024


def limited(max_body: int) -> Settings:
    base = settings()
    return replace(base, server=replace(base.server, max_body=max_body))


async def send(server: RunningProxy, body: bytes, coding: str, target: str = CHAT) -> Answer:
    return await server.ask("POST", target, body, [("Content-Encoding", coding)])


# Compressed.


@pytest.mark.parametrize("coding", [*CODINGS, "GZIP"])
async def test_a_compressed_body_goes_up_plain_and_is_keyed_by_what_it_says(coding: str) -> None:
    packed = CODINGS[coding.lower()](BODY)
    async with running_proxy(says()) as server:
        assert (await send(server, packed, coding)).status == 200
        [sent] = server.transport.sent
        assert sent.body == BODY
        assert "Content-Encoding" not in sent.headers
        assert (await server.ask(body=BODY)).get("X-Proxy-Cache") == "hit"
        assert (await send(server, packed, coding)).get("X-Proxy-Cache") == "hit"


@pytest.mark.parametrize("target", ["chat/completions", "completions", "embeddings", "moderations", "responses"])
async def test_every_cached_endpoint_takes_compressed_bodies(target: str) -> None:
    async with running_proxy(says()) as server:
        answer = await send(server, CODINGS["zstd"](b'{"model": "m", "input": "x"}'), "zstd", f"/v1/{target}")
        assert (answer.status, server.transport.sent[0].body) == (200, b'{"model": "m", "input": "x"}')


@pytest.mark.parametrize("coding", ["exi", "compress", "gzip, gzip", "aws-chunked"])
async def test_another_coding_is_415_and_the_answer_names_those_taken(coding: str) -> None:
    async with running_proxy() as server:
        answer = await send(server, BODY, coding)
        assert (answer.status, answer.error) == (415, "unsupported_media_type")
        assert answer.get("Accept-Encoding") == "gzip, deflate, br, zstd"
        assert answer.json()["error"]["param"] == "Content-Encoding"


async def test_two_headers_of_codings_are_two_codings() -> None:
    async with running_proxy() as server:
        headers = [("Content-Encoding", "gzip"), ("Content-Encoding", "zstd")]
        answer = await server.ask(body=CODINGS["zstd"](CODINGS["gzip"](BODY)), headers=headers)
        assert (answer.status, answer.error) == (415, "unsupported_media_type")


@pytest.mark.parametrize("coding", ["", "identity", "Identity"])
async def test_no_coding_is_no_coding(coding: str) -> None:
    async with running_proxy(says()) as server:
        assert (await send(server, BODY, coding)).status == 200
        assert server.transport.sent[0].body == BODY


@pytest.mark.parametrize("coding", CODINGS)
async def test_a_body_that_is_cut_or_broken_is_400(coding: str) -> None:
    packed = CODINGS[coding](BODY)
    async with running_proxy() as server:
        for body in (packed[:-1], packed[: len(packed) // 2], b"\xff" + packed, BODY):
            answer = await send(server, body, coding)
            assert (answer.status, answer.error) == (400, "invalid_json"), body
            assert answer.json()["error"]["param"] == "Content-Encoding"


@pytest.mark.parametrize("coding", CODINGS)
async def test_a_decompression_bomb_is_413(coding: str) -> None:
    bomb = CODINGS[coding](b'{"model": "m", "input": "' + b" " * 10_000_000 + b'"}')
    async with running_proxy() as server:
        answer = await send(server, bomb, coding)
        assert (answer.status, answer.error) == (413, "request_too_large")


@pytest.mark.parametrize("coding", CODINGS)
async def test_a_repetitive_prompt_is_no_bomb(coding: str) -> None:
    body = orjson.dumps(ask("ha " * 20_000))
    assert len(CODINGS[coding](body)) * 100 < len(body) < 64 * KIB
    async with running_proxy(says()) as server:
        assert (await send(server, CODINGS[coding](body), coding)).status == 200


async def test_max_body_counts_decoded() -> None:
    text = "".join(random.Random(1).choices("abcdefgh", k=4000))
    body = orjson.dumps(ask(text))
    packed = CODINGS["gzip"](body)
    assert len(packed) < len(body) - 1
    async with running_proxy(says(), config=limited(len(body))) as server:
        assert (await send(server, packed, "gzip")).status == 200
    async with running_proxy(config=limited(len(body) - 1)) as server:
        answer = await send(server, packed, "gzip")
        assert (answer.status, answer.error) == (413, "request_too_large")


async def test_a_large_compressed_body_is_decoded() -> None:
    text = "".join(random.Random(2).choices("abcdefgh", k=2_000_000))
    body = orjson.dumps(ask(text))
    async with running_proxy(says()) as server:
        assert (await send(server, CODINGS["br"](body), "br")).status == 200
        assert server.transport.sent[0].body == body


async def test_elsewhere_a_compressed_body_passes_as_it_is() -> None:
    packed = CODINGS["gzip"](b'{"input": "x"}')
    async with running_proxy(says()) as server:
        await send(server, packed, "gzip", "/v1/audio/speech")
        [sent] = server.transport.sent
        assert (sent.body, sent.headers["Content-Encoding"]) == (packed, "gzip")


# Media types.

KINDS = ["", "text/plain", "application/x-www-form-urlencoded", "application/octet-stream", "text/json", "nonsense"]


@pytest.mark.parametrize("kind", KINDS)
async def test_json_under_any_media_type_is_taken_and_goes_up_as_json(kind: str) -> None:
    """Old clients send none, and curl sends that of forms."""
    async with running_proxy(says()) as server:
        answer = await server.ask(body=BODY, headers=[("Content-Type", kind)])
        assert answer.status == 200
        [sent] = server.transport.sent
        assert sent.body == BODY
        assert sent.headers.getall("Content-Type") == ["application/json"]
        assert (await server.ask(body=BODY)).get("X-Proxy-Cache") == "hit"
        assert (await server.ask(body=BODY, headers=[("Content-Type", kind)])).get("X-Proxy-Cache") == "hit"


@pytest.mark.parametrize("kind", ["application/json; charset=utf-8", "application/vnd.api+json", "Application/JSON"])
async def test_other_names_of_json_go_up_as_they_are(kind: str) -> None:
    async with running_proxy(says()) as server:
        assert (await server.ask(body=BODY, headers=[("Content-Type", kind)])).status == 200
        assert server.transport.sent[0].headers["Content-Type"] == kind


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "body", [b"model=m&input=x", b"", b"{", b'--b\r\nContent-Disposition: form-data; name="model"']
)
async def test_what_is_no_json_is_415(kind: str, body: bytes) -> None:
    async with running_proxy() as server:
        answer = await server.ask(body=body, headers=[("Content-Type", kind)])
        assert (answer.status, answer.error) == (415, "unsupported_media_type")


# Framing.


async def test_chunked_json_is_taken() -> None:
    async with running_proxy(says()) as server, raw_connection(server.port) as line:
        head = request(headers=[("Content-Type", "application/json"), ("Transfer-Encoding", "chunked")])
        line.send(head + chunked(BODY[:7], BODY[7:]))
        assert (await line.answer()).status == 200
        assert server.transport.sent[0].body == BODY


@pytest.mark.parametrize("version", ["1.0", "1.1"])
async def test_requests_of_both_versions_are_served(version: str) -> None:
    async with running_proxy(says()) as server, raw_connection(server.port) as line:
        line.send(request(body=BODY, version=version))
        answer = await line.answer()
        assert (answer.version, answer.status, answer.framing) == ("HTTP/1.1", 200, "length")
        if version == "1.0":
            assert await line.ended() == b""


async def test_a_client_that_expects_100_continue_gets_it_before_its_body() -> None:
    async with running_proxy(says()) as server, raw_connection(server.port) as line:
        length = ("Content-Length", str(len(BODY)))
        line.send(request(headers=[("Content-Type", "application/json"), length, ("Expect", "100-Continue")]))
        assert (await line.answer()).status == 100
        line.send(BODY)
        assert (await line.answer()).status == 200


async def test_http_1_0_gets_no_100() -> None:
    """RFC 9110 section 10.1.1: the expectation must be ignored there."""
    async with running_proxy(says()) as server, raw_connection(server.port) as line:
        headers = [("Content-Type", "application/json"), ("Content-Length", str(len(BODY))), ("Expect", "100-continue")]
        line.send(request(headers=headers, version="1.0"))
        assert await line.silent()
        line.send(BODY)
        assert (await line.answer()).status == 200


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ([("Content-Encoding", "exi"), ("Content-Type", "application/json")], 415),
        ([("Host", "evil.test"), ("Content-Type", "application/json")], 421),
        ([("Content-Type", "application/json"), ("X-Proxy-Nonsense", "1"), ("Origin", "https://evil.test")], 403),
    ],
)
async def test_a_refusal_before_the_body_closes_the_connection_for_who_waits_for_100(
    headers: list[tuple[str, str]], status: int
) -> None:
    """It may send the body or not: nobody could tell where the next request begins (RFC 9110 section 10.1.1)."""
    async with running_proxy() as server, raw_connection(server.port) as line:
        line.send(request(headers=[*headers, ("Content-Length", "500"), ("Expect", "100-continue")]))
        answer = await line.answer()
        assert (answer.status, answer.get("Connection")) == (status, "close")


PATHS = [CHAT, "/v1/files", "/healthz"]
CODES = {400: "bad_request", 501: "not_implemented", 505: "http_version_not_supported"}


async def assert_refused(data: bytes, status: int) -> None:
    async with running_proxy() as server, raw_connection(server.port) as line:
        line.send(data)
        answer = await line.answer()
        assert (answer.status, answer.error, answer.get("Connection")) == (status, CODES[status], "close")
        assert await line.ended() == b""
        assert server.transport.sent == []


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("coding", "status"), [("gzip, chunked", 501), ("deflate, chunked", 501), ("chunked, chunked", 400), ("gzip", 400)]
)
async def test_transfer_codings_other_than_chunked_are_refused(path: str, coding: str, status: int) -> None:
    head = request("POST", path, headers=[("Content-Type", "application/json"), ("Transfer-Encoding", coding)])
    await assert_refused(head + chunked(CODINGS["gzip"](BODY)), status)


async def test_a_transfer_coding_in_http_1_0_is_refused() -> None:
    headers = [("Content-Type", "application/json"), ("Transfer-Encoding", "chunked"), ("Connection", "keep-alive")]
    await assert_refused(request(headers=headers, version="1.0") + chunked(BODY), 400)


# Versions.


@pytest.mark.parametrize("path", ["/v1/models", "/healthz"])
@pytest.mark.parametrize(
    ("version", "status"),
    [("", 505), (" HTTP/0.9", 505), (" HTTP/2.0", 505), (" HTTP/3.0", 400), (" HTTP/1.2", 400), (" http/1.1", 400)],
)
async def test_only_http_1_1_and_1_0_are_spoken(path: str, version: str, status: int) -> None:
    await assert_refused(f"GET {path}{version}\r\nHost: 127.0.0.1\r\n\r\n".encode(), status)


async def test_the_preface_of_http_2_is_refused() -> None:
    async with running_proxy() as server, raw_connection(server.port) as line:
        line.send(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
        assert (await line.answer()).status in (400, 505)


async def test_a_version_is_refused_after_other_requests_on_a_connection() -> None:
    good = request("GET", "/healthz")
    async with running_proxy() as server, raw_connection(server.port) as line:
        line.send(good)
        assert (await line.answer()).status == 200
        line.send(b"GET /healthz HTTP/2.0\r\nHost: 127.0.0.1\r\n\r\n")
        assert (await line.answer()).status == 505
        assert await line.ended() == b""
