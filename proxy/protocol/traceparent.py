"""The trace a request belongs to, as it says itself: W3C Trace Context, `traceparent`.

It goes upstream as it came. What is no valid one is not ours to mend, and stands in no log.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final

from .headers import Raw

_SHAPE: Final = re.compile(rb"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-[!-~]*)?")
_MOST: Final = 128


def traceparent(raw: Iterable[Raw]) -> str:
    """The `traceparent` of a request's headers, '' where there is none, several, or it is not valid (section 3.2.2)."""
    found = [value for name, value in raw if len(name) == 11 and name.lower() == b"traceparent"]
    if len(found) != 1:
        return ""
    value = found[0].strip(b" \t")
    shape = _SHAPE.fullmatch(value)
    if shape is None or len(value) > _MOST:
        return ""
    version, trace, parent, _, more = shape.groups()
    if version == b"ff" or not trace.strip(b"0") or not parent.strip(b"0") or (version == b"00" and more is not None):
        return ""
    return value.decode()
