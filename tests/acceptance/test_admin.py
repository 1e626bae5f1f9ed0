"""`openai-proxy cache` and `/_proxy/cache` while proxies run: purge, export, import (docs/caching.md)."""

from __future__ import annotations

import asyncio
import json
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cache.stores.kit import Valkey, valkey
from tests.client import Client, Reply, ask
from tests.launch import Config, Launch, ProxyProcess, run_command, secret, settings
from tests.scripted_upstream import ScriptedUpstream

PURGED_WITHIN = 4.0
"""Seconds: two are promised; the rest is for a busy machine."""


@pytest.fixture
def server() -> Iterator[Valkey]:
    with valkey() as running:
        yield running


@pytest.fixture(params=["sqlite", "redis"])
def shared(request: pytest.FixtureRequest, upstream: ScriptedUpstream, tmp_path: Path) -> Config:
    """Settings with a store that outlives the process."""
    if request.param == "sqlite":
        return settings(upstream.port, cache={"backend": "sqlite", "path": str(tmp_path / "cache.db")})
    url = request.getfixturevalue("server").url
    return settings(upstream.port, cache={"backend": "redis"}, redis={"url": url})


def on_disk(port: int, path: Path, **sections: Any) -> Config:
    return settings(port, cache={"backend": "sqlite", "path": str(path)}, **sections)


async def command(directory: Path, config: Config | None, *args: str, status: int = 0, **env: str) -> str:
    """What `openai-proxy cache …` prints, on stderr where it fails; the loop goes on meanwhile."""
    done = await asyncio.to_thread(run_command, directory, ["cache", *args], config, env)
    assert done.returncode == status, (done.stdout, done.stderr)
    return done.stderr if status else done.stdout


async def listed(directory: Path, config: Config | None, *args: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(await command(directory, config, "list", "--format", "json", *args))
    return found


async def stored(client: Client, proxy: ProxyProcess, count: int) -> None:
    """Returns when so many entries have been written."""
    async with asyncio.timeout(10):
        while (await client.get(proxy, "/_proxy/status")).json()["cache"].get("entries") != count:  # noqa: ASYNC110
            await asyncio.sleep(0.05)


async def misses_within(seconds: float, client: Client, proxy: ProxyProcess, question: Any) -> None:
    """Asks with `only-if-cached`, which stores nothing, until there is nothing any more."""
    end = time.monotonic() + seconds
    while (await client.send(proxy, question, {"Cache-Control": "only-if-cached"})).status != 504:
        assert time.monotonic() < end, f"still a hit after {seconds} s"
        await asyncio.sleep(0.05)


QUESTIONS: list[tuple[dict[str, Any], dict[str, str]]] = [
    (ask("one"), {"X-Proxy-Tag": "team:ads"}),
    (ask("two", model="gpt-4o-mini"), {"X-Proxy-Cache-Namespace": "ci"}),
    (ask("three", stream=True), {"X-Proxy-Tag": "team:ads", "X-Proxy-Cache-TTL": "2h"}),
]


async def asked(client: Client, proxy: ProxyProcess) -> list[Reply]:
    return [await client.send(proxy, question, headers) for question, headers in QUESTIONS]


async def test_a_purge_by_command_empties_the_memory_of_running_proxies(
    launch: Launch, upstream: ScriptedUpstream, client: Client, tmp_path: Path, shared: Config
) -> None:
    one, two = launch(shared), launch(shared)
    result = await asked(client, one)
    await stored(client, two, 3)
    for proxy in (one, two):
        assert [reply.cache for reply in await asked(client, proxy)] == ["hit"] * 3
    key = result[0].headers["X-Proxy-Cache-Key"]
    assert await command(tmp_path, shared, "purge", "--key", key[:12], "--dry-run") == (
        "1 entry would be purged (dry run)\n"
    )
    assert await command(tmp_path, shared, "purge", "--key", key[:12]) == "1 entry purged\n"
    for proxy in (one, two):
        await misses_within(PURGED_WITHIN, client, proxy, QUESTIONS[0][0])
        for question, headers in QUESTIONS[1:]:
            assert (await client.send(proxy, question, headers)).cache == "hit"
    assert upstream.count == 3
    assert await command(tmp_path, shared, "purge", "--all") == "2 entries purged\n"
    for proxy in (one, two):
        await misses_within(PURGED_WITHIN, client, proxy, QUESTIONS[2][0])


@pytest.mark.parametrize(
    ("flags", "count"),
    [
        (["--model", "gpt-4o-mini"], 1),
        (["--endpoint", "chat"], 3),
        (["--endpoint", "embeddings"], 0),
        (["--namespace", "ci"], 1),
        (["--namespace", ""], 2),
        (["--tag", "team:ads"], 2),
        (["--tag", "team:ads", "--model", "gpt-4o"], 2),
        (["--older-than", "1h"], 0),
        (["--older-than", "0s"], 3),
        (["--all"], 3),
    ],
)
async def test_a_purge_by_every_filter(
    kept: tuple[Config, list[Reply]], tmp_path: Path, flags: list[str], count: int
) -> None:
    config, _ = kept
    for dry_run in (["--dry-run"], []):
        said = json.loads(await command(tmp_path, config, "purge", *flags, *dry_run, "--format", "json"))
        assert said == {"purged": count, "dry_run": bool(dry_run)}
    assert len(await listed(tmp_path, config)) == 3 - count


@pytest.fixture
async def kept(
    launch: Launch, upstream: ScriptedUpstream, client: Client, tmp_path: Path
) -> tuple[Config, list[Reply]]:
    """A store with the three answers in it, and no proxy at it."""
    config = on_disk(upstream.port, tmp_path / "kept.db")
    proxy = launch(config)
    replies = await asked(client, proxy)
    proxy.terminate()
    assert proxy.wait() == 0
    return config, replies


async def test_exported_entries_are_hits_after_import_elsewhere(
    launch: Launch, upstream: ScriptedUpstream, client: Client, tmp_path: Path, kept: tuple[Config, list[Reply]]
) -> None:
    config, result = kept
    file = tmp_path / "answers.jsonl"
    assert await command(tmp_path, config, "export", str(file)) == f"3 entries exported to {file}\n"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    lines = file.read_bytes().splitlines()
    assert [json.loads(line)["key"] for line in lines] == sorted(json.loads(line)["key"] for line in lines)
    assert secret("k1").encode() not in file.read_bytes()
    fresh = on_disk(upstream.port, tmp_path / "fresh" / "cache.db")
    assert "3 new, 0 replaced, 0 skipped" in await command(tmp_path, fresh, "import", str(file))
    assert "0 new, 3 replaced, 0 skipped" in await command(tmp_path, fresh, "import", str(file))
    again = tmp_path / "again.jsonl"
    await command(tmp_path, fresh, "export", str(again))
    assert again.read_bytes() == file.read_bytes()
    proxy = launch(fresh)
    for before, after in zip(result, await asked(client, proxy), strict=True):
        assert (after.cache, after.body) == ("hit", before.body)
    assert upstream.count == 3


async def test_a_bad_line_is_named_and_nothing_is_imported(
    upstream: ScriptedUpstream, tmp_path: Path, kept: tuple[Config, list[Reply]]
) -> None:
    config, _ = kept
    file = tmp_path / "answers.jsonl"
    await command(tmp_path, config, "export", str(file))
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(lines[0] + lines[1].replace(b'"cassette":1', b'"cassette":9') + lines[2])
    fresh = on_disk(upstream.port, tmp_path / "fresh" / "cache.db")
    said = await command(tmp_path, fresh, "import", str(file), status=1)
    assert said == (f"openai-proxy cache import: {file}:2: expected an entry of cassette version 1, found 9\n")
    assert not (tmp_path / "fresh").exists()
    assert "there is no cache file" in await command(tmp_path, fresh, "list", status=1)


async def test_the_memory_of_a_running_proxy_over_http(
    launch: Launch, upstream: ScriptedUpstream, client: Client, tmp_path: Path
) -> None:
    config = settings(upstream.port, server={"admin_key": "the-admin-key"})
    proxy, other = launch(config), launch(config)
    result = await asked(client, proxy)
    at = ["--url", proxy.base_url]
    assert "responses are only in the running proxy's memory; ask it with --url" in await command(
        tmp_path, config, "list", status=2
    )
    assert "401" in await command(tmp_path, None, "list", *at, status=1)
    assert {one["model"] for one in await listed(tmp_path, config, *at)} == {"gpt-4o", "gpt-4o-mini"}
    stats = json.loads(await command(tmp_path, config, "stats", *at, "--format", "json"))
    assert (stats["backend"], stats["entries"], len(stats["models"])) == ("memory", 3, 2)
    key = result[0].headers["X-Proxy-Cache-Key"]
    shown = json.loads(await command(tmp_path, config, "show", key[:10], "--body", *at, "--format", "json"))
    assert (shown["key"], shown["forms"][0]["body"].encode()) == (key, result[0].body)
    file = tmp_path / "answers.jsonl"
    await command(tmp_path, config, "export", str(file), *at)
    assert "3 new" in await command(tmp_path, config, "import", str(file), "--url", other.base_url)
    for before, after in zip(result, await asked(client, other), strict=True):
        assert (after.cache, after.body) == ("hit", before.body)
    assert await command(tmp_path, None, "purge", "--all", *at, PROXY__SERVER__ADMIN_KEY="the-admin-key") == (
        "3 entries purged\n"
    )
    await misses_within(0.1, client, proxy, QUESTIONS[0][0])


async def test_list_show_and_stats_as_text(tmp_path: Path, kept: tuple[Config, list[Reply]]) -> None:
    config, result = kept
    key = result[0].headers["X-Proxy-Cache-Key"]
    for args in (["stats"], ["list"], ["list", "--limit", "1"], ["show", key[:8], "--body"]):
        said = await command(tmp_path, config, *args)
        assert all(len(line) <= 80 for line in said.splitlines() if not line.startswith(("where:", "key:", "{")))
    assert "1 of 3 shown; --limit 0 shows all" in await command(tmp_path, config, "list", "--limit", "1")
    said = await command(tmp_path, config, "show", key)
    assert all(text in said for text in ("team:ads", "gpt-4o", "0.002250 USD", "23h left"))
    assert "no stored response has a key that begins with 'zz'" in await command(
        tmp_path, config, "show", "zz", status=1
    )


@pytest.mark.parametrize(
    ("args", "why"),
    [
        ([], "SUBCOMMAND"),
        (["nothing"], "nothing"),
        (["purge"], "a purge needs a filter, or --all"),
        (["purge", "--dry-run"], "a purge needs a filter, or --all"),
        (["purge", "--all", "--tag", "a:b"], "--all goes without filters"),
        (["purge", "--older-than", "soon"], "a duration such as"),
        (["purge", "--endpoint", "files"], "invalid choice"),
        (["purge", "--key", ""], "expected a key"),
        (["show"], "KEY"),
        (["export"], "FILE"),
        (["list", "--limit", "few"], "expected a number"),
        (["list", "--format", "xml"], "invalid choice"),
        (["list", "--url", "ftp://host"], "--url: expected a base URL"),
        (["list", "--cache", "off"], "cache.backend is off"),
        (["list", "--cache", "memory"], "--url http://127.0.0.1:8484"),
        (["list", "--cache", "disk"], "cache.backend"),
    ],
)
def test_wrong_arguments_are_refused(tmp_path: Path, args: list[str], why: str) -> None:
    done = run_command(tmp_path, ["cache", *args])
    assert (done.returncode, done.stdout) == (2, "")
    assert why in done.stderr


def test_the_admin_key_does_not_go_over_plain_http(tmp_path: Path) -> None:
    env = {"PROXY__SERVER__ADMIN_KEY": "the-admin-key"}
    done = run_command(tmp_path, ["cache", "list", "--url", "http://192.0.2.1:8484"], env=env)
    assert done.returncode == 2
    assert "use https" in done.stderr
    assert "the-admin-key" not in done.stderr


@pytest.mark.parametrize("args", [["list"], ["purge", "--all"], ["import", "answers.jsonl"]])
def test_a_broken_store_is_reported(tmp_path: Path, args: list[str]) -> None:
    (tmp_path / "answers.jsonl").touch()
    done = run_command(tmp_path, ["cache", *args, "--cache", "redis"], env={"REDIS_URL": "redis://:word@127.0.0.1:1"})
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 1)
    assert done.stderr.startswith(f"openai-proxy cache {args[0]}: redis: ")
    assert "word" not in done.stderr
    wrong = tmp_path / "notes.txt"
    wrong.write_text("somebody's notes, which are no database")
    done = run_command(tmp_path, ["cache", *args, "--cache", "sqlite"], env={"PROXY__CACHE__PATH": str(wrong)})
    assert (done.returncode, done.stderr) == (
        1,
        f"openai-proxy cache {args[0]}: {wrong} is not a cache file; check cache.path\n",
    )
    assert wrong.read_text().startswith("somebody's")


def test_no_proxy_at_the_url(tmp_path: Path) -> None:
    done = run_command(tmp_path, ["cache", "list", "--url", "http://127.0.0.1:1"])
    assert done.returncode == 1
    assert "http://127.0.0.1:1 is not reached" in done.stderr
