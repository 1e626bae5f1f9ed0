"""An entry in the other form: what a plain request gets from a stored stream, and the reverse."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import msgspec

from ..protocol.headers import Raw
from .convert import plain_from_stream, stream_from_plain
from .entry import Entry, Form

_TYPES: Final[Mapping[Form, bytes]] = {"json": b"application/json", "sse": b"text/event-stream; charset=utf-8"}
_STREAM_HEADERS: Final = frozenset({b"content-type", b"cache-control", b"x-accel-buffering"})


def other_form(form: Form) -> Form:
    return "json" if form == "sse" else "sse"


def converted(entry: Entry, request: Mapping[str, Any]) -> Entry | None:
    """Return `entry` in its other form, with the same age and lifetime; None if something could get lost."""
    form = other_form(entry.form)
    if form == "json":
        body, span = plain_from_stream(entry.endpoint, request, entry.body), None
    else:
        body, span = stream_from_plain(entry.endpoint, request, entry.body) or (None, None)
    if body is None:
        return None
    headers: tuple[Raw, ...] = tuple(pair for pair in entry.headers if pair[0].lower() not in _STREAM_HEADERS)
    headers = ((b"Content-Type", _TYPES[form]), *headers)
    return msgspec.structs.replace(
        entry, form=form, body=body, usage_span=span, headers=headers, usage_asked=entry.usage_asked or form == "sse"
    )
