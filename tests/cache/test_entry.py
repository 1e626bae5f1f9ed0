"""proxy.cache.entry: what is stored, for how long, and for whom."""

from __future__ import annotations

import gc
from typing import Any

import msgspec
import pytest

from proxy.cache.entry import OVERHEAD, Entry
from proxy.cost.usage import Usage

USAGE_CHUNK = b'data: {"choices":[],"usage":{"total_tokens":3}}\n\n'
BEFORE = b'data: {"choices":[{"index":0}]}\n\n'
DONE = b"data: [DONE]\n\n"


def entry(**changes: Any) -> Entry:
    values: dict[str, Any] = {
        "key": "ab" * 32,
        "form": "json",
        "status": 200,
        "headers": ((b"content-type", b"application/json"),),
        "body": b"{}",
        "usage_span": None,
        "stored_at": 1000.0,
        "ttl": 60.0,
        "endpoint": "chat",
        "model": "gpt-4o",
        "answer_model": "gpt-4o-2024-08-06",
        "usage": Usage(1, 2, 3),
        "cost": "0.000022",
        "namespace": "",
        "tags": (),
        "sampled": True,
    }
    return Entry(**{**values, **changes})


class TestLifetime:
    @pytest.mark.parametrize(
        ("wall", "fresh", "age", "remaining"),
        [
            (1000.0, True, 0, 60),
            (1000.9, True, 0, 59),
            (1059.9, True, 59, 0),
            (1060.0, False, 60, 0),
            (1061.5, False, 61, -1),
            (900.0, True, 0, 60),  # clocks differ a little
            (699.0, False, 0, 60),  # it was stored while a clock was ahead
            (-1e9, False, 0, 60),
        ],
    )
    def test_freshness_age_and_remaining_time(self, wall: float, fresh: bool, age: int, remaining: int) -> None:
        stored = entry()
        assert stored.fresh(wall) is fresh
        assert stored.age(wall) == age
        assert stored.remaining(wall) == remaining
        assert stored.expires_at == 1060.0


class TestBody:
    def test_a_json_entry_serves_every_client(self) -> None:
        for with_usage in (True, False):
            assert entry(body=b'{"usage":null}').body_for(with_usage) == b'{"usage":null}'

    def test_the_usage_chunk_is_sent_only_if_asked_for(self) -> None:
        span = (len(BEFORE), len(BEFORE) + len(USAGE_CHUNK))
        stored = entry(form="sse", body=BEFORE + USAGE_CHUNK + DONE, usage_span=span)
        assert stored.body_for(True) == BEFORE + USAGE_CHUNK + DONE
        assert stored.body_for(False) == BEFORE + DONE

    def test_a_stream_stored_without_usage_does_not_serve_clients_that_ask_for_it(self) -> None:
        stored = entry(form="sse", body=BEFORE + DONE, usage=None)
        assert stored.body_for(False) is stored.body
        assert stored.body_for(True) is None

    def test_usage_elsewhere_in_the_stream(self) -> None:
        stored = entry(form="sse", body=BEFORE + DONE)
        assert stored.body_for(True) is stored.body
        assert stored.body_for(False) is stored.body

    def test_an_upstream_that_has_no_usage_to_give(self) -> None:
        stored = entry(form="sse", body=BEFORE + DONE, usage=None, usage_asked=True)
        assert stored.body_for(True) is stored.body


class TestValue:
    def test_is_frozen_and_not_tracked_by_the_collector(self) -> None:
        stored = entry()
        with pytest.raises(AttributeError):
            stored.body = b""  # type: ignore[misc]
        assert not gc.is_tracked(stored)
        assert stored == entry()

    def test_can_be_written_and_read(self) -> None:
        stored = entry(tags=("team:search",), usage_span=(1, 2), form="sse")
        assert msgspec.msgpack.decode(msgspec.msgpack.encode(stored), type=Entry) == stored

    def test_size_counts_every_byte(self) -> None:
        bare = entry(key="", headers=(), body=b"", model="", answer_model=None)
        assert bare.size == OVERHEAD
        assert entry(body=b"x" * 1000).size == entry(body=b"").size + 1000
        assert entry(headers=()).size < entry(headers=((b"a", b"b"),)).size - 2
        assert entry(tags=("a:b",)).size > entry().size + 3
        assert entry(namespace="abc").size == entry().size + 3
