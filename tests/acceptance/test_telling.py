"""What an operator reads of keys, retries and errors in log, metrics and report (docs/metrics-and-logs.md)."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any

import pytest

from tests import upstream_answers
from tests.client import Client, ask
from tests.launch import Launch, ProxyProcess, secret, settings
from tests.ledger import Request
from tests.scripted_upstream import Answer, ScriptedUpstream


def lines(proxy: ProxyProcess) -> list[dict[str, Any]]:
    """Return the lines of a JSON log: every line of the process must be one."""
    return [json.loads(line) for line in proxy.stderr_so_far().splitlines()]


async def logged(proxy: ProxyProcess, count: int, seconds: float = 1.0, **fields: str) -> list[dict[str, Any]]:
    """Return the lines with these fields as soon as there are `count`. Raises AssertionError after `seconds`."""
    end = time.monotonic() + seconds
    while True:
        found = [line for line in proxy.stderr_so_far().splitlines() if line.startswith("{")]
        got = [line for line in map(json.loads, found) if fields.items() <= line.items()]
        if len(got) >= count:
            return got
        assert time.monotonic() < end, proxy.stderr_so_far()
        await asyncio.sleep(0.02)


@pytest.mark.parametrize("workers", [1, 2])
async def test_two_of_three_keys_that_die_have_one_line_each(
    launch: Launch, upstream: ScriptedUpstream, client: Client, workers: int
) -> None:
    config = settings(upstream.port, ["k1", "k2", "k3"], log={"format": "json"}, server={"workers": workers})
    proxy = launch(config)

    def script(request: Request) -> Answer:
        if request.key == secret("k1"):
            return upstream_answers.unauthorized()
        if request.key == secret("k2"):
            return upstream_answers.insufficient_quota()
        return upstream_answers.behave(request)

    upstream.script = script
    await asyncio.gather(*(client.send(proxy, ask(str(number))) for number in range(12)))
    first = await logged(proxy, 1, kind="key", name="k1", state="rejected")
    second = await logged(proxy, 1, kind="key", name="k2", state="exhausted")
    for number in range(12, 18):
        assert (await client.send(proxy, ask(str(number)))).status == 200
    await asyncio.sleep(0.3)
    assert await logged(proxy, 1, kind="key") in ([*first, *second], [*second, *first])
    assert first[0]["level"] == second[0]["level"] == "warning"
    assert "401" in first[0]["message"]
    assert "insufficient_quota" in second[0]["message"]
    assert "until" in first[0]
    retried = next(line for line in lines(proxy) if "retries" in line)
    assert retried["retries"].startswith(("k1: 401", "k2: 429 insufficient_quota"))
    text = (await client.get(proxy, "/metrics")).body.decode()
    assert 'openai_proxy_state_changes_total{kind="key",name="k2",state="exhausted"}' in text
    assert 'openai_proxy_upstream_errors_total{code="insufficient_quota",status="429",upstream="openai"}' in text
    assert 'openai_proxy_upstream_last_success_timestamp_seconds{upstream="openai"' in text


async def test_errors_are_told_apart_by_the_upstream_s_own_code(
    launch: Launch, upstream: ScriptedUpstream, client: Client
) -> None:
    proxy = launch(settings(upstream.port, log={"format": "json"}, ledger={"enabled": True}))
    for code in ("context_length_exceeded", "content_filter", "made_up_by_this_server"):
        upstream.always(upstream_answers.error(400, "no", code))
        assert (await client.send(proxy, ask(code))).status == 400
        (line,) = await logged(proxy, 1, upstream_code=code)
        assert line["error"] == "upstream_400"
    text = (await client.get(proxy, "/metrics")).body.decode()
    for label in ("context_length_exceeded", "content_filter", "other"):
        assert f'openai_proxy_upstream_errors_total{{code="{label}",status="400",upstream="openai"}} 1.0' in text
    usage = (await client.get(proxy, "/_proxy/usage?by=error")).json()
    errors = {row["error"] for row in usage["rows"]}
    assert {"upstream_400 context_length_exceeded", "upstream_400 content_filter"} <= errors


async def test_a_pool_key_as_a_model_or_a_code_is_nowhere(
    launch: Launch, upstream: ScriptedUpstream, client: Client
) -> None:
    proxy = launch(settings(upstream.port, log={"format": "json", "level": "debug"}))
    escaped = f"\\u{ord(secret('k1')[0]):04x}{secret('k1')[1:]}"
    body = json.dumps(upstream_answers.completion("Hi", model="MODEL")).replace("MODEL", escaped)
    upstream.always(upstream_answers.reply(200, body.encode()))
    answer = await client.send(proxy, ask("1"))
    shown = [(await client.get(proxy, f"/_proxy/requests/{answer.headers['X-Proxy-Request-Id']}")).body.decode()]
    upstream.always(upstream_answers.error(429, "no", secret("k1")))
    await client.send(proxy, ask("2"), headers={"X-Proxy-Max-Wait": "0"})
    for path in ("/_proxy/keys", "/_proxy/usage?by=error", "/metrics"):
        shown.append((await client.get(proxy, path)).body.decode())
    assert not [text for text in (*shown, proxy.stderr_so_far()) if secret("k1") in text]
