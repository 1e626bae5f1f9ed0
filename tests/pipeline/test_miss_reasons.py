"""Every miss and every bypass says why (docs/caching.md)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from proxy.cache.stores.interface import ALL
from proxy.config.settings import CacheSettings, TtlSettings
from proxy.protocol.options import Options
from proxy.protocol.request import Client
from tests.pipeline.clock import virtual_time
from tests.pipeline.fixture import CHAT, PipelineFixture, Result, ask, settings
from tests.pipeline.script import events, says, streams

STREAM = ask(stream=True)
WHOLE = events("Hi")


async def why(pipeline: PipelineFixture, *args: Any, **more: Any) -> tuple[str, str]:
    result: Result = await pipeline.ask(*args, **more)
    return result.cache, result.reason


MISSES: dict[str, tuple[tuple[Any, Options], str]] = {
    "a field": ((ask(temperature=0.5), Options()), "differs: temperature"),
    "a new field": ((ask(vendor={"x": 1}), Options()), "differs: vendor"),
    "null is not absent": ((ask(seed=None), Options()), "differs: seed"),
    "the question": ((ask("Bye"), Options()), "new"),
    "model": ((ask(model="gpt-4o-mini"), Options()), "differs: model"),
    "namespace": ((ask(), Options(namespace="ci")), "differs: namespace"),
    "sample": ((ask(), Options(sample="1")), "differs: sample"),
    "four": ((ask(n=1, seed=1, top_p=1, stop="x"), Options()), "differs: n, seed, stop, ..."),
    "everything": ((ask("Bye", temperature=0), Options()), "new"),
}


@pytest.mark.parametrize(("asked", "reason"), MISSES.values(), ids=MISSES.keys())
@virtual_time
async def test_the_differing_part_is_named(asked: tuple[Any, Options], reason: str) -> None:
    pipeline = PipelineFixture(says(), says())
    assert await why(pipeline) == ("miss", "new")
    assert await why(pipeline, *asked) == ("miss", reason)
    assert pipeline.receipt.reason == reason


@virtual_time
async def test_entries_of_another_client_are_not_compared() -> None:
    pipeline = PipelineFixture(says(), says())
    await pipeline.ask(client=Client("a", "name a"))
    assert await why(pipeline, ask(seed=1), client=Client("b", "name b")) == ("miss", "new")


@virtual_time
async def test_a_request_that_was_not_stored_is_not_compared() -> None:
    pipeline = PipelineFixture(says(), says())
    await pipeline.ask(None, Options(no_store=True))
    assert await why(pipeline, ask(seed=1)) == ("miss", "new")


@virtual_time
async def test_a_differing_header_or_query_is_named() -> None:
    pipeline = PipelineFixture(says(), says(), says())
    await pipeline.ask()
    assert await why(pipeline, headers=[(b"OpenAI-Beta", b"v2")]) == ("miss", "differs: OpenAI-Beta")
    assert await why(pipeline, target=f"{CHAT}?api-version=1") == ("miss", "differs: query")


@virtual_time
async def test_an_expired_entry_is_named_before_and_after_the_sweep() -> None:
    for swept in (False, True):
        pipeline = PipelineFixture(
            says(), says(), says(), config=settings(cache=CacheSettings(ttl=TtlSettings(chat=10.0)))
        )
        await pipeline.ask()
        await pipeline.clock.sleep(11.0)
        if swept:
            assert pipeline.services.store.sweep(pipeline.clock.wall()) == 1
        assert await why(pipeline, ask(seed=1)) == ("miss", "new")
        assert await why(pipeline) == ("miss", "expired")


@virtual_time
async def test_an_evicted_entry_is_named() -> None:
    pipeline = PipelineFixture(says(), says(), config=settings(cache=CacheSettings(memory_size=2000)))
    await pipeline.ask()
    pipeline.services.store.memory.remove(pipeline.services.store.memory.matching(ALL))
    assert await why(pipeline) == ("miss", "gone")


@virtual_time
async def test_after_a_purge_every_request_is_new() -> None:
    pipeline = PipelineFixture(says(), says())
    await pipeline.ask()
    await pipeline.services.store.purge(ALL)
    assert await why(pipeline, ask(seed=1)) == ("miss", "new")


@virtual_time
async def test_an_entry_found_in_the_store_is_compared_too() -> None:
    """After a restart: nothing is remembered, but what is asked again is."""
    first, again = PipelineFixture(says()), PipelineFixture(says())
    await first.ask()
    again.services.store = first.services.store
    again.rebuild()
    assert (await again.ask()).cache == "hit"
    assert await why(again, ask(seed=1)) == ("miss", "differs: seed")


@virtual_time
async def test_an_entry_in_the_other_form_only_is_named() -> None:
    pipeline = PipelineFixture(streams(WHOLE), says())
    await pipeline.ask(STREAM)  # without usage there is no certain plain answer
    assert await why(pipeline) == ("miss", "stored in the other form")


@virtual_time
async def test_an_entry_too_old_in_either_form_is_named() -> None:
    pipeline = PipelineFixture(says(), streams(WHOLE), streams(WHOLE))
    await pipeline.ask()
    await pipeline.clock.sleep(9.0)
    assert await why(pipeline, STREAM, Options(max_age=5)) == ("miss", "max-age")


@virtual_time
async def test_with_the_cache_off_the_reason_is_off() -> None:
    pipeline = PipelineFixture(says(), config=replace(settings(), cache=CacheSettings(backend="off")))
    assert await why(pipeline) == ("bypass", "off")
