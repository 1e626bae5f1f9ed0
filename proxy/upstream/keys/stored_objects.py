"""Ids of objects stored upstream: those a request names, those a response brings, and the key that made each.

See `docs/keys-and-limits.md`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from typing import Any, Final
from urllib.parse import unquote

import orjson

KEPT_FOR: Final = 30 * 86_400.0
"""Seconds for which the maker of an object is remembered; OpenAI keeps responses for 30 days."""

MAX_OBJECTS: Final = 100_000
MAX_ID_LENGTH: Final = 256
"""Characters of an id; a longer text is no id."""

_ID_FIELDS: Final = frozenset(
    {
        "assistant_id", "batch_id", "container", "container_id", "conversation", "conversation_id", "file_id",
        "file_ids", "input_file_id", "previous_response_id", "prompt_id", "response_id", "thread_id", "training_file",
        "upload_id", "validation_file", "vector_store_id", "vector_store_ids",
    }
)  # fmt: skip
"""Fields whose value is the id of a stored object, a list of ids, or an object with an `id`."""

_ID_FIELD_ENDINGS: Final = (b'_id"', b'_ids"', b'_file"', b'"conversation"', b'"container"')
"""How each of these names ends: to search a body for five endings costs less than to search for all names."""
_MAX_NODES: Final = 100_000


def ids_named(body: bytes, document: object) -> list[str]:
    """Return the ids of stored objects that a request names, at any depth. body: what `document` was parsed from."""
    if not any(ending in body for ending in _ID_FIELD_ENDINGS):
        return []  # nearly every request
    found: dict[str, None] = {}
    left: list[object] = [document]
    seen = 0
    while left and seen < _MAX_NODES:
        node = left.pop()
        seen += 1
        if isinstance(node, Mapping):
            for name, value in node.items():
                if name in _ID_FIELDS:
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
        if isinstance(item, str) and 0 < len(item) <= MAX_ID_LENGTH:
            yield item


def ids_in_path(path: str) -> list[str]:
    """Return the path segments of a stateful route that may be ids: `/files/file-1/content`, `/threads/t/runs/r`."""
    return [unquote(part) for part in path.split("/")[2:] if 0 < len(part) <= MAX_ID_LENGTH]


def ids_made_by(document: object) -> list[str]:
    """Return the ids that a response brings: its own, and those of a list's items; none if it is no API object."""
    if not isinstance(document, Mapping):
        return []
    found: list[str] = []
    listed = document.get("data")
    for item in (document, *(listed if isinstance(listed, list) else ())):
        if isinstance(item, Mapping) and isinstance(item.get("object"), str):
            found += _ids(item.get("id"))
    return found


class BodyCopy:
    """A bounded copy of a response that is forwarded, kept to see which objects it brings."""

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
        """Return the ids that the response brings; none if it is too large, compressed or no JSON."""
        try:
            return ids_made_by(orjson.loads(b"".join(self._parts))) if self._parts else []
        except orjson.JSONDecodeError:
            return []


def ids_made_by_event(data: bytes) -> list[str]:
    """Return the id in the first event of a stream of the Responses API (`response.created`)."""
    if b'"response"' not in data:
        return []
    try:
        event: Any = orjson.loads(data)
    except orjson.JSONDecodeError:
        return []
    return ids_made_by(event.get("response")) if isinstance(event, dict) else []


class OwnerTable:
    """The label of the key that made each object. `wall` is in Unix seconds."""

    def __init__(self) -> None:
        self._owners: OrderedDict[str, tuple[str, float]] = OrderedDict()

    def record(self, id_: str, label: str, wall: float) -> bool:
        """Remember a maker; return whether other processes should be told (once a day is enough)."""
        old = self._owners.get(id_)
        self._owners[id_] = (label, wall)
        self._owners.move_to_end(id_)
        if len(self._owners) > MAX_OBJECTS:
            self._owners.popitem(last=False)
        return old is None or old[0] != label or wall - old[1] > 86_400

    def owner_of(self, ids: list[str], wall: float) -> str | None:
        """Return the label of the key that made the first known one of these ids."""
        for id_ in ids:
            found = self._owners.get(id_)
            if found is not None and wall - found[1] < KEPT_FOR:
                return found[0]
        return None
