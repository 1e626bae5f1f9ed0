"""Finding the objects that a passed-through response brings, however its bytes arrive."""

from __future__ import annotations

import gzip

import orjson
import pytest

from proxy.upstream.keys.response_watch import KEPT, ResponseWatch
from proxy.upstream.keys.stored_objects import BroughtObjects

FILE = {"id": "file-1", "object": "file"}


def found(body: bytes, step: int, encoding: str = "", length: int | None = None) -> list[str]:
    seen: list[BroughtObjects] = []
    watch = ResponseWatch(encoding, length, seen.append)
    for start in range(0, len(body), step):
        watch.feed(body[start : start + step])
    if length is None:
        watch.finish()
    return sorted({id_ for each in seen for id_ in each.made})


@pytest.mark.parametrize("step", [1, 7, 10_000])
@pytest.mark.parametrize(
    ("body", "ids"),
    [
        (orjson.dumps(FILE), ["file-1"]),
        (b"\xef\xbb\xbf \n" + orjson.dumps([FILE, {"id": "vs_1"}]), ["file-1", "vs_1"]),
        (b"data: " + orjson.dumps(FILE) + b"\n\n: ping\n\ndata: [DONE]\n\n", ["file-1"]),
        (b"event: x\r\ndata: " + orjson.dumps(FILE) + b"\r\n\r\n", ["file-1"]),
        (b"data: " + orjson.dumps(FILE), ["file-1"]),  # without its blank line
        (b'{"id": "file-1"', []),
        (b"not JSON", []),
        (b"", []),
    ],
)
def test_documents_and_events(body: bytes, ids: list[str], step: int) -> None:
    assert found(body, step) == ids
    assert found(body, step, "identity") == ids
    assert found(gzip.compress(body), step, "gzip") == ids


def test_an_object_is_known_with_the_last_byte() -> None:
    body = orjson.dumps(FILE)
    assert found(body, 3, length=len(body)) == ["file-1"]


def test_in_a_large_body_ids_are_found_by_their_look() -> None:
    image = {"id": "ig_1", "result": "A" * (2 * KEPT)}
    body = orjson.dumps(
        {"id": "resp_1", "output": [image, {"id": "msg_1"}, {"id": "call_1"}], "container_id": "cntr_1"}
    )
    for step in (1000, 65_536, len(body)):
        assert found(body, step) == ["cntr_1", "ig_1", "msg_1", "resp_1"]
        assert found(b"data: " + body + b"\n\n", step) == ["cntr_1", "ig_1", "msg_1", "resp_1"]


def test_what_cannot_be_read_is_left_alone() -> None:
    body = orjson.dumps(FILE)
    assert found(body, 5, "compress") == []
    assert found(body, 5, "gzip") == []
    assert found(gzip.compress(body)[:-20], 5, "gzip") == []


@pytest.mark.parametrize(
    ("kind", "read"),
    [
        ("application/json; charset=utf-8", True),
        ("text/event-stream", True),
        ("application/problem+json", True),
        ("", True),
        ("image/png", False),
        ("audio/mpeg", False),
    ],
)
def test_types_that_may_bring_objects(kind: str, read: bool) -> None:
    assert ResponseWatch.reads(kind) is read
