"""`mode: replay` and `mode: refresh`: what is asked of the upstream then, and whose answers are found."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import orjson
import pytest

from proxy.cache.stores.cassette import Entries, ReplayStore, open_cassette, read_file
from proxy.config.settings import CacheSettings, Settings
from proxy.protocol.options import Options
from proxy.protocol.request import Client
from tests.pipeline.clock import virtual_time
from tests.pipeline.fixture import CHAT, PipelineFixture, ask, pool, settings
from tests.pipeline.script import Move, completion, says, streams

ANN = Client("ann", "name ann", None)
BOB = Client("bob", "name bob", None)
LONG = 30 * 86400.0


async def recorded(file: Path, *moves: Move, **more: Any) -> PipelineFixture:
    """A pipeline that records; `closed` makes the file."""
    pipeline = PipelineFixture(*moves, config=settings(cache=CacheSettings(cassette=str(file), **more)))
    open_cassette(pipeline.services.store, str(file))
    return pipeline


async def closed(pipeline: PipelineFixture) -> None:
    await pipeline.services.store.close()


def replaying(file: Path, config: Settings | None = None) -> PipelineFixture:
    config = config or settings()
    pipeline = PipelineFixture(config=replace(config, cache=replace(config.cache, mode="replay", cassette=str(file))))
    open_cassette(pipeline.services.store, str(file))
    return pipeline


@virtual_time
async def test_a_recording_is_replayed_byte_for_byte_at_any_age(tmp_path: Path) -> None:
    file = tmp_path / "c.jsonl"
    record = await recorded(file, says(), streams())
    plain = await record.ask()
    streamed = await record.ask(ask("other", stream=True))
    await closed(record)
    pipeline = replaying(file)
    await pipeline.clock.sleep(LONG)
    for _ in range(2):
        hit = await pipeline.ask()
        assert (hit.status, hit.cache, hit.body) == (200, "hit", plain.body)
        hit = await pipeline.ask(ask("other", stream=True))
        assert (hit.cache, hit.body) == ("hit", streamed.body)
    # The same bytes again take the short way, and the other form is converted as ever.
    body = orjson.dumps(ask())
    request = pipeline.request(body=body)
    await pipeline.handler.handle(request, lambda: None, (CHAT, "", b"digest"))
    assert pipeline.handler.cache.peek((CHAT, "", b"digest")) is not None
    assert (await pipeline.ask(ask(stream=True))).cache == "hit"
    assert pipeline.transport.sent == []


@pytest.mark.parametrize(
    "options", [Options(no_cache=True), Options(max_age=0), Options(only_if_cached=True), Options(ttl=1.0)]
)
@virtual_time
async def test_replay_ignores_age(tmp_path: Path, options: Options) -> None:
    record = await recorded(tmp_path / "c", says())
    await record.ask()
    await closed(record)
    pipeline = replaying(tmp_path / "c")
    await pipeline.clock.sleep(LONG)
    assert (await pipeline.ask(None, options)).cache == "hit"


@virtual_time
async def test_replay_ignores_the_client_and_not_the_namespace(tmp_path: Path) -> None:
    file = tmp_path / "c"
    record = await recorded(file, says(completion("ann's")), says(completion("bob's")), says(completion("ci's")))
    assert (await record.ask(client=ANN)).cache == "miss"
    await record.clock.sleep(1.0)
    assert (await record.ask(client=BOB)).cache == "miss"  # recording keeps clients apart
    await record.ask(None, Options(namespace="ci"), client=ANN)
    await closed(record)
    assert b"bare" not in file.read_bytes()  # nothing made of a client or a credential is in the file
    pipeline = replaying(file)
    for client in (ANN, BOB, Client(), Client("", "credential 5eaf", ("bearer", "x"))):
        result = await pipeline.ask(client=client)
        assert result.json()["choices"][0]["message"]["content"] == "bob's"  # the newest
        result = await pipeline.ask(None, Options(namespace="ci"), client=client)
        assert result.json()["choices"][0]["message"]["content"] == "ci's"
    result = await pipeline.ask(None, Options(namespace="other"))
    assert result.refused == "not_cached"


@pytest.mark.parametrize(
    ("document", "options", "said"),
    [
        (ask(), Options(), "not recorded, and nothing is sent upstream; looked for chat, model 'gpt-4o', upstream "),
        (ask(), Options(namespace="ci", sample="3"), "namespace 'ci', sample '3'"),
        (ask(store=True), Options(), "never stored (uncacheable: store=true)"),
        (ask(), Options(no_store=True), "never stored (no-store)"),
    ],
)
@virtual_time
async def test_a_miss_is_a_504_with_the_key(document: Any, options: Options, said: str) -> None:
    pipeline = PipelineFixture(config=settings(cache=CacheSettings(mode="replay")))
    result = await pipeline.ask(document, options)
    assert (result.status, result.refused) == (504, "not_cached")
    assert result.refusal is not None
    assert result.refusal.should_retry is False
    assert said in result.refusal.message
    assert pipeline.transport.sent == []


@pytest.mark.parametrize(
    ("asked", "differs"),
    [(ask("Hi", temperature=1), "temperature"), (ask("Bye"), "messages"), (ask("Hi", top_p=1, n=2), "n, top_p")],
)
@virtual_time
async def test_a_miss_names_the_difference_to_the_nearest_recording(asked: Any, differs: str, tmp_path: Path) -> None:
    file = tmp_path / "c"
    record = PipelineFixture(says(), says(), config=settings(cache=CacheSettings(cassette=str(file))))
    await record.ask(ask("Hi"))
    await record.ask(ask("Quite another", seed=7, temperature=0.5, top_p=0.5))
    await closed(record)
    result = await replaying(file).ask(asked)
    assert result.refusal is not None
    assert f"replay: not recorded; differs: {differs}, and nothing is sent" in result.refusal.message
    assert dict(result.refusal.headers)["X-Proxy-Cache-Reason"] == f"not recorded; differs: {differs}"


@virtual_time
async def test_the_upstream_or_its_cache_as_is_part_of_the_key(tmp_path: Path) -> None:
    config = settings(pool("k1", cache_as="recorded"), cache=CacheSettings(cassette=str(tmp_path / "c")))
    record = PipelineFixture(says(), config=config)
    await record.ask()
    await closed(record)
    elsewhere = replace(pool(cache_as="recorded"), base_url="https://elsewhere.example/v1")
    assert (await replaying(tmp_path / "c", settings(elsewhere)).ask()).cache == "hit"
    assert (await replaying(tmp_path / "c", settings(replace(elsewhere, cache_as=None))).ask()).status == 504


@virtual_time
async def test_without_an_upstream_the_default_is_part_of_the_key(tmp_path: Path) -> None:
    default = replace(pool("k1"), base_url="https://api.openai.com/v1")
    record = PipelineFixture(says(), config=settings(default, cache=CacheSettings(cassette=str(tmp_path / "c"))))
    await record.ask()
    await closed(record)
    assert (await replaying(tmp_path / "c", Settings()).ask()).cache == "hit"


@virtual_time
async def test_hits_are_recorded_too_and_an_unchanged_cassette_is_not_rewritten(tmp_path: Path) -> None:
    file = tmp_path / "c"
    record = await recorded(file, says(), says())
    await record.ask(ask("b"))
    await record.ask(ask("a"))
    await closed(record)
    first, stat = file.read_bytes(), file.stat()
    assert stat.st_mode & 0o777 == 0o600
    assert sorted(first.splitlines()) == first.splitlines()
    again = await recorded(file)
    assert (await again.ask(ask("a"))).cache == "hit"  # the file answers while it is fresh
    await closed(again)
    assert (file.read_bytes(), file.stat().st_ino) == (first, stat.st_ino)
    more = await recorded(file, says())
    await more.ask(ask("c"))
    await closed(more)
    assert set(first.splitlines()) < set(file.read_bytes().splitlines())
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


@virtual_time
async def test_refresh_always_sends_and_overwrites(tmp_path: Path) -> None:
    file = tmp_path / "c"
    record = await recorded(file, says(completion("old")))
    await record.ask()
    await closed(record)
    pipeline = await recorded(file, says(completion("new")), says(completion("new")), mode="refresh")
    for _ in range(2):
        await pipeline.clock.sleep(1.0)
        result = await pipeline.ask()
        assert (result.cache, result.reason) == ("miss", "refresh")
        assert result.headers["Cache-Status"] == "openai-proxy; fwd=bypass; stored; detail=refresh"
    await closed(pipeline)
    (entry,) = read_file(str(file)).values()
    assert b"new" in entry.body
    result = await (await recorded(file, mode="refresh")).ask(None, Options(only_if_cached=True))
    assert result.refused == "not_cached"


@virtual_time
async def test_the_request_is_stored_if_configured(tmp_path: Path) -> None:
    file = tmp_path / "c"
    pipeline = await recorded(file, says(), says(), store_requests=True)
    await pipeline.ask(ask("Grüße", user="somebody", temperature=0, note="sk-k1"))
    await closed(pipeline)
    (entry,) = read_file(str(file)).values()
    assert entry.request is not None
    assert orjson.loads(entry.request) == ask("Grüße", temperature=0, note="***")
    assert (await replaying(file).ask(ask("Grüße", temperature=0, note="sk-k1"))).cache == "hit"


@virtual_time
async def test_replay_removes_no_entry(tmp_path: Path) -> None:
    record = await recorded(tmp_path / "c", says())
    await record.ask()
    await closed(record)
    pipeline = replaying(tmp_path / "c")
    assert isinstance(pipeline.services.store, ReplayStore)
    held: Entries = read_file(str(tmp_path / "c"))
    assert pipeline.services.store.sweep(2 * LONG) == 0
    assert len(held) == 1
    assert (await pipeline.ask()).cache == "hit"
