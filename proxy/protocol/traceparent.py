"""The trace that a request names in `traceparent` (W3C Trace Context).

The header is sent upstream unchanged. An invalid one is not corrected, and not logged.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final

from .headers import Raw

_FORMAT: Final = re.compile(rb"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-[!-~]*)?")
_MAX_LENGTH: Final = 128


def traceparent(raw: Iterable[Raw]) -> str:
    """Return the `traceparent` in the headers; '' if there is none, or several, or it is not valid (section 3.2.2)."""
    found = [value for name, value in raw if len(name) == 11 and name.lower() == b"traceparent"]
    if len(found) != 1:
        return ""
    value = found[0].strip(b" \t")
    shape = _FORMAT.fullmatch(value)
    if shape is None or len(value) > _MAX_LENGTH:
        return ""
    version, trace, parent, _, more = shape.groups()
    if version == b"ff" or not trace.strip(b"0") or not parent.strip(b"0") or (version == b"00" and more is not None):
        return ""
    return value.decode()
