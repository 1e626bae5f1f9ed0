"""Stored objects: the ids that requests name and responses bring, and the makers."""

from __future__ import annotations

from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.upstream.keys import stored_objects as objects
from proxy.upstream.keys.stored_objects import (
    KEPT_FOR,
    MAX_OBJECTS,
    BodyCopy,
    OwnerTable,
    ids_in_path,
    ids_made_by,
    ids_made_by_event,
    ids_named,
)


def named(document: Any) -> list[str]:
    return sorted(ids_named(orjson.dumps(document), document))


@pytest.mark.parametrize(
    ("document", "ids"),
    [
        ({"previous_response_id": "resp_1", "input": "x"}, ["resp_1"]),
        ({"conversation": "conv_1"}, ["conv_1"]),
        ({"conversation": {"id": "conv_1"}}, ["conv_1"]),
        ({"tools": [{"type": "file_search", "vector_store_ids": ["vs_1", "vs_2"]}]}, ["vs_1", "vs_2"]),
        ({"input": [{"content": [{"type": "input_file", "file_id": "file-1"}]}]}, ["file-1"]),
        ({"messages": [{"content": [{"type": "file", "file": {"file_id": "file-1"}}]}]}, ["file-1"]),
        ({"tools": [{"type": "code_interpreter", "container": {"type": "auto", "file_ids": ["file-1"]}}]}, ["file-1"]),
        ({"input_file_id": "file-1", "endpoint": "/v1/chat/completions"}, ["file-1"]),
        ({"training_file": "file-1", "validation_file": "file-2"}, ["file-1", "file-2"]),
        ({"previous_response_id": None, "conversation": 7, "file_id": "", "file_ids": [None, 1]}, []),
        ({"file_id": "x" * 257}, []),
        ({"messages": [{"role": "user", "content": 'the "file_id" of "previous_response_id": "x"'}]}, []),
        ({"model": "gpt-4o", "messages": []}, []),
        ([], []),
    ],
)
def test_ids_in_requests(document: Any, ids: list[str]) -> None:
    assert named(document) == ids


def test_ids_in_every_field_are_found() -> None:
    for name in objects._ID_FIELDS:
        assert named({name: "x"}) == ["x"]


def test_ids_are_found_at_any_depth() -> None:
    document: Any = {"file_id": "file-1"}
    for _ in range(5000):
        document = {"x": [document]}
    assert ids_named(b'"file_id"', document) == ["file-1"]


@pytest.mark.parametrize(
    ("path", "ids"),
    [
        ("/files", []),
        ("/files/file-1/content", ["file-1", "content"]),
        ("/threads/thread_1/runs/run_1", ["thread_1", "runs", "run_1"]),
        ("/files/a%20b", ["a b"]),
        ("/files/", []),
    ],
)
def test_ids_in_paths(path: str, ids: list[str]) -> None:
    assert ids_in_path(path) == ids


@pytest.mark.parametrize(
    ("document", "ids"),
    [
        ({"id": "resp_1", "object": "response", "output": []}, ["resp_1"]),
        ({"object": "list", "data": [{"id": "file-1", "object": "file"}, {"id": "x"}, 7]}, ["file-1"]),
        ({"id": "x"}, []),
        ({"id": 7, "object": "file"}, []),
        ({"object": "list", "data": "x"}, []),
        ([], []),
        (None, []),
    ],
)
def test_ids_in_responses(document: Any, ids: list[str]) -> None:
    assert ids_made_by(document) == ids


def test_ids_in_streams() -> None:
    created = {"type": "response.created", "response": {"id": "resp_1", "object": "response"}}
    assert ids_made_by_event(orjson.dumps(created)) == ["resp_1"]
    for data in (b"", b"[DONE]", b'{"response"', b'["response"]', b'{"response": 7}', b'{"choices": []}'):
        assert ids_made_by_event(data) == []


def test_a_copy_is_bounded() -> None:
    copy = BodyCopy()
    for piece in (b'{"id": "file-1", ', b'"object": "file"}'):
        copy.feed(piece)
    assert copy.ids() == ["file-1"]
    copy.feed(b" " * BodyCopy.LIMIT)
    assert copy.ids() == []
    assert BodyCopy().ids() == []
    broken = BodyCopy()
    broken.feed(b"\x1f\x8b")
    assert broken.ids() == []


def test_the_owner_is_known_for_thirty_days() -> None:
    owners = OwnerTable()
    assert owners.record("file-1", "k1", 0.0)
    assert not owners.record("file-1", "k1", 3600.0)  # no news
    assert owners.record("file-1", "k1", 3 * 86_400.0)  # told again, so that it is kept elsewhere, too
    assert owners.owner_of(["x", "file-1"], 3 * 86_400.0 + KEPT_FOR - 1) == "k1"
    assert owners.owner_of(["file-1"], 3 * 86_400.0 + KEPT_FOR) is None
    assert owners.record("file-1", "k2", 3 * 86_400.0)


def test_memory_is_bounded() -> None:
    owners = OwnerTable()
    for number in range(MAX_OBJECTS + 5):
        owners.record(f"f{number}", "k", 0.0)
    assert owners.owner_of(["f4"], 0.0) is None
    assert owners.owner_of(["f5"], 0.0) == "k"


@given(st.recursive(st.none() | st.text(max_size=4), lambda x: st.lists(x) | st.dictionaries(st.text(max_size=4), x)))
def test_no_value_raises(value: Any) -> None:
    document = {"conversation": value, "file_ids": value, "id": value, "object": "x", "data": value}
    ids_named(orjson.dumps(document), document)
    ids_made_by(document)
