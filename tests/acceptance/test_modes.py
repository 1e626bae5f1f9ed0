"""Record, replay, refresh and stale responses (docs/record-and-replay.md, docs/caching.md)."""

from __future__ import annotations

import asyncio
import os
import stat
from pathlib import Path
from typing import Any

import openai
import pytest

from tests import upstream_answers
from tests.client import Client, Reply, ask
from tests.launch import Config, Launch, ProxyProcess, merge, run_command, secret, settings
from tests.scripted_upstream import ScriptedUpstream

EMBEDDINGS = {"model": "text-embedding-3-small", "input": ["one", "two"]}
UNREACHABLE = "http://127.0.0.1:9/v1"


def named(port: int, **sections: object) -> Config:
    """An upstream whose place in the cache key has a name."""
    config = settings(port, **sections)
    config["upstreams"][0]["cache_as"] = "recorded"
    return config


def keyless(**sections: object) -> Config:
    """The same upstream as CI has it: somewhere else, and with a key that is not there."""
    upstream = {"name": "other", "base_url": UNREACHABLE, "cache_as": "recorded", "keys": ["${OPENAI_API_KEY}"]}
    return merge({"upstreams": [upstream], "log": {"level": "debug"}}, sections)


async def three(client: Client, proxy: ProxyProcess, headers: dict[str, str] | None = None) -> list[Reply]:
    return [
        await client.send(proxy, ask("one"), headers),
        await client.send(proxy, ask("two", stream=True), headers),
        await client.send(proxy, EMBEDDINGS, headers, path="/v1/embeddings"),
    ]


def stop(proxy: ProxyProcess) -> None:
    proxy.terminate()
    assert proxy.wait() == 0


async def test_a_cassette_is_recorded_and_replayed_elsewhere(
    launch: Launch, upstream: ScriptedUpstream, client: Client, tmp_path: Path
) -> None:
    file = tmp_path / "cassette.jsonl"
    recorder = launch(named(upstream.port), args=["--cassette", str(file)])
    assert f"cassette: recording into {file} (0 answers there)" in recorder.stderr_so_far()
    result = await three(client, recorder)
    assert [reply.cache for reply in result] == ["miss", "miss", "miss"]
    stop(recorder)
    first = file.read_bytes()
    assert stat.S_IMODE(os.stat(file).st_mode) == 0o600
    assert secret("k1").encode() not in first

    moved = tmp_path / "deep" / "moved.jsonl"
    moved.parent.mkdir()
    file.rename(moved)
    player = launch(keyless(), args=["--mode", "replay", "--cassette", str(moved)])
    assert "keys: none needed (replay: nothing is sent upstream)" in player.stderr_so_far()
    for _ in range(2):
        for reply, was in zip(await three(client, player), result, strict=True):
            assert (reply.status, reply.cache, reply.body) == (200, "hit", was.body)
            assert reply.headers["X-Proxy-Cost-USD"] == "0.000000"
    stop(player)
    assert moved.read_bytes() == first

    again = launch(named(upstream.port), args=["--cassette", str(moved)])
    assert [reply.body for reply in await three(client, again)] == [reply.body for reply in result]
    stop(again)
    assert moved.read_bytes() == first
    assert upstream.count == 3


async def test_replay_sends_nothing_upstream(
    launch: Launch, upstream: ScriptedUpstream, client: Client, tmp_path: Path
) -> None:
    file = tmp_path / "c"
    file.touch()
    config = settings(upstream.port, cache={"mode": "replay", "cassette": str(file)})
    proxy = launch(config)
    for path, body in (
        ("/v1/chat/completions", ask("one")),
        ("/v1/chat/completions", ask("one", store=True)),
        ("/v1/embeddings", EMBEDDINGS),
        ("/v1/models", None),
        ("/v1/files/file-1", None),
        ("/v1/images/generations", {"prompt": "a"}),
        ("/openai/deployments/d/chat/completions?api-version=1", ask("one")),
    ):
        reply = await client.send(proxy, body, path=path)
        assert (reply.status, reply.error) == (504, "not_cached"), path
        assert reply.headers["X-Should-Retry"] == "false"
    assert upstream.count == 0
    with pytest.raises(openai.InternalServerError) as caught:  # once, and its message helps
        openai.OpenAI(base_url=proxy.base_url, api_key="unused").chat.completions.create(
            model="gpt-4o", messages=[{"role": "user", "content": "one"}]
        )
    assert "looked for chat, model 'gpt-4o', upstream" in str(caught.value)


async def test_the_sdk_records_and_replays(launch: Launch, upstream: ScriptedUpstream, tmp_path: Path) -> None:
    file = tmp_path / "c"

    def talk(proxy: ProxyProcess, key: str) -> list[object]:
        sdk = openai.OpenAI(base_url=proxy.base_url, api_key=key)
        messages: Any = [{"role": "user", "content": "Hello"}]
        plain = sdk.chat.completions.create(model="gpt-4o", messages=messages)
        stream = sdk.chat.completions.create(model="gpt-4o", messages=messages, stream=True)
        return [plain, list(stream), sdk.embeddings.create(model="text-embedding-3-small", input="a")]

    passing = {"upstreams": [{"base_url": f"http://127.0.0.1:{upstream.port}/v1", "cache_as": "recorded"}]}
    recorder = launch(passing, args=["--cassette", str(file)])
    was = await asyncio.to_thread(talk, recorder, secret("mine"))
    stop(recorder)
    assert b"c0ffee" not in file.read_bytes()
    player = launch(keyless(), args=["--mode", "replay", "--cassette", str(file)])
    assert await asyncio.to_thread(talk, player, secret("another")) == was


@pytest.mark.parametrize("backend", ["sqlite"])
async def test_replay_from_the_cache_ignores_whose_key_recorded(
    launch: Launch, upstream: ScriptedUpstream, client: Client, tmp_path: Path, backend: str
) -> None:
    cache = {"backend": backend, "path": str(tmp_path / "cache.db")}
    keys = [{"name": name, "key": f"{name}-long-enough-a-key"} for name in ("ann", "bob")]
    ann, bob = ({"Authorization": f"Bearer {key['key']}"} for key in keys)
    recorder = launch(named(upstream.port, cache=cache, server={"client_keys": keys}))
    result = await client.send(recorder, ask("one"), ann)
    await client.send(recorder, ask("two"), ann | {"X-Proxy-Cache-Namespace": "ci"})
    stop(recorder)
    player = launch(keyless(cache=cache | {"mode": "replay"}, server={"client_keys": keys}))
    reply = await client.send(player, ask("one"), bob)
    assert (reply.cache, reply.body) == ("hit", result.body)
    assert (await client.send(player, ask("one"))).status == 401  # clients are still authenticated
    assert (await client.send(player, ask("two"), bob)).error == "not_cached"
    assert (await client.send(player, ask("two"), bob | {"X-Proxy-Cache-Namespace": "ci"})).cache == "hit"


def test_an_unusable_cassette_is_an_error_at_the_start(tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text("\n<<<<<<< HEAD\n")
    replay = ["serve", "--port", "0", "--mode", "replay"]
    for args, said in (
        ([*replay, "--cassette", str(bad)], f"{bad}:2: not JSON"),
        (["serve", "--port", "0", "--cassette", str(bad)], f"{bad}:2: not JSON"),
        ([*replay, "--cassette", str(tmp_path / "none")], "expected a file of recorded answers, found none"),
        (["serve", "--port", "0", "--cassette", str(tmp_path / "no" / "c")], "expected a place to write it to"),
        ([*replay, "--cache", "off"], "expected a cache to go with it, found backend: off"),
    ):
        done = run_command(tmp_path, args)
        assert (done.returncode, done.stdout) == (2, ""), done.stderr
        assert said in done.stderr


async def test_two_recorders_share_a_file(
    launch: Launch, upstream: ScriptedUpstream, client: Client, tmp_path: Path
) -> None:
    file = tmp_path / "c"
    two = [launch(named(upstream.port), args=["--cassette", str(file)]) for _ in range(2)]
    for number, proxy in enumerate(two):
        await client.send(proxy, ask(f"question {number}"))
    for proxy in two:
        proxy.terminate()
    assert [proxy.wait() for proxy in two] == [0, 0]
    assert len(file.read_bytes().splitlines()) == 2
    assert not list(tmp_path.glob(".c.*"))


async def test_refresh_asks_again(launch: Launch, upstream: ScriptedUpstream, client: Client) -> None:
    proxy = launch(settings(upstream.port), args=["--mode", "refresh"])
    for _ in range(2):
        reply = await client.send(proxy, ask("one"))
        assert (reply.cache, reply.headers["X-Proxy-Cache-Reason"]) == ("miss", "refresh")
    assert upstream.count == 2


async def test_stale_while_revalidate(launch: Launch, upstream: ScriptedUpstream, client: Client) -> None:
    proxy = launch(settings(upstream.port, cache={"ttl": {"chat": "1s"}, "stale_while_revalidate": "1h"}))
    result = await client.send(proxy, ask("one"))
    await asyncio.sleep(1.1)
    reply = await client.send(proxy, ask("one"))
    assert (reply.cache, reply.body) == ("stale", result.body)
    assert reply.headers["Cache-Status"].startswith("openai-proxy; hit; ttl=")
    assert reply.headers["Cache-Status"].endswith("; detail=stale-while-revalidate")
    assert int(reply.headers["Age"]) >= 1
    assert (reply.headers["X-Proxy-Cost-USD"], reply.headers["X-Proxy-Attempts"]) == ("0.000000", "0")
    assert "X-Proxy-Cost-Saved-USD" in reply.headers
    receipt = await client.receipt(proxy, reply.headers["X-Proxy-Request-Id"])
    assert (receipt["cache"], receipt["cost_usd"]) == ("stale", "0.000000")
    for _ in range(100):
        if upstream.count == 2:
            break
        await asyncio.sleep(0.02)
    assert upstream.count == 2


async def test_stale_if_error(launch: Launch, upstream: ScriptedUpstream, client: Client) -> None:
    proxy = launch(
        settings(upstream.port, cache={"ttl": {"chat": "1s"}, "stale_if_error": "1h"}, retry={"max_retries": 1})
    )
    result = await client.send(proxy, ask("one"))
    await asyncio.sleep(1.1)
    upstream.script = lambda request: upstream_answers.server_error(503)
    reply = await client.send(proxy, ask("one"))
    assert (reply.status, reply.cache, reply.body) == (200, "stale", result.body)
    assert reply.headers["Cache-Status"].startswith("openai-proxy; fwd=stale; ttl=")
    assert reply.headers["X-Proxy-Cache-Reason"] == "stale-if-error: upstream_503"
    assert reply.headers["X-Proxy-Attempts"] == "2"
    refused = await client.send(proxy, ask("one"), {"Cache-Control": "stale-if-error=0"})
    assert refused.status == 503
    refused = await client.send(proxy, ask("one"), path="/_/stale-if-error=0/v1/chat/completions")
    assert refused.status == 503
