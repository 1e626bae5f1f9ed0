"""What is repeated, when and how often, and what the client learns of it (docs/keys-and-limits.md, Retries)."""

from __future__ import annotations

import asyncio
import time
from email.utils import formatdate

import pytest

from tests import upstream_answers
from tests.client import Client, ask
from tests.launch import AT_ONCE, Launch, ProxyProcess, settings
from tests.ledger import Request
from tests.scripted_upstream import Answer, ScriptedUpstream, Step, cut, reset, send, sleep, stall

CHAT = "/v1/chat/completions"


async def test_passing_failures_are_retried(launch: Launch, upstream: ScriptedUpstream, client: Client) -> None:
    proxy = launch(settings(upstream.port))
    statuses = [408, 409, 500, 502, 503, 504, 529]
    for status in statuses:
        upstream.queue(CHAT, upstream_answers.server_error(status))
        answer = await client.send(proxy, ask())
        assert (answer.status, answer.headers["X-Proxy-Attempts"]) == (200, "2"), status
    assert upstream.count == 2 * len(statuses)


async def test_a_retry_sends_the_same_bytes(launch: Launch, upstream: ScriptedUpstream, client: Client) -> None:
    proxy = launch(settings(upstream.port))
    upstream.queue(CHAT, upstream_answers.server_error(), upstream_answers.server_error())
    body = b'{ "model":"gpt-4o", "messages":[{"role":"user","content":"ag\\u00e4in"}] }'
    assert (await client.send(proxy, body)).status == 200
    assert [r.body for r in upstream.requests] == [body] * 3


@pytest.mark.parametrize("stream", [False, True])
async def test_x_should_retry_is_false_after_the_proxys_own_retries(
    launch: Launch, upstream: ScriptedUpstream, client: Client, stream: bool
) -> None:
    proxy = launch(settings(upstream.port))
    body = upstream_answers.dump(upstream_answers.error_body("overloaded ü", None, "server_error"))
    upstream.always(upstream_answers.reply(503, body))
    answer = await client.send(proxy, ask(stream=stream))
    assert (answer.status, answer.body) == (503, body)
    assert upstream.count == 4
    assert answer.headers["X-Proxy-Attempts"] == "4"
    assert answer.headers["X-Should-Retry"] == "false"
    assert answer.error is None


@pytest.mark.parametrize("retries", [0, 1, 5])
async def test_a_request_may_name_its_retries(
    launch: Launch, upstream: ScriptedUpstream, client: Client, retries: int
) -> None:
    proxy = launch(settings(upstream.port))
    upstream.always(upstream_answers.server_error())
    await client.send(proxy, ask(), {"X-Proxy-Max-Retries": str(retries)})
    assert upstream.count == retries + 1
    if retries < 2:
        await client.send(proxy, ask(), path=f"/_/retries={retries}/v1/chat/completions")
        assert upstream.count == 2 * (retries + 1)


async def test_x_should_retry_of_the_upstream_is_obeyed(
    launch: Launch, upstream: ScriptedUpstream, client: Client
) -> None:
    proxy = launch(settings(upstream.port))
    upstream.queue(CHAT, upstream_answers.error(503, "no", None, x_should_retry="false"))
    answer = await client.send(proxy, ask())
    assert (answer.status, upstream.count) == (503, 1)
    assert answer.headers["X-Should-Retry"] == "false"
    upstream.queue(CHAT, upstream_answers.error(400, "once more", None, x_should_retry="true"))
    answer = await client.send(proxy, ask())
    assert (answer.status, upstream.count) == (200, 3)


FORMS: dict[str, dict[str, str]] = {
    "seconds": {"retry_after": "1"},
    "decimals": {"retry_after": "0.6"},
    "milliseconds": {"retry_after_ms": "600"},
    "go duration": {"retry_after": "600ms"},
    "milliseconds before seconds": {"retry_after_ms": "600", "retry_after": "1"},
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())
async def test_never_before_retry_after(
    launch: Launch, upstream: ScriptedUpstream, client: Client, form: dict[str, str]
) -> None:
    proxy = launch(settings(upstream.port))
    upstream.queue(CHAT, upstream_answers.error(503, "later", None, "server_error", **form))
    answer = await client.send(proxy, ask())
    assert answer.status == 200
    gap = upstream.requests[1].at - (upstream.requests[0].answered_at or 0)
    assert 0.58 <= gap < 2.5


async def test_retry_after_as_a_date(launch: Launch, upstream: ScriptedUpstream, client: Client) -> None:
    proxy = launch(settings(upstream.port))

    def script(request: Request) -> Answer:
        if request.number > 1:
            return upstream_answers.behave(request)
        return upstream_answers.error(
            503, "later", None, "server_error", retry_after=formatdate(time.time() + 2, usegmt=True)
        )

    upstream.script = script
    assert (await client.send(proxy, ask())).status == 200
    assert upstream.requests[1].at - upstream.requests[0].at > 0.9  # a date has whole seconds only


@pytest.mark.parametrize("retry_after", ["3600", "6m0s", formatdate(4_000_000_000, usegmt=True)])
async def test_beyond_the_deadline_the_429_is_passed_on_at_once(
    launch: Launch, upstream: ScriptedUpstream, client: Client, retry_after: str
) -> None:
    proxy = launch(settings(upstream.port))
    upstream.always(upstream_answers.rate_limited(retry_after))
    answer = await client.send(proxy, ask(), {"X-Proxy-Timeout": "20s"})
    assert (answer.status, upstream.count) == (429, 1)
    assert answer.json()["error"]["code"] == "rate_limit_exceeded"
    assert answer.headers["Retry-After"] == retry_after
    assert answer.seconds < AT_ONCE


@pytest.mark.parametrize("retry_after", ["-5", "soon", "1e400", ""])
async def test_nonsense_in_retry_after_is_ignored(
    launch: Launch, upstream: ScriptedUpstream, client: Client, retry_after: str
) -> None:
    proxy = launch(settings(upstream.port))
    upstream.queue(CHAT, upstream_answers.error(503, "later", None, "server_error", retry_after=retry_after))
    answer = await client.send(proxy, ask())
    assert (answer.status, upstream.count) == (200, 2)
    assert answer.seconds < AT_ONCE


# One deadline.


async def test_a_silent_upstream_is_a_504_at_the_deadline(
    proxy: ProxyProcess, upstream: ScriptedUpstream, client: Client
) -> None:
    upstream.always(stall())
    answer = await client.send(proxy, ask(), {"X-Proxy-Timeout": "500ms"})
    assert (answer.status, answer.error) == (504, "upstream_timeout")
    assert 0.4 < answer.seconds < AT_ONCE
    await upstream.until(lambda: upstream.last.peer_gone)


@pytest.mark.parametrize("header", ["X-Stainless-Read-Timeout", "X-Stainless-Timeout"])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/files/file-1"])
async def test_no_retry_outlasts_the_clients_own_timeout(
    launch: Launch, upstream: ScriptedUpstream, client: Client, header: str, path: str
) -> None:
    proxy = launch(settings(upstream.port, retry={"base_delay": "1500ms", "jitter": "0s", "max_retries": 10}))
    upstream.always(upstream_answers.server_error())
    answer = await client.send(proxy, ask() if "chat" in path else None, {header: "2"}, path=path)
    assert answer.status == 500
    assert answer.seconds < 2


async def test_the_deadline_spans_attempts_and_pauses(
    launch: Launch, upstream: ScriptedUpstream, client: Client
) -> None:
    proxy = launch(settings(upstream.port, retry={"base_delay": "400ms", "jitter": "0s", "max_retries": 10}))
    upstream.always(sleep(0.2), upstream_answers.server_error())
    answer = await client.send(proxy, ask(), {"X-Proxy-Timeout": "1s"})
    assert answer.status in (500, 504)
    assert answer.seconds < AT_ONCE  # all pauses together: more than twice as long


async def test_first_byte_and_total_timeouts(launch: Launch, upstream: ScriptedUpstream, client: Client) -> None:
    for timeouts in ({"first_byte": "400ms"}, {"total": "400ms"}):
        proxy = launch(settings(upstream.port, timeouts=timeouts, retry={"max_retries": 0}))
        upstream.always(stall())
        for stream in (False, True):
            answer = await client.send(proxy, ask(stream=stream))
            assert (answer.status, answer.error) == (504, "upstream_timeout")
            assert answer.seconds < AT_ONCE


async def test_total_bounds_a_plain_body(launch: Launch, upstream: ScriptedUpstream, client: Client) -> None:
    proxy = launch(settings(upstream.port, timeouts={"total": "500ms"}, retry={"max_retries": 0}))
    upstream.always(send(upstream_answers.response(200, upstream_answers.completion())[:-10]), stall())
    answer = await client.send(proxy, ask())
    assert (answer.status, answer.error) == (504, "upstream_timeout")


# Connections that fail.


async def test_a_refused_connection_is_a_502(launch: Launch, upstream: ScriptedUpstream, client: Client) -> None:
    proxy = launch(settings(upstream.port))
    with upstream.refusing():
        answer = await client.send(proxy, ask())
    assert (answer.status, answer.error) == (502, "upstream_unreachable")
    assert answer.headers["X-Should-Retry"] == "false"
    assert upstream.count == 0


async def test_a_refusal_that_passes_is_not_seen(launch: Launch, upstream: ScriptedUpstream, client: Client) -> None:
    proxy = launch(settings(upstream.port, retry={"base_delay": "300ms"}))
    with upstream.refusing():
        asking = asyncio.create_task(client.send(proxy, ask()))
        await asyncio.sleep(0.2)
    assert (await asking).status == 200


async def test_a_reset_before_the_request_is_read(launch: Launch, upstream: ScriptedUpstream, client: Client) -> None:
    proxy = launch(settings(upstream.port))
    upstream.reset_on_accept = 1
    assert (await client.send(proxy, ask())).status == 200


@pytest.mark.parametrize("end", [cut(), reset()], ids=["fin", "rst"])
async def test_a_connection_lost_before_a_response_is_retried_if_allowed(
    launch: Launch, upstream: ScriptedUpstream, client: Client, end: Step
) -> None:
    proxy = launch(settings(upstream.port))
    upstream.queue(CHAT, end)
    answer = await client.send(proxy, ask())
    assert (answer.status, upstream.count) == (200, 2)


async def test_without_ambiguous_a_lost_connection_is_not_retried(
    launch: Launch, upstream: ScriptedUpstream, client: Client
) -> None:
    proxy = launch(settings(upstream.port, retry={"ambiguous": False}))
    upstream.always(cut())
    answer = await client.send(proxy, ask())
    assert (answer.status, upstream.count) == (502, 1)
    assert answer.error in ("upstream_unreachable", "upstream_invalid_response")


async def test_connections_closed_while_idle_cost_nothing(
    launch: Launch, upstream: ScriptedUpstream, client: Client
) -> None:
    proxy = launch(settings(upstream.port, retry={"max_retries": 0, "ambiguous": False}))
    for _ in range(20):
        assert (await client.send(proxy, ask())).status == 200
        upstream.close_connections()
        await asyncio.sleep(0.02)
    assert upstream.count == 20


async def test_a_kept_alive_connection_that_dies_on_use_is_replaced(
    launch: Launch, upstream: ScriptedUpstream, client: Client
) -> None:
    proxy = launch(settings(upstream.port))

    def script(request: Request) -> Answer:
        return cut() if request.nth > 1 else upstream_answers.behave(request)

    upstream.script = script
    answers = [await client.send(proxy, ask()) for _ in range(4)]
    assert [a.status for a in answers] == [200] * 4
    assert upstream.count <= 7  # each at most once more


PARTS = {
    "half a status line": send(b"HTTP/1.1 2"),
    "half the headers": send(b"HTTP/1.1 200 OK\r\nContent-Type: applica"),
    "half the body": send(upstream_answers.response(200, upstream_answers.completion())[:-20]),
    "half a chunk": send(upstream_answers.head(200, [("Transfer-Encoding", "chunked")]) + b"ff\r\n{"),
    "no last chunk": send(
        upstream_answers.head(200, [("Transfer-Encoding", "chunked")]) + upstream_answers.chunked(b"{}")
    ),
    "not HTTP": send(b"SSH-2.0-OpenSSH_9.6\r\n\r\n"),
}


@pytest.mark.parametrize("part", PARTS.values(), ids=PARTS.keys())
@pytest.mark.parametrize("end", [cut(), reset()], ids=["fin", "rst"])
async def test_an_answer_that_breaks_off_is_502_and_sent_once(
    proxy: ProxyProcess, upstream: ScriptedUpstream, client: Client, part: Step, end: Step
) -> None:
    upstream.always(part, sleep(0.05), end)
    answer = await client.send(proxy, ask())
    assert upstream.count == 1  # a byte of answer came: no retry
    assert answer.status == 502
    if part in (PARTS["half a status line"], PARTS["half the headers"]):
        # No body was cut yet, so either code is right.
        assert answer.error in ("upstream_invalid_response", "upstream_unreachable")
    else:
        assert answer.error == "upstream_invalid_response"


@pytest.mark.parametrize("cut_at", [-8, 30])
async def test_a_cut_gzip_answer_is_502(
    proxy: ProxyProcess, upstream: ScriptedUpstream, client: Client, cut_at: int
) -> None:
    upstream.always(upstream_answers.gzipped(upstream_answers.completion(), cut_at))
    answer = await client.send(proxy, ask())
    assert (answer.status, answer.error) == (502, "upstream_invalid_response")


# Other routes are sent once.


async def test_other_posts_are_sent_once_and_gets_again(
    launch: Launch, upstream: ScriptedUpstream, client: Client
) -> None:
    proxy = launch(settings(upstream.port))
    upstream.queue("/v1/files", upstream_answers.server_error(503), upstream_answers.server_error(503))
    posted = await client.send(proxy, b"data", {"Content-Type": "application/octet-stream"}, "/v1/files")
    assert (posted.status, upstream.count) == (503, 1)
    got = await client.get(proxy, "/v1/files")
    assert (got.status, upstream.count) == (200, 3)


async def test_an_upload_to_a_refused_connection_is_a_502(
    launch: Launch, upstream: ScriptedUpstream, client: Client
) -> None:
    proxy = launch(settings(upstream.port, retry={"max_retries": 1}))
    with upstream.refusing():
        answer = await client.send(proxy, b"data", {"Content-Type": "text/csv"}, "/v1/files")
    assert (answer.status, answer.error) == (502, "upstream_unreachable")


# Together they do not make a storm.


async def test_the_budget_holds_over_requests(launch: Launch, upstream: ScriptedUpstream, client: Client) -> None:
    proxy = launch(settings(upstream.port))
    upstream.always(upstream_answers.server_error(503))
    for _ in range(3):
        await asyncio.gather(*(client.send(proxy, ask()) for _ in range(10)))
    # 30 requests, a floor of 10 retries, and 0.2 of the requests beyond it
    assert 30 + 10 <= upstream.count <= 30 + 10 + 6 + 1


async def test_pauses_are_jittered(launch: Launch, upstream: ScriptedUpstream, client: Client) -> None:
    proxy = launch(settings(upstream.port, retry={"base_delay": "10ms", "jitter": "500ms", "max_retries": 1}))
    seen: set[str] = set()

    def script(request: Request) -> Answer:
        prompt = request.json()["messages"][0]["content"]
        first = prompt not in seen
        seen.add(prompt)
        return upstream_answers.server_error(503) if first else upstream_answers.behave(request)

    upstream.script = script
    await asyncio.gather(*(client.send(proxy, ask()) for _ in range(10)))
    again = [r.at for r in upstream.requests][10:]
    assert len(again) == 10
    assert max(again) - min(again) > 0.1
