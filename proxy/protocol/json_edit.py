"""Changes one top-level field of a JSON body in place and keeps every other byte (`docs/architecture.md`).

The fields are found by tokens in the bytes. The body is not decoded, its numbers are not converted, and nothing
recurses, so size, depth and escapes do not matter.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any, Final

_QUOTED: Final = rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"'
_STRING: Final = re.compile(_QUOTED, re.DOTALL)
_NAME: Final = re.compile(rb"\s*+(" + _QUOTED + rb")\s*+:\s*+", re.DOTALL)
_BRACKET_OR_STRING: Final = re.compile(rb"[\[\]{}]|" + _QUOTED, re.DOTALL)
_SCALAR: Final = re.compile(rb"[^\s,\]}]++")
_FIRST: Final = re.compile(rb"\s*+\{(\s*+\})?")
_NEXT: Final = re.compile(rb"\s*+(?:(,)|\})")
_OPENING: Final = frozenset(b"[{")
_QUOTE: Final = 0x22

_INCLUDE_USAGE: Final = b'{"include_usage":true}'


def set_field(raw: bytes, name: str, value: bytes) -> bytes:
    """Return `raw` with the top-level member `name` set to `value` (JSON text): replaced, or added as the last one.

    If there are several members of that name, the last one is replaced, since parsers take the last. Raises ValueError
    if `raw` is evidently not a JSON object; it does not find every fault.
    """
    spans = [(start, end) for member, start, end in _members(raw) if _is_name(member, name)]
    if spans:
        start, end = spans[-1]
        return raw[:start] + value + raw[end:]
    return _insert(raw, name, value)


def want_usage(raw: bytes, document: Mapping[str, Any]) -> bytes | None:
    """Return `raw` with `stream_options.include_usage` true if the client left it open; None if nothing is to change.

    document: `raw`, parsed. It is open if `stream` is true and `stream_options` is absent, null, or an object without
    `include_usage`; an explicit true, false or null is the client's decision. None also if `stream_options` is
    malformed or there twice: the upstream decides.
    """
    if document.get("stream") is not True:
        return None
    options = document.get("stream_options")
    if options is None and "stream_options" not in document:
        return _insert(raw, "stream_options", _INCLUDE_USAGE)
    if options is not None and (not isinstance(options, Mapping) or "include_usage" in options):
        return None
    spans = [(start, end) for member, start, end in _members(raw) if _is_name(member, "stream_options")]
    if len(spans) != 1:
        return None
    start, end = spans[0]
    changed = _INCLUDE_USAGE if options is None else _insert(raw[start:end], "include_usage", b"true")
    return raw[:start] + changed + raw[end:]


def is_ambiguous(raw: bytes, name: str) -> bool:
    """Return whether parsers may read different values of a top-level member: it is there twice, or in another case.

    Some take the first of two, some the last, and some do not tell upper from lower case. name: in lower case.
    """
    try:
        found = [member for member, _, _ in _members(raw) if json.loads(member, strict=False).lower() == name]
    except ValueError:
        return True
    return len(found) > 1 or any(json.loads(member, strict=False) != name for member in found)


def _insert(raw: bytes, name: str, value: bytes) -> bytes:
    """Return the object with a new member directly after its last one."""
    brace = raw.rfind(b"}")
    body = raw[:brace].rstrip(b" \t\n\r")
    if brace < 0 or not body:
        raise ValueError("not a JSON object")
    comma = b"" if body.endswith(b"{") else b","
    return b"".join([body, comma, json.dumps(name).encode(), b":", value, raw[len(body) :]])


def _is_name(member: bytes, name: str) -> bool:
    """Return whether a member's name, in quotes and perhaps with escapes, is `name`."""
    if b"\\" in member:
        return bool(json.loads(member, strict=False) == name)
    return member[1:-1] == name.encode()


def _members(raw: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Yield the top-level members: the name as written, and where its value starts and ends."""
    first = _FIRST.match(raw)
    if first is None:
        raise ValueError("not a JSON object")
    if first.group(1):
        return
    at = first.end()
    while True:
        name = _NAME.match(raw, at)
        if name is None:
            raise ValueError("not a JSON object")
        end = _end_of_value(raw, name.end())
        yield name.group(1), name.end(), end
        following = _NEXT.match(raw, end)
        if following is None:
            raise ValueError("not a JSON object")
        if not following.group(1):
            return
        at = following.end()


def _end_of_value(raw: bytes, start: int) -> int:
    first = raw[start] if start < len(raw) else 0
    if first not in _OPENING:
        value = (_STRING if first == _QUOTE else _SCALAR).match(raw, start)
        if value is None:
            raise ValueError("not a JSON object")
        return value.end()
    depth = 0
    for token in _BRACKET_OR_STRING.finditer(raw, start):
        byte = raw[token.start()]
        if byte != _QUOTE:
            depth += 1 if byte in _OPENING else -1
            if depth == 0:
                return token.end()
    raise ValueError("not a JSON object")
