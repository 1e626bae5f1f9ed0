"""Ids of what an upstream keeps or has sealed for one account: those a request names, and those a response brings.

An id is known by the field that it stands in, or by its beginning (`resp_`, `file-` …), as OpenAI's API reference has
them. Sealed content (`encrypted_content`) is named by its digest. See `docs/keys-and-limits.md`.
"""

from __future__ import annotations

import hashlib
import re
from collections import deque
from collections.abc import Iterator, Mapping
from enum import Enum
from functools import lru_cache
from typing import Any, Final, NamedTuple
from urllib.parse import parse_qsl, unquote

import msgspec

MAX_ID_LENGTH: Final = 1024
"""Characters of an id; a longer text is no id. Gateways pack into it where a response was made."""

MAX_IDS: Final = 1000
"""Ids of one request or response that are looked at."""

_MAX_NODES: Final = 100_000

_FIELDS: Final = frozenset(
    {
        "assistant_id", "batch_id", "container", "container_id", "conversation", "conversation_id", "error_file_id",
        "file_id", "file_ids", "input_file_id", "output_file_id", "output_file_ids", "previous_response_id",
        "prompt_id", "response_id", "result_files", "skill_id", "thread_id", "training_file", "upload_id",
        "validation_file", "vector_store_id", "vector_store_ids",
    }
)  # fmt: skip
"""Fields whose value is the id of a stored object, whatever it is like; or a list of ids, or an object with an `id`."""

_NO_FIELDS: Final = frozenset(
    {
        "call_id", "client_id", "custom_id", "end_user_id", "organization_id", "project_id", "request_id",
        "session_id", "tool_call_id", "trace_id", "user_id",
    }
)  # fmt: skip
"""Fields that look as if they named a stored object."""

_CLIENTS_OWN: Final = frozenset({"arguments", "headers", "json_schema", "metadata", "parameters", "schema"})
"""Fields whose content is the client's or the model's: a name in it means nothing to the upstream."""

_ECHOED: Final = _CLIENTS_OWN | {"prompt", "text", "tools"}
"""Fields in which a response repeats what the request said."""

_RESULTS: Final = frozenset({"results", "search_results"})
"""Fields that hold what a search has found."""

_ITEMS: Final = frozenset({"data", "item", "items", "output"})
"""Fields that hold objects with ids of their own."""

_KNOWN: Final = re.compile(
    r"(?:apc|apco|asst|audio|batch|cfile|ci|cksess|cmp|cntr|conv|cthi|cthr|ctc|ctco|cu|cuo|eval|evalrun|fc|fco|file|fs"
    r"|ftckpt|ig|lsh|lsho|mcp|mcpl|mcpr|msg|outputitem|part|pmpt|resp|rs|rtc|run|sh|sho|skill|skillver|step|thread|upload"
    r"|video|voice|vs|vsf|vsfb|ws)_\S+|(?:assistant|chatcmpl|cmpl|file|ftckpt|ftevent|ftjob)-\S+"
)
_WORD: Final = re.compile(r"[a-z_]+")
"""A segment of a path that names no object, unless it looks like an id."""


class NamedObjects(msgspec.Struct, frozen=True):
    """What a request names. certain: ids of stored objects; possible: texts that may be such ids."""

    certain: tuple[str, ...] = ()
    possible: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.certain or self.possible)


NOTHING: Final = NamedObjects()


def looks_like_id(text: object) -> bool:
    """Whether a text begins as ids of stored objects do."""
    return isinstance(text, str) and len(text) <= MAX_ID_LENGTH and _KNOWN.fullmatch(text) is not None


def sealed(content: str) -> str:
    """Return what stands for encrypted content among the ids."""
    return "sealed " + hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()


class _Kind(Enum):
    """What a field may hold. OBJECT: ids of objects; MAYBE: the same, if they look like ids."""

    OBJECT = 1
    MAYBE = 2
    ID = 3
    AUDIO = 4
    PROMPT = 5
    SEALED = 6


_OTHER_KINDS: Final = {
    "id": _Kind.ID,
    "audio": _Kind.AUDIO,
    "prompt": _Kind.PROMPT,
    "encrypted_content": _Kind.SEALED,
}


@lru_cache(4096)
def _kind_of(name: str) -> _Kind | None:
    """Return what a field of this name may hold; None: nothing that names an object."""
    if name in _FIELDS:
        return _Kind.OBJECT
    if name.endswith(("_id", "_ids", "_file", "_files")) and name not in _NO_FIELDS:
        return _Kind.MAYBE
    return _OTHER_KINDS.get(name)


def names_in(document: object, path: str = "", query: str = "") -> NamedObjects:
    """Return what a request names, in its path and query first."""
    certain: dict[str, None] = {}
    possible: dict[str, None] = {}
    for part in path.split("/")[2:]:
        segment = unquote(part)
        if looks_like_id(segment):
            certain[segment] = None
        elif 0 < len(segment) <= MAX_ID_LENGTH and not _WORD.fullmatch(segment):
            possible[segment] = None
    for name, value in parse_qsl(query) if query else ():
        if looks_like_id(value) or (name in _FIELDS and 0 < len(value) <= MAX_ID_LENGTH):
            certain[value] = None
    for field in _fields(document, _CLIENTS_OWN):
        _add(field, certain, possible)
        if len(certain) + len(possible) > MAX_IDS:
            break
    if not certain and not possible:
        return NOTHING
    return NamedObjects(tuple(certain), tuple([id_ for id_ in possible if id_ not in certain]))


def _add(field: _Field, certain: dict[str, None], possible: dict[str, None]) -> None:
    """Put the ids in one field of a request into `certain` or `possible`."""
    kind, value = field.kind, field.value
    if kind is _Kind.OBJECT or (kind in (_Kind.AUDIO, _Kind.PROMPT) and type(value) is dict):
        certain.update(dict.fromkeys(_ids(value)))
    elif kind is _Kind.MAYBE:
        for id_ in _ids(value):
            (certain if looks_like_id(id_) else possible)[id_] = None
    elif kind is _Kind.SEALED and isinstance(value, str) and value:
        certain[sealed(value)] = None
    elif kind is _Kind.ID and field.under != "messages":  # those of chats are the client's own
        if field.node.get("type") == "item_reference" or looks_like_id(value):
            certain.update(dict.fromkeys(_ids(value)))
        elif field.under == "input":
            possible.update(dict.fromkeys(_ids(value)))  # an item of an earlier response


class BroughtObjects(msgspec.Struct, frozen=True):
    """What a response brings. made: ids of what it has made, or seems to; seen: ids that it only mentions.

    sealed: what stands for encrypted content.
    """

    made: tuple[str, ...] = ()
    seen: tuple[str, ...] = ()
    sealed: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.made or self.seen or self.sealed)


def brought_by(document: object) -> BroughtObjects:
    """Return the ids in a response, or in one event of a streamed response."""
    made: dict[str, None] = {}
    seen: dict[str, None] = {}
    closed: dict[str, None] = {}
    for field in _fields(document, _ECHOED):
        kind, value, node = field.kind, field.value, field.node
        into = seen if field.found else made
        if kind is _Kind.SEALED:
            if isinstance(value, str) and value:
                closed[sealed(value)] = None
        elif kind is _Kind.ID:
            own = node is document or field.under in _ITEMS or isinstance(node.get("object"), str)
            if own or looks_like_id(value):
                into.update(dict.fromkeys(_ids(value)))
        elif kind is _Kind.OBJECT or (kind is _Kind.AUDIO and type(value) is dict):
            into.update(dict.fromkeys(_ids(value)))
        elif kind is _Kind.MAYBE:
            into.update(dict.fromkeys([id_ for id_ in _ids(value) if looks_like_id(id_)]))
        if len(made) + len(seen) + len(closed) > MAX_IDS:
            break
    return BroughtObjects(tuple(made), tuple([id_ for id_ in seen if id_ not in made]), tuple(closed))


class _Field(NamedTuple):
    """One field that may name an object. node: the JSON object that it is in. under: the field that holds that.

    found: a search has found it.
    """

    node: dict[str, Any]
    under: str
    found: bool
    kind: _Kind
    value: Any


def _fields(document: object, skipped: frozenset[str]) -> Iterator[_Field]:
    """Yield the fields of a document that may name an object, those of the outer JSON objects first.

    skipped: fields whose content is left out.
    """
    left: deque[tuple[Any, str, bool]] = deque([(document, "", False)])
    for _ in range(_MAX_NODES):
        if not left:
            return
        node, under, found = left.popleft()
        if type(node) is dict:
            found = found or node.get("type") == "file_citation"
            for name, value in node.items():
                kind = _kind_of(name)
                if kind is not None:
                    yield _Field(node, under, found, kind, value)
                if (type(value) is dict or type(value) is list) and name not in skipped:
                    left.append((value, name, found or name in _RESULTS))
        elif type(node) is list:
            left.extend([(item, under, found) for item in node if type(item) is dict or type(item) is list])


def _ids(value: object) -> Iterator[str]:
    """Yield the ids in a field that names objects: a text, a list of texts, or an object with an `id`."""
    if isinstance(value, Mapping):
        value = value.get("id")
    for item in value if isinstance(value, list) else [value]:
        if isinstance(item, str) and 0 < len(item) <= MAX_ID_LENGTH:
            yield item
