"""Objects stored upstream: what a request names, what an answer made, which key may see it (contract 7)."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from typing import Any, Final
from urllib.parse import unquote

import orjson

KEPT_FOR: Final = 30 * 86_400.0
"""Seconds for which it is remembered who made an object; OpenAI keeps responses for 30 days."""

MOST: Final = 100_000
LONGEST: Final = 256
"""Characters of an id; what is longer is none."""

_NAMES: Final = frozenset(
    {
        "assistant_id", "batch_id", "container", "container_id", "conversation", "conversation_id", "file_id",
        "file_ids", "input_file_id", "previous_response_id", "prompt_id", "response_id", "thread_id", "training_file",
        "upload_id", "validation_file", "vector_store_id", "vector_store_ids",
    }
)  # fmt: skip
"""Fields that hold the id of a stored object, a list of them, or an object with an `id`."""

_ENDINGS: Final = (b'_id"', b'_ids"', b'_file"', b'"conversation"', b'"container"')
"""How each of these names ends: a search for five of them costs less than for all, or than a walk."""
_MOST_NODES: Final = 100_000


def ids_named(body: bytes, document: object) -> list[str]:
    """The ids of stored objects that a request names, in any depth. body: the bytes `document` was parsed from."""
    if not any(ending in body for ending in _ENDINGS):
        return []  # nearly every request: nothing is walked
    found: dict[str, None] = {}
    left: list[object] = [document]
    seen = 0
    while left and seen < _MOST_NODES:
        node = left.pop()
        seen += 1
        if isinstance(node, Mapping):
            for name, value in node.items():
                if name in _NAMES:
                    for id_ in _ids(value):
                        found[id_] = None
                if isinstance(value, Mapping | list):
                    left.append(value)
        elif isinstance(node, list):
            left.extend(item for item in node if isinstance(item, Mapping | list))
    return list(found)


def _ids(value: object) -> Iterator[str]:
    if isinstance(value, Mapping):
        value = value.get("id")
    for item in value if isinstance(value, list) else [value]:
        if isinstance(item, str) and 0 < len(item) <= LONGEST:
            yield item


def ids_in_path(path: str) -> list[str]:
    """The segments of a stateful route's path that may be ids: `/files/file-1/content`, `/threads/t/runs/r`."""
    return [unquote(part) for part in path.split("/")[2:] if 0 < len(part) <= LONGEST]


def ids_made_by(document: object) -> list[str]:
    """The ids an answer brings: its own, and those of a list's items. What is no object of the API brings none."""
    if not isinstance(document, Mapping):
        return []
    found: list[str] = []
    listed = document.get("data")
    for item in (document, *(listed if isinstance(listed, list) else ())):
        if isinstance(item, Mapping) and isinstance(item.get("object"), str):
            found += _ids(item.get("id"))
    return found


class BodyCopy:
    """The beginning of an answer that flows by, copied to see which object it brings; bounded, for it may be large."""

    LIMIT: Final = 256 * 1024

    def __init__(self) -> None:
        self._parts: list[bytes] | None = []
        self._size = 0

    def feed(self, chunk: bytes) -> None:
        if self._parts is not None:
            self._size += len(chunk)
            if self._size > self.LIMIT:
                self._parts = None
            else:
                self._parts.append(chunk)

    def ids(self) -> list[str]:
        """What the whole answer brings; nothing where it was too large, compressed or no JSON."""
        try:
            return ids_made_by(orjson.loads(b"".join(self._parts))) if self._parts else []
        except orjson.JSONDecodeError:
            return []


def ids_made_by_event(data: bytes) -> list[str]:
    """The id in the first event of a streamed answer of the Responses API (`response.created`)."""
    if b'"response"' not in data:
        return []
    try:
        event: Any = orjson.loads(data)
    except orjson.JSONDecodeError:
        return []
    return ids_made_by(event.get("response")) if isinstance(event, dict) else []


class OwnerTable:
    """The label of the key that made each object. `wall` is Unix seconds."""

    def __init__(self) -> None:
        self._known: OrderedDict[str, tuple[str, float]] = OrderedDict()

    def record(self, id_: str, label: str, wall: float) -> bool:
        """Remembers it; whether that is news worth telling others (once a day is enough)."""
        old = self._known.get(id_)
        self._known[id_] = (label, wall)
        self._known.move_to_end(id_)
        if len(self._known) > MOST:
            self._known.popitem(last=False)
        return old is None or old[0] != label or wall - old[1] > 86_400

    def owner_of(self, ids: list[str], wall: float) -> str | None:
        """The label for the first id that is known."""
        for id_ in ids:
            found = self._known.get(id_)
            if found is not None and wall - found[1] < KEPT_FOR:
                return found[0]
        return None
