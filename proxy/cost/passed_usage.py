"""The usage in a response that is passed through: read from a copy of a small one, else from its last bytes."""

from __future__ import annotations

import json
import re
from typing import Any, Final

import orjson

SMALL: Final = 256 * 1024
"""A response of up to this many bytes is copied whole."""

_TAIL: Final = 64 * 1024
_USAGE: Final = re.compile(r'(?<=[{,\s])"usage"\s*:\s*(?=\{)')
"""The name of a member, and not text in a string, where the quotes would be escaped."""


class ResponseCopy:
    """A copy of a response while it flows on: all of it, or its last bytes if it is long."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._size = 0
        self._cut = False

    def feed(self, chunk: bytes) -> None:
        self._parts.append(chunk)
        self._size += len(chunk)
        if self._size > SMALL + _TAIL:
            tail = b"".join(self._parts)[-_TAIL:]
            self._parts, self._size, self._cut = [tail], len(tail), True

    def document(self, is_stream: bool) -> dict[str, Any]:
        """Return what the response says of its usage, as an object with `usage`, `model`, …; {} for nothing."""
        text = b"".join(self._parts)
        if not is_stream and not self._cut:
            try:
                found = orjson.loads(text)
            except orjson.JSONDecodeError:
                return {}
            return found if isinstance(found, dict) else {}
        usage = last_usage(text)
        return {} if usage is None else {"usage": usage}


def last_usage(text: bytes) -> dict[str, Any] | None:
    """Return the last object that is the value of a member `usage`; None if there is none."""
    decoded = text.decode("utf-8", "replace")
    for found in reversed(list(_USAGE.finditer(decoded))):
        try:
            usage, _ = json.JSONDecoder().raw_decode(decoded, found.end())
        except ValueError:
            continue
        if isinstance(usage, dict):
            return usage
    return None
