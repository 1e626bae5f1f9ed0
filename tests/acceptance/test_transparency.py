"""The proxy changes nothing that it need not change (docs/headers.md)."""

from __future__ import annotations

import asyncio
import gzip
import json
from collections.abc import AsyncIterator

import pytest

from tests import upstream_answers
from tests.client import Client, ask
from tests.launch import Launch, ProxyProcess, secret
from tests.scripted_upstream import ScriptedUpstream, hold, send

SAY = '"messages":[{"role":"user","content":"%s"}]'
ODD_BODIES = {
    "odd spacing": b'{ "model" :"gpt-4o",\r\n\t"messages":[ {"role":"user","content":"a"} ]  }\n',
    "raw unicode": ('{"model":"gpt-4o",' + SAY % "häß 🌍 \u2028 x" + "}").encode(),
    "escapes": ('{"model":"gpt-4o",' + SAY % "\\u00e9\\ud83c\\udf0d\\/" + "}").encode(),
    "duplicate keys": ('{"model":"gpt-4o","n":1,"n":1,' + SAY % "b" + "}").encode(),
    "numbers": ('{"model":"gpt-4o","p":0.10,"seed":123456789012345678901,"t":1.0e0,' + SAY % "c" + "}").encode(),
    "unknown fields": ('{"model":"gpt-4o","x_new":{"a":[null,{}]},' + SAY % "d" + "}").encode(),
}


@pytest.mark.parametrize("body", ODD_BODIES.values(), ids=ODD_BODIES.keys())
async def test_the_request_body_is_sent_byte_for_byte(
    proxy: ProxyProcess, upstream: ScriptedUpstream, client: Client, body: bytes
) -> None:
    answer = await client.send(proxy, body)
    assert answer.status == 200
    assert upstream.last.body == body


async def test_the_response_body_is_passed_byte_for_byte(
    proxy: ProxyProcess, upstream: ScriptedUpstream, client: Client
) -> None:
    body = upstream_answers.dump(upstream_answers.completion("Zeile\u2028 mit 🌍", x_new_field={"a": 1e300})) + b"\n\n"
    upstream.always(upstream_answers.reply(200, body))
    answer = await client.send(proxy, ask())
    assert answer.body == body


async def test_request_headers_are_sent_except_the_denied(
    proxy: ProxyProcess, upstream: ScriptedUpstream, client: Client
) -> None:
    wanted = {
        "User-Agent": "OpenAI/Python 3.52.0",
        "X-Stainless-Lang": "python",
        "X-Stainless-Retry-Count": "0",
        "OpenAI-Beta": "assistants=v2",
        "Idempotency-Key": "stainless-python-retry-1",
        "X-Custom": "kept",
    }
    denied = {
        "Authorization": "Bearer sk-client-own",
        "api-key": "sk-client-own",
        "Cookie": "a=b",
        "Forwarded": "for=1.2.3.4",
        "X-Forwarded-For": "1.2.3.4",
        "X-Forwarded-Host": "evil.example",
        "X-Forwarded-Proto": "https",
        "X-Real-IP": "1.2.3.4",
        "Via": "1.1 other",
        "Referer": "http://localhost/",
        "Sec-Fetch-Mode": "cors",
        "Sec-Fetch-Site": "same-origin",
        "X-Proxy-Tag": "a:b",
        "Cache-Control": "no-cache",
        "Keep-Alive": "timeout=5",
        "Proxy-Authorization": "Basic eDp5",
        "TE": "trailers",
        "Connection": "keep-alive, X-Hop",
        "X-Hop": "1",
    }
    assert (await client.send(proxy, ask(), wanted | denied)).status == 200
    sent = upstream.last
    assert {name: sent.header(name) for name in wanted} == wanted
    assert sent.all("authorization") == [f"Bearer {secret('k1')}"]
    for name in denied.keys() - {"Authorization", "Connection"}:
        assert sent.header(name) is None, name
    assert sent.header("host") == f"127.0.0.1:{upstream.port}"


async def test_response_headers_are_passed_except_the_denied(
    proxy: ProxyProcess, upstream: ScriptedUpstream, client: Client
) -> None:
    more = {"X-Custom": "kept", "Keep-Alive": "timeout=5", "Connection": "X-Hop", "X-Hop": "1"}
    upstream.always(upstream_answers.reply(200, upstream_answers.completion(), more))
    answer = await client.send(proxy, ask())
    for name in ("x-request-id", "x-ratelimit-remaining-tokens", "x-ratelimit-reset-requests", "cf-ray"):
        assert name in answer.headers, name
    assert answer.headers["openai-processing-ms"] == "412"
    assert answer.headers["openai-version"] == "2020-10-01"
    assert answer.headers["X-Custom"] == "kept"
    assert answer.headers["Content-Type"] == "application/json"
    denied = ["Set-Cookie", "Alt-Svc", "Strict-Transport-Security", "Keep-Alive", "X-Hop"]
    denied += ["Access-Control-Allow-Origin", "Access-Control-Expose-Headers"]
    denied += ["OpenAI-Organization", "OpenAI-Project"]  # with pooled keys
    assert [name for name in denied if name in answer.headers] == []


async def test_each_response_has_its_own_request_id(proxy: ProxyProcess, client: Client) -> None:
    body = ask()
    ids = {(await client.send(proxy, body)).headers["X-Proxy-Request-Id"] for _ in range(3)}
    assert len(ids) == 3


# 401, 403, 404 and what is retried have files of their own; here only that status and body arrive.
PASSED_AT_ONCE = [s for s in range(400, 500) if s not in (401, 403, 404, 408, 409, 429)]


async def test_every_4xx_is_passed_with_its_body_and_sent_once(
    proxy: ProxyProcess, upstream: ScriptedUpstream, client: Client
) -> None:
    for status in PASSED_AT_ONCE:
        body = upstream_answers.dump(upstream_answers.error_body(f"odd ü {status}", "some_code"))
        upstream.always(upstream_answers.reply(status, body))
        before = upstream.count
        answer = await client.send(proxy, ask())
        assert (answer.status, answer.body, answer.error) == (status, body, None)
        assert upstream.count == before + 1, status


async def test_every_5xx_and_retried_4xx_is_passed_with_its_body(
    proxy: ProxyProcess, upstream: ScriptedUpstream, client: Client
) -> None:
    for status in [408, 409, *range(500, 600)]:
        body = upstream_answers.dump(upstream_answers.error_body(f"odd {status}", None, "server_error"))
        upstream.always(upstream_answers.reply(status, body, {"x-request-id": f"req_{status}"}))
        answer = await client.send(proxy, ask(), {"X-Proxy-Max-Retries": "0"})
        assert (answer.status, answer.body, answer.error) == (status, body, None)
        assert answer.headers["x-request-id"] == f"req_{status}"


async def test_a_404_that_is_not_about_the_model_is_sent_once(
    proxy: ProxyProcess, upstream: ScriptedUpstream, client: Client
) -> None:
    upstream.always(upstream_answers.error(404, "No such thing", "not_found"))
    answer = await client.send(proxy, ask())
    assert (answer.status, upstream.count, answer.error) == (404, 1, None)


async def test_a_content_filter_400_keeps_its_details(
    proxy: ProxyProcess, upstream: ScriptedUpstream, client: Client
) -> None:
    inner = {"code": "ResponsibleAIPolicyViolation", "content_filter_result": {"hate": {"filtered": True}}}
    body = upstream_answers.dump({"error": {"message": "filtered", "code": "content_filter", "innererror": inner}})
    upstream.always(upstream_answers.reply(400, body))
    assert (await client.send(proxy, ask())).body == body


async def test_a_non_json_error_is_passed(proxy: ProxyProcess, upstream: ScriptedUpstream, client: Client) -> None:
    upstream.always(upstream_answers.reply(422, b"<html>no</html>", content_type="text/html"))
    answer = await client.send(proxy, ask())
    assert (answer.status, answer.body) == (422, b"<html>no</html>")
    assert answer.headers["Content-Type"] == "text/html"


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/chat/completions"])
async def test_the_path_may_lack_v1(proxy: ProxyProcess, upstream: ScriptedUpstream, client: Client, path: str) -> None:
    answer = await client.send(proxy, ask(), path=path)
    assert answer.status == 200
    assert upstream.last.target == "/v1/chat/completions"


async def test_models_are_listed(proxy: ProxyProcess, upstream: ScriptedUpstream, client: Client) -> None:
    for path in ("/v1/models", "/models"):
        answer = await client.get(proxy, path)
        assert answer.json()["data"][0]["id"] == "gpt-4o"
        assert (upstream.last.method, upstream.last.target) == ("GET", "/v1/models")
        assert upstream.last.body == b""
        assert upstream.last.key == secret("k1")


@pytest.mark.parametrize(
    "target",
    [
        "/v1/files?purpose=fine-tune&after=a%2Bb%20c&x=%C3%A9&x",
        "/v1/fine_tuning/jobs?limit=2",
        "/v1/batches/b_1",
    ],
)
async def test_other_paths_keep_their_query_byte_for_byte(
    proxy: ProxyProcess, upstream: ScriptedUpstream, client: Client, target: str
) -> None:
    assert (await client.get(proxy, target)).status == 200
    assert upstream.last.target == target


async def test_the_query_is_sent_upstream(proxy: ProxyProcess, upstream: ScriptedUpstream, client: Client) -> None:
    await client.send(proxy, ask(), path="/v1/chat/completions?trace=a%20b")
    assert upstream.last.target == "/v1/chat/completions?trace=a%20b"


async def test_delete_put_patch_and_head_are_passed(
    proxy: ProxyProcess, upstream: ScriptedUpstream, client: Client
) -> None:
    for method in ("DELETE", "PATCH", "PUT"):
        await client.send(proxy, b'{"a":1}' if method != "DELETE" else None, path="/v1/files/f-1", method=method)
        assert (upstream.last.method, upstream.last.target) == (method, "/v1/files/f-1")


async def test_multipart_uploads_stream_up(proxy: ProxyProcess, upstream: ScriptedUpstream, client: Client) -> None:
    first, second = b"--b\r\nContent-Disposition: form-data; name=x\r\n\r\n" + b"1" * 50_000, b"\r\n--b--\r\n"
    may_go_on = asyncio.Event()

    async def pieces() -> AsyncIterator[bytes]:
        yield first
        await may_go_on.wait()
        yield second

    kind = "multipart/form-data; boundary=b"
    sending = asyncio.create_task(client.send(proxy, pieces(), {"Content-Type": kind}, "/v1/files"))
    # The upstream has the first part before the client has sent the second.
    await upstream.until(lambda: upstream.count == 1 and len(upstream.last.received) == len(first))
    may_go_on.set()
    assert (await sending).status == 200
    assert upstream.last.body == first + second
    assert upstream.last.header("content-type") == kind


async def test_uploads_keep_their_content_length(
    proxy: ProxyProcess, upstream: ScriptedUpstream, client: Client
) -> None:
    await client.send(proxy, b"x" * 100_000, {"Content-Type": "application/octet-stream"}, "/v1/uploads")
    assert upstream.last.header("content-length") == "100000"
    assert len(upstream.last.body) == 100_000


async def test_downloads_stream_down(proxy: ProxyProcess, upstream: ScriptedUpstream, client: Client) -> None:
    size, gate = 5_000_000, upstream.gate()
    begin = upstream_answers.head(200, [("Content-Type", "audio/mpeg"), ("Content-Length", str(size))])
    upstream.always(send(begin + b"a" * 1000), hold(gate), send(b"b" * (size - 1000)))
    async with client.open(proxy, path="/v1/files/f-1/content") as answer:
        first = await answer.content.readany()  # before the upstream has sent the rest
        assert first == b"a" * len(first)
        gate.open()
        rest = await answer.content.read()
    assert len(first + rest) == size
    assert answer.headers["Content-Type"] == "audio/mpeg"
    assert answer.headers["Content-Length"] == str(size)
    assert answer.headers["X-Proxy-Cache"] == "bypass"


async def test_other_paths_are_never_cached(proxy: ProxyProcess, upstream: ScriptedUpstream, client: Client) -> None:
    answers = [await client.get(proxy, "/v1/files") for _ in range(2)]
    assert upstream.count == 2
    assert {a.cache for a in answers} == {"bypass"}


async def test_a_redirect_is_not_followed(proxy: ProxyProcess, upstream: ScriptedUpstream, client: Client) -> None:
    upstream.always(upstream_answers.reply(307, b"", {"Location": f"http://127.0.0.1:{upstream.port}/v1/elsewhere"}))
    elsewhere = await client.get(proxy, "/v1/files/f-1/content")
    assert elsewhere.status == 307
    assert "elsewhere" in elsewhere.headers["Location"]
    endpoint = await client.send(proxy, ask(), {"X-Proxy-Max-Retries": "0"})
    assert (endpoint.status, endpoint.error) == (502, "upstream_invalid_response")
    assert all("elsewhere" not in request.target for request in upstream.requests)


async def test_cookies_are_not_kept(proxy: ProxyProcess, upstream: ScriptedUpstream, client: Client) -> None:
    for _ in range(2):  # each answer sets one
        await client.send(proxy, ask())
    assert all(request.header("cookie") is None for request in upstream.requests)


async def test_a_compressed_response_has_the_right_headers(
    proxy: ProxyProcess, upstream: ScriptedUpstream, client: Client
) -> None:
    body = upstream_answers.completion("squeezed")
    for headers in ({}, {"Accept-Encoding": "gzip, deflate"}):
        upstream.always(upstream_answers.gzipped(body))
        question = ask()
        for _ in range(2):  # a miss and a hit
            answer = await client.send(proxy, question, headers)
            assert answer.status == 200
            content = answer.body
            if answer.headers.get("Content-Encoding") == "gzip":
                assert headers, "gzip for a client that did not offer it"
                content = gzip.decompress(content)
            else:
                assert "Content-Encoding" not in answer.headers
            assert json.loads(content) == body


async def test_the_other_four_endpoints_work(proxy: ProxyProcess, upstream: ScriptedUpstream, client: Client) -> None:
    bodies = {
        "/v1/embeddings": {"model": "text-embedding-3-small", "input": "transparency"},
        "/v1/completions": {"model": "gpt-3.5-turbo-instruct", "prompt": "transparency", "max_tokens": 9},
        "/v1/responses": {"model": "gpt-4o", "input": "transparency", "store": False},
        "/v1/moderations": {"model": "omni-moderation-latest", "input": "transparency"},
    }
    for path, body in bodies.items():
        answers = [await client.send(proxy, body, path=path) for _ in range(2)]
        assert [a.status for a in answers] == [200, 200], path
        assert upstream.last.target == path
        assert answers[0].body == answers[1].body
        assert [a.cache for a in answers] == ["miss", "hit"], path
    assert upstream.count == 4


async def test_pass_through_sends_each_clients_own_credential(
    launch: Launch, upstream: ScriptedUpstream, client: Client
) -> None:
    proxy = launch({"upstreams": [{"name": "o", "base_url": f"http://127.0.0.1:{upstream.port}/v1"}]})
    assert "keys: none (pass-through)" in proxy.stderr_so_far()
    own, org = secret("client"), "org-mine"
    answer = await client.send(proxy, ask(), {"Authorization": f"Bearer {own}", "OpenAI-Organization": org})
    assert answer.status == 200
    assert upstream.last.all("authorization") == [f"Bearer {own}"]
    assert upstream.last.header("openai-organization") == org
    assert answer.headers["openai-organization"] == "org-upstream"
